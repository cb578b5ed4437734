"""Tokens per second of whole training steps, beside other people's GPT-2 on the same machine.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --nanogpt=../nanoGPT --build_nanogpt=../build-nanogpt
    python -m benchmarks.throughput --size=gpt2-medium --batch_sizes=16,32,64
    python -m benchmarks.throughput --before=REV

Every contender runs in a process of its own, one after the other, on the same random tokens, and
makes whole steps: batch from disk, forward, backward, clipping, fused AdamW. After a warm-up the
device is waited for after every tenth step only, so that nobody's loop costs it idle time; the
number is the median of these tens. Ours is the step of `gpt2 train` itself, whose loss is read a
step late; theirs is their network and optimizer as they configure it, in bf16 autocast (in float32
on a CPU that has no bf16 units), compiled on a GPU, in the loop that their training scripts have,
whose loss is read in the end. With several batch sizes each contender is shown at its best. Options
that are not known here are ours alone and go to `gpt2 train`, such as
--activation_checkpointing=True.

With --before an earlier build of this project, as it was at a git revision, is one more contender.
Both builds first train on one text, and their losses are compared. Then all take turns for --rounds
rounds; the table has medians over the rounds, and how many times as fast ours was within a round:
the median, the least and the greatest.
"""

import argparse
import ast
import contextlib
import importlib.util
import inspect
import json
import math
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from benchmarks.before import (
    Build,
    add_options,
    advantage,
    earlier_build,
    loss_parity,
    merge_rounds,
    resolve_rounds,
)
from gpt2.config.command_line import parse
from gpt2.config.model import GPT2_VOCAB_SIZE, SIZES
from gpt2.config.train import TrainConfig
from gpt2.data.random_tokens import write_random_shards
from gpt2.data.shards import HEADER_BYTES
from gpt2.distributed import devices, runtime
from gpt2.errors import UserError
from gpt2.train import setup
from gpt2.train import step as step_module
from gpt2.train.setup import resolve_init

from .arguments import count, counts_as_text, whole

SHARD_TOKENS = 4_000_000
STEPS_TIMED = 10  # together
Step = Callable[[], Callable[[], float]]  # launches an optimizer step; what reads its loss


@contextlib.contextmanager
def ours(options: argparse.Namespace, data_dir: Path):
    """The step of `gpt2 train`."""
    argv = [
        f"--data_dir={data_dir}",
        f"--size={options.size}",
        f"--block_size={options.block_size}",
        f"--batch_size={options.batch_size}",
        f"--grad_accum_steps={options.grad_accum_steps}",
        f"--device={options.device}",
        f"--dtype={options.dtype}",
        *options.extra,
    ]
    config = parse(TrainConfig, argv, "benchmark")
    with runtime.start(config.system) as rt:
        config, init = resolve_init(config, rt, None)
        state = setup.build(config, rt, None, init)
        try:
            yield _late(lambda: step_module.train_step(state, config, rt).read, rt.steps_ahead)
        finally:
            state.loader.close()


@contextlib.contextmanager
def theirs(options: argparse.Namespace, data_dir: Path, source: Path, optimizer_arguments: dict):
    """The step of a clone whose file `source` defines GPT and GPTConfig."""
    names = classes_of(source, data_dir)
    shape = SIZES[options.size] | {"block_size": options.block_size, "vocab_size": 50304}
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high")
    model = names.GPT(names.GPTConfig(**shape)).to(options.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, **optimizer_arguments)
    forward = torch.compile(model) if options.device == "cuda" else model
    tokens = np.memmap(next(data_dir.glob("*_train_*")), np.uint16, "r", offset=HEADER_BYTES)
    B, T, accum = options.batch_size, options.block_size, options.grad_accum_steps
    in_bf16 = options.dtype == "bfloat16"

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = np.random.randint(len(tokens) - T - 1, size=B)
        rows = np.stack([tokens[i : i + T + 1] for i in starts]).astype(np.int64)
        x, y = (torch.from_numpy(np.ascontiguousarray(t)) for t in (rows[:, :-1], rows[:, 1:]))
        if options.device != "cuda":
            return x, y
        return tuple(t.pin_memory().to("cuda", non_blocking=True) for t in (x, y))

    def step() -> Callable[[], float]:
        total = 0.0
        for _ in range(accum):
            x, y = batch()
            with torch.autocast(options.device, torch.bfloat16, enabled=in_bf16):
                loss = forward(x, y)[1] / accum
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item

    yield step


def _late(launch: Callable[[], Callable[[], list[float]]], steps_ahead: int) -> Step:
    """As the loop of `gpt2 train` does it: reads a step's numbers after launching the next."""
    unread = deque()

    def step() -> Callable[[], float]:
        unread.append(launch())
        while len(unread) > steps_ahead:
            newest = unread.popleft()
            newest()
        return lambda: (unread[-1] if unread else newest)()[0]

    return step


