"""GPU memory that training takes, by size of the model and batch size.

    python -m benchmarks.memory
    python -m benchmarks.memory --sizes=gpt2 --limit_gib=8

Two whole steps of `gpt2 train` (bf16 where the device has it, fused AdamW) at each batch size, with
and without activation checkpointing, up to the first that does not fit. Each size of the model has
a process of its own. Not compiled unless --compile_model=True says so, which takes half a minute
for each number. Options that are not known here go to `gpt2 train`.

`allocated` is the most that tensors took at once, `reserved` what PyTorch took from the device for
them, and `device` that and what CUDA itself takes (context and kernels), as nvidia-smi would show
it. With --limit_gib the process may not take more, on a larger GPU as on one of that size. On a
CPU, which is there for the tests, all three are the largest resident size so far.
"""

import argparse
import gc
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from gpt2.config.command_line import parse
from gpt2.config.model import SIZES
from gpt2.config.train import BatchPlan, TrainConfig
from gpt2.data.loader import TrainLoader
from gpt2.distributed import runtime
from gpt2.distributed.runtime import Runtime
from gpt2.train import setup, step
from gpt2.train.state import TrainState

from .arguments import amount, count, counts
from .throughput import make_data

GIB = 2**30
RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def measure_size(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """A row for each batch size of one size of the model, without and with checkpointing."""
    argv = [
        f"--data_dir={folder}",
        f"--size={options.only}",
        f"--block_size={options.block_size}",
        "--batch_size=1",
        "--grad_accum_steps=1",
        f"--device={options.device}",
        "--compile_model=False",
        *options.extra,
    ]
    config = parse(TrainConfig, argv, "benchmark")
    with runtime.start(config.system) as rt:
        row = describe(options, rt)
        at_start = limit_memory(options.limit_gib) if options.limit_gib else 0
        try:
            state = setup.build(config, rt, None)
        except torch.OutOfMemoryError:
            yield row | {"result": "out of memory"}
            return
        row |= {"parameters": state.model.num_parameters()}
        try:
            for checkpointing in (False, True):
                for batch_size in options.batch_sizes:
                    row |= {"activation_checkpointing": checkpointing, "batch_size": batch_size}
                    result = measure(state, config, rt, row)
                    if options.limit_gib and result.get("device_gib", 0) > options.limit_gib:
                        check_others(at_start)
                        result["result"] = "out of memory"  # by kernels that were loaded since
                    yield row | result
                    if result["result"] != "fits":
                        break
        finally:
            state.loader.close()


def measure(state: TrainState, config: TrainConfig, rt: Runtime, row: dict) -> dict:
    """Peaks of two steps, or that memory was too small, after which all is as before."""
    state.model.checkpoint_activations = row["activation_checkpointing"]
    state.loader.close()
    state.plan = BatchPlan(row["batch_size"], row["block_size"], 1, 1)
    state.loader = TrainLoader(state.loader.order, state.plan, device=rt.device)
    torch.compiler.reset()  # it would go over to code for any batch size
    if rt.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(2):
            step.train_step(state, config, rt).read()
    except torch.OutOfMemoryError:
        state.optimizer.state.clear()  # half of the optimizer state may be there
        state.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        return {"result": "out of memory"}
    return {"result": "fits", **peaks(rt)}


def peaks(rt: Runtime) -> dict[str, float]:
    """What is explained above, in GiB."""
    if rt.device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved()
        allocated, on_device = torch.cuda.max_memory_allocated(), reserved + cuda_itself()
    else:
        import resource

        allocated = reserved = on_device = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "allocated_gib": allocated / GIB,
        "reserved_gib": reserved / GIB,
        "device_gib": on_device / GIB,
    }


