"""Full fine-tuning beside LoRA: memory, speed, bytes of the optimizer, trained parameters.

    python -m benchmarks.finetune
    python -m benchmarks.finetune --sizes=gpt2-xl --batch_sizes=4 --rank=16

Whole steps of `gpt2 finetune` (packed conversations, bf16 where the device has it, clipping, fused
AdamW) on fresh weights, which cost what others do. Each size has a process of its own, and trains
all weights first, then adapters beside the same ones. Where memory is too small for all weights,
both get activation checkpointing; --activation_checkpointing=True gives it from the start. Not
compiled unless --compile_model=True says so. Options that are not known here go to `gpt2 finetune`.

The peak is the most that tensors took at once, from the first step on; on a CPU, which is there for
the tests, the largest resident size so far. Seconds are the median of the steps after a warm-up,
each waited for; tokens are all positions of the rows, whether the assistant's or not.
"""

import argparse
import gc
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpt2.config.command_line import parse
from gpt2.config.finetune import FinetuneConfig, TuningOptions
from gpt2.config.model import SIZES
from gpt2.distributed import runtime
from gpt2.distributed.devices import wait_for
from gpt2.distributed.runtime import Runtime
from gpt2.model import lora
from gpt2.train import setup, step
from gpt2.train.optimizer import build_optimizer
from gpt2.train.state import TrainState

from .arguments import count, counts, whole
from .memory import GIB, names, peaks, write


def make_conversations(path: Path, count: int = 1500):
    """Questions with answers of some 20 to 600 tokens."""
    with open(path, "w", encoding="utf-8") as file:
        for n in range(count):
            answer = " ".join(f"{n + i} and" for i in range(10 + 37 * n % 290))
            turns = (("user", f"Count from {n}."), ("assistant", answer))
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def measure_size(options: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for all weights and one for adapters."""
    make_conversations(folder / "chats.jsonl")
    argv = [
        f"--data={folder / 'chats.jsonl'}",
        f"--size={options.only}",
        f"--block_size={options.block_size}",
        f"--batch_size={options.batch_sizes[0]}",
        f"--device={options.device}",
        "--compile_model=False",
        *options.extra,
    ]
    config = parse(FinetuneConfig, argv, "benchmark")
    rows = []
    with runtime.start(config.system) as rt:
        state = setup.build(config, rt, None)
        try:
            for rank in (0, options.rank):
                if rank:
                    adapt(state, config, rt, options.rank)
                result = measure(state, config, rt, options)
                if result["result"] != "fits" and not state.model.checkpoint_activations:
                    state.model.checkpoint_activations = True
                    result = measure(state, config, rt, options)
                rows.append(describe(state, options, rt, rank) | result)
        finally:
            state.loader.close()
    return rows


def adapt(state: TrainState, config: FinetuneConfig, rt: Runtime, rank: int):
    """Adapters beside the weights of a run that has trained all of them, and their optimizer."""
    state.optimizer.zero_grad(set_to_none=True)
    lora.adapt(state.model, TuningOptions(lora_rank=rank))
    state.model.to(rt.device)
    state.optimizer = build_optimizer(state.model, config.optim, rt)
    torch.compiler.reset()


def measure(
    state: TrainState, config: FinetuneConfig, rt: Runtime, options: argparse.Namespace
) -> dict:
    """Numbers of some steps, or that memory was too small."""
    gc.collect()
    if rt.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = [], float("nan")
    try:
        for _ in range(options.warmup + options.steps):
            began = time.perf_counter()
            loss = step.train_step(state, config, rt).read()[0]  # waits for the device
            wait_for(rt.device)  # the update of the weights too
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        state.optimizer.state.clear()  # half of the optimizer state may be there
        state.optimizer.zero_grad(set_to_none=True)
        return {"result": "out of memory"}
    median = statistics.median(seconds[options.warmup :])
    moments = [v for s in state.optimizer.state.values() for v in s.values()]
    return {
        "result": "fits",
        "peak_gib": peaks(rt)["allocated_gib"],
        "step_seconds": median,
        "tokens_per_second": state.plan.tokens_per_step / median,
        "optimizer_bytes": sum(v.nbytes for v in moments if isinstance(v, torch.Tensor)),
        "loss": loss,
    }


def describe(state: TrainState, options: argparse.Namespace, rt: Runtime, rank: int) -> dict:
    """What is measured, on what."""
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    return {
        "size": options.only,
        "lora_rank": rank,
        "batch_size": state.plan.batch_size,
        "block_size": options.block_size,
        "activation_checkpointing": state.model.checkpoint_activations,
        "trained_parameters": trained,
        "machine": rt.device_name,
        "torch": torch.__version__,
        "options": options.extra,
    }


def markdown(rows: list[dict]) -> str:
    """A table of all rows."""
    lines = [
        "| size | trained | parameters trained | optimizer | peak memory | tokens/s |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        what = f"LoRA, rank {row['lora_rank']}" if row["lora_rank"] else "all weights"
        what += ", activation checkpointing" * row["activation_checkpointing"]
        numbers = "does not fit | – | –"
        if row["result"] == "fits":
            numbers = (
                f"{row['optimizer_bytes'] / GIB:.3f} GiB | {row['peak_gib']:.1f} GiB | "
                f"{row['tokens_per_second']:,.0f}"
            )
        shape = f"{row['batch_size']} × {row['block_size']}"
        name = f"{row['size']}, {shape}"
        lines.append(f"| {name} | {what} | {row['trained_parameters']:,} | {numbers} |")
    return "\n".join([*lines, "", f"{rows[0]['machine']}, torch {rows[0]['torch']}"])


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know goes to `gpt2 finetune`."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    made.add_argument("--sizes", type=names, default=["gpt2", "gpt2-xl"], help=", ".join(SIZES))
    made.add_argument("--batch_sizes", type=counts, default=[32, 8], help="one for each size")
    made.add_argument("--block_size", type=count, default=1024)
    made.add_argument("--rank", type=count, default=8, help="of the adapters")
    made.add_argument("--steps", type=count, default=8, help="steps that are timed")
    made.add_argument("--warmup", type=whole, default=3, help="steps before them")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--only", choices=SIZES, help="one size, in this process")
    made.add_argument(
        "--out_dir", type=Path, help="also write finetune.jsonl and finetune.md there"
    )
    return made


def main() -> int:
    """Measures all sizes, or with --only one of them."""
    made = parser()
    options, options.extra = made.parse_known_args()
    if options.only:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure_size(options, Path(folder)):
                print(json.dumps(row), flush=True)
        return 0
    if len(options.batch_sizes) != len(options.sizes):
        made.error("give --batch_sizes= as many numbers as --sizes= has names")
    rows = []
    for size, batch_size in zip(options.sizes, options.batch_sizes, strict=True):
        command = [sys.executable, "-m", "benchmarks.finetune", *sys.argv[1:], f"--only={size}"]
        command.append(f"--batch_sizes={batch_size}")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            print(f"{size}: failed, see above", file=sys.stderr)
            return 1
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    table = markdown(rows)
    print(f"\n{table}")
    if options.out_dir:
        write(options.out_dir, "finetune", rows, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