def classes_of(source: Path, folder: Path) -> ModuleType:
    """A file's imports and classes as a module, without what it does when it is run as a script."""
    tree = ast.parse(source.read_text("utf-8"))
    wanted = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom | ast.ClassDef)]
    own = {path.stem for path in source.parent.glob("*.py")}  # their helpers are not needed
    tree.body = [n for n in wanted if getattr(n, "module", None) not in own]
    part = folder / "contender.py"
    part.write_text(ast.unparse(tree), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(part.stem, part)
    module = importlib.util.module_from_spec(spec)
    sys.modules[part.stem] = module  # where dataclasses look
    spec.loader.exec_module(module)
    module.master_process = False  # build-nanogpt prints with it
    return module


def contenders(options: argparse.Namespace) -> dict[str, Callable]:
    """Name -> what gives its step, for those that can run."""
    found: dict[str, Callable] = {"ours": ours}
    if options.nanogpt:
        path, arguments = options.nanogpt / "model.py", {"betas": (0.9, 0.95)}
        found["nanoGPT"] = lambda o, d: theirs(o, d, path, arguments | {"device_type": o.device})
    if options.build_nanogpt:
        script = options.build_nanogpt / "train_gpt2.py"
        found["build-nanogpt"] = lambda o, d: theirs(o, d, script, {"device_type": o.device})
    return found


def measure(step: Step, options: argparse.Namespace) -> dict:
    """Runs the steps of one contender."""
    on_gpu = options.device == "cuda"
    began = time.perf_counter()
    first_loss = step()()
    first_step_seconds = time.perf_counter() - began
    for _ in range(options.warmup):
        step()
    seconds = []
    together = min(STEPS_TIMED, options.steps)
    for _ in range(options.steps // together):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(together):
            read = step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / together)
    loss = read()
    assert math.isfinite(loss), loss
    tokens = options.batch_size * options.block_size * options.grad_accum_steps
    median = statistics.median(seconds)
    return {
        "tokens_per_second": tokens / median,
        "ms_per_65536_tokens": 65_536_000 * median / tokens,
        "fastest_tokens_per_second": tokens / min(seconds),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "first_step_seconds": first_step_seconds,
        "first_loss": first_loss,
    }


def make_data(folder: Path):
    """Shards of random tokens."""
    write_random_shards(folder, SHARD_TOKENS, GPT2_VOCAB_SIZE)


def show(rows: list[dict], options: argparse.Namespace):
    """Prints a table, and writes JSON lines and a bar chart into --out_dir.

    The lines are of all that was measured; table and chart of the fastest of each contender.
    """
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    rows = fastest(merge_rounds(rows))
    print(
        f"\n{'':16s} {'batch':>5s} {'tokens/s':>10s} {'ms/65,536':>10s} {'peak GiB':>9s} "
        f"{'first step':>11s} {'ours is':>8s} of rounds"
    )
    for row in rows:
        peak = f"{row['peak_gib']:.1f}" if row["peak_gib"] else "-"
        rate, ms = row["tokens_per_second"], row["ms_per_65536_tokens"]
        first = row["first_step_seconds"]
        batch = row["batch_size"]
        times, spread = advantage(rows[0], row) if rows[0]["name"] == "ours" else ("", "")
        print(
            f"{row['name']:16s} {batch:5d} {rate:10,.0f} {ms:10.1f} {peak:>9s} {first:9.1f} s "
            f"{times:>8s} {spread}".rstrip()
        )
    if not options.out_dir:
        return
    options.out_dir.mkdir(parents=True, exist_ok=True)
    (options.out_dir / "throughput.jsonl").write_text(lines, encoding="utf-8")
    if not rows:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.8 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    several = len({r["batch_size"] for r in rows}) > 1
    names = [f"{r['name']}, batch {r['batch_size']}" if several else r["name"] for r in rows]
    bars = axes.barh(names, [r["tokens_per_second"] / 1e3 for r in rows])
    axes.bar_label(bars, fmt="%.0fk" if options.device == "cuda" else "%.2fk", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("thousand tokens per second")
    setting = f"{options.size} at the best batch size each" if several else rows[0]["setting"]
    axes.set_title(f"{rows[0]['machine']}, {setting}", fontsize=9)
    figure.savefig(options.out_dir / "throughput.png", dpi=120)


def fastest(rows: list[dict]) -> list[dict]:
    """Of each contender the row with the most tokens per second; without those that ran out."""
    best: dict[str, dict] = {}
    for row in rows:
        rate = row.get("tokens_per_second", 0)
        if rate > best.get(row["name"], {}).get("tokens_per_second", 0):
            best[row["name"]] = row
    return list(best.values())


def describe(options: argparse.Namespace) -> dict:
    """What was measured, on what."""
    machine = "CPU"
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    setting = (
        f"{options.size}, {options.grad_accum_steps} × {options.batch_size} × {options.block_size} "
        f"tokens a step, {options.dtype}, torch {torch.__version__}"
    )
    return {
        "machine": machine,
        "setting": setting,
        "batch_size": options.batch_size,
        "threads": torch.get_num_threads(),
    }


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know goes to `gpt2 train`."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--nanogpt", type=Path, help="a clone of github.com/karpathy/nanoGPT")
    made.add_argument("--build_nanogpt", type=Path, help="a clone of karpathy/build-nanogpt")
    made.add_argument("--size", default="gpt2", choices=SIZES)
    made.add_argument("--batch_size", type=count, help="sequences; 64 on a GPU, 2 on a CPU")
    made.add_argument(
        "--batch_sizes",
        type=counts_as_text,
        help="several, ascending: 8,16,32; up to what memory holds",
    )
    made.add_argument("--block_size", type=count, help="tokens; 1024 on a GPU, 512 on a CPU")
    made.add_argument("--grad_accum_steps", type=count, default=1)
    made.add_argument("--steps", type=count, default=50, help="steps to measure, by tens")
    made.add_argument(
        "--warmup", type=whole, default=10, help="steps before, not counting the first"
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", help="of matmuls: bfloat16, or float32 on a CPU without its units")
    made.add_argument("--only", help="one contender, in this process")
    add_options(made)
    made.add_argument("--parity_steps", type=whole, default=20, help="to compare losses; 0: none")
    made.add_argument("--out_dir", type=Path, help="also write throughput.jsonl and .png there")
    return made


def main() -> int:
    """Runs all contenders, or with --only one of them."""
    options, options.extra = parser().parse_known_args()
    on_gpu = options.device == "cuda"
    options.batch_size = options.batch_size or (64 if on_gpu else 2)
    options.block_size = options.block_size or (1024 if on_gpu else 512)
    natural = "bfloat16" if on_gpu or devices.cpu_has_fast_bfloat16() else "float32"
    options.dtype = options.dtype or natural
    if options.only:
        print(json.dumps(measure_one(options)))
        return 0
    try:
        with earlier_build(options.before, "throughput") as builds:
            if builds and options.parity_steps:  # first: it is short, and meets wrong options
                argv = arguments_of(options, sizes_of(options)[0])
                print(loss_parity([Build("ours"), *builds], argv, options.parity_steps), flush=True)
            show(list(measure_all(options, builds)), options)
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def sizes_of(options: argparse.Namespace) -> list[str]:
    """The batch sizes to measure."""
    return (options.batch_sizes or str(options.batch_size)).split(",")


def arguments_of(options: argparse.Namespace, batch_size: str) -> list[str]:
    """The options of a process that runs one contender, with all defaults written out."""
    names = ("size", "block_size", "grad_accum_steps", "steps", "warmup", "device", "dtype")
    given = [f"--{name}={getattr(options, name)}" for name in names]
    return [*given, f"--batch_size={batch_size}", *options.extra]


def measure_all(options: argparse.Namespace, builds: list[Build]) -> Iterator[dict]:
    """A row for each round, contender and batch size, as far as memory holds the batch."""
    clones = [
        f"--{name}={getattr(options, name)}"
        for name in ("nanogpt", "build_nanogpt")
        if getattr(options, name)
    ]
    runs = [(build, ["--only=ours"]) for build in (Build("ours"), *builds)]
    runs += [(Build(n), [f"--only={n}", *clones]) for n in contenders(options) if n != "ours"]
    too_large: set[tuple[str, str]] = set()
    for turn in range(resolve_rounds(options)):
        for build, chosen in runs:
            for batch_size in sizes_of(options):
                if (build.name, batch_size) in too_large:
                    break
                row = build.row("throughput", [*arguments_of(options, batch_size), *chosen])
                yield row | {"round": turn}
                rate = row.get("tokens_per_second")
                told = f"{rate:,.0f} tokens/s" if rate else "out of memory"
                print(f"{build.name}, batch size {batch_size}: {told}", flush=True)
                if not rate:
                    too_large.add((build.name, batch_size))


def measure_one(options: argparse.Namespace) -> dict:
    """The row of one contender; without numbers when memory is too small."""
    row = {"name": options.only, **describe(options)}
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        try:
            with contenders(options)[options.only](options, Path(folder)) as step:
                return row | measure(step, options)
        except torch.OutOfMemoryError:
            return row | {"out_of_memory": True}


if __name__ == "__main__":
    sys.exit(main())