def cuda_itself() -> int:
    """Bytes of this device that are taken and not PyTorch's: CUDA's, and other processes'."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def check_others(at_start: int):
    """Ends the program if others have taken memory since; kernels that are loaded take less."""
    grown = cuda_itself() - at_start
    if grown > GIB:
        sys.exit(
            f"other programs have taken {grown / GIB:.1f} GiB of the GPU since the start, which "
            "--limit_gib would count as ours; free the GPU"
        )


def limit_memory(gib: float) -> int:
    """Lets PyTorch take no more than a GPU of that size would have left for it.

    Returns:
        What CUDA itself and other programs take, in bytes.
    """
    torch.zeros(1, device="cuda")  # makes the context
    taken, total = cuda_itself(), torch.cuda.get_device_properties().total_memory
    if gib * GIB <= taken:
        sys.exit(
            f"--limit_gib={gib:g}: CUDA itself and other programs take {taken / GIB:.1f} GiB; "
            "free the GPU"
        )
    torch.cuda.set_per_process_memory_fraction((gib * GIB - taken) / total)
    return taken


def describe(options: argparse.Namespace, rt: Runtime) -> dict:
    """What is measured, on what."""
    return {
        "size": options.only,
        "block_size": options.block_size,
        "machine": rt.device_name,
        "dtype": str(rt.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "limit_gib": options.limit_gib,
        "options": options.extra,
    }


def markdown(rows: list[dict], options: argparse.Namespace) -> str:
    """A table of GiB allocated, without / with activation checkpointing."""
    cells = {}
    for row in rows:
        if row["result"] == "fits":
            key = row["size"], row["batch_size"], row["activation_checkpointing"]
            cells[key] = f"{row['allocated_gib']:.1f}"
    lines = ["| batch_size | " + " | ".join(options.sizes) + " |"]
    lines.append("|---" * (1 + len(options.sizes)) + "|")
    for batch_size in options.batch_sizes:
        pairs = [
            " / ".join(cells.get((size, batch_size, again), "–") for again in (False, True))
            for size in options.sizes
        ]
        lines.append(f"| {batch_size} | " + " | ".join(pairs) + " |")
    limit = f"; at most {options.limit_gib} GiB of the GPU" if options.limit_gib else ""
    return "\n".join(
        [
            *lines,
            "",
            f"GiB of {rows[0]['machine']}, sequences of {options.block_size} tokens, "
            f"{rows[0]['dtype']}, torch {rows[0]['torch']}{limit}; "
            "without / with activation checkpointing; –: does not fit.",
        ]
    )


def names(text: str) -> list[str]:
    """What stands between commas."""
    return text.split(",")


def write(out_dir: Path, name: str, rows: list[dict], table: str):
    """Writes name.jsonl and name.md."""
    out_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (out_dir / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (out_dir / f"{name}.md").write_text(table + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know goes to `gpt2 train`."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    made.add_argument("--sizes", type=names, default=RELEASED, help=f"of {', '.join(SIZES)}")
    made.add_argument("--batch_sizes", type=counts, default=[1, 2, 4, 8, 16, 32, 64])
    made.add_argument("--block_size", type=count, default=1024)
    made.add_argument("--limit_gib", type=amount, help="GiB of the GPU that may be taken")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--only", choices=SIZES, help="one size, in this process")
    made.add_argument("--out_dir", type=Path, help="also write memory.jsonl and memory.md there")
    return made


def main() -> int:
    """Measures all sizes, or with --only one of them."""
    options, options.extra = parser().parse_known_args()
    if options.only:
        with tempfile.TemporaryDirectory() as folder:
            make_data(Path(folder))
            for row in measure_size(options, Path(folder)):
                print(json.dumps(row), flush=True)
        return 0
    rows = []
    for size in options.sizes:
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], f"--only={size}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                rows.append(json.loads(line))
                print(line, end="", flush=True)
        if process.returncode:
            print(f"{size}: failed, see above", file=sys.stderr)
            return 1
    table = markdown(rows, options)
    print(f"\n{table}")
    if options.out_dir:
        write(options.out_dir, "memory", rows, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
