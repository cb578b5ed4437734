"""What saving costs a training run: the time of steps with and without a checkpoint.

    python -m benchmarks.saving
    python -m benchmarks.saving --batch_size=64 --steps=60 --out_dir=/disk/to/measure

Steps of `gpt2 train` in rows of --steps, whose time is taken from one waiting for the device to the
next. Kinds of rows take turns: `none` saves nothing; `later` begins with what the loop does at
`--save_every`, the state to continue from and the model to use, written while training goes on;
`at once` waits until both are written, as without the thread. A row is not over before its files
are whole. The cost of a save is the difference of the medians of rows, and its share is told for a
save every 250 steps. Options that are not known here go to `gpt2 train`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpt2.config.command_line import parse
from gpt2.config.train import TrainConfig
from gpt2.distributed import runtime
from gpt2.distributed.devices import describe, wait_for
from gpt2.distributed.runtime import Runtime
from gpt2.train import run_folder, save, setup
from gpt2.train import step as step_module
from gpt2.train.run_folder import MODEL_NAME
from gpt2.train.state import TrainState

from .arguments import count, whole
from .throughput import _late, make_data

KINDS = ("none", "later", "at once")
EVERY = 250  # steps between saves, for which the share is told


def main() -> int:
    """Measures, and prints a table."""
    options, extra = parser().parse_known_args()
    with tempfile.TemporaryDirectory(dir=options.out_dir or None) as folder:
        make_data(Path(folder))
        argv = [
            f"--data_dir={folder}",
            f"--out_dir={folder}/run",
            f"--size={options.size}",
            f"--batch_size={options.batch_size}",
            "--grad_accum_steps=1",
            f"--device={options.device}",
            *extra,
        ]
        config = parse(TrainConfig, argv, "benchmark")
        with runtime.start(config.system) as rt:
            row = measure(config, rt, options)
    print(json.dumps(row))
    show(row)
    return 0


def measure(config: TrainConfig, rt: Runtime, options: argparse.Namespace) -> dict:
    """Seconds of rows of steps of each kind, and what follows from them."""
    made = setup.build(config, rt, None)
    rows: dict[str, list[float]] = {kind: [] for kind in KINDS}
    stalls: list[float] = []
    with made.saver:
        try:
            step = _late(lambda: step_module.train_step(made, config, rt).read, rt.steps_ahead)
            for _ in range(options.warmup):
                step()()
            for number in range(options.rows + 1):
                for kind in KINDS:
                    seconds, stall = time_row(step, kind, made, config, rt, options.steps)
                    print(f"row {number}, {kind}: {seconds:.2f} s", file=sys.stderr, flush=True)
                    if number:  # the first save allocates the memory for the copies
                        rows[kind].append(seconds)
                        stalls += [stall] * (kind == "later")
        finally:
            made.loader.close()
    median = {kind: statistics.median(seconds) for kind, seconds in rows.items()}
    step_seconds = median["none"] / options.steps
    cost = {kind: median[kind] - median["none"] for kind in KINDS[1:]}
    states = list((run_folder.out_dir(config) / "state").glob("*/*"))
    return {
        "device": describe(rt.device),
        "torch": torch.__version__,
        "parameters": made.model.num_parameters(),
        "tokens_per_step": made.plan.tokens_per_step,
        "state_bytes": sum(p.stat().st_size for p in states) // config.output.keep_last,
        "steps": options.steps,
        "row_seconds": rows,
        "step_seconds": step_seconds,
        "stall_seconds": statistics.median(stalls),
        "cost_seconds": cost,
        "share_of_250": {kind: cost[kind] / (EVERY * step_seconds) for kind in cost},
    }


def time_row(  # noqa: PLR0917
    step, kind: str, made: TrainState, config: TrainConfig, rt: Runtime, steps: int
) -> tuple[float, float]:
    """(seconds of a row, seconds that its save let the loop wait)."""
    wait_for(rt.device)
    started, stall = time.perf_counter(), 0.0
    if kind != "none":
        save.save_checkpoint(made, config, rt, final=kind == "at once")
        save.export_model(made, config, rt, MODEL_NAME, final=kind == "at once")
        stall = time.perf_counter() - started
    for _ in range(steps):
        step()
    wait_for(rt.device)
    made.saver.wait()
    return time.perf_counter() - started, stall


def show(row: dict):
    """The table."""
    print(
        f"{row['device']}, {row['parameters']:,} parameters, {row['tokens_per_step']:,} tokens a "
        f"step: {row['step_seconds'] * 1000:.1f} ms; a state has {row['state_bytes'] / 1e9:.2f} GB"
    )
    print(f"{'save':8} {'costs':>9} {'of 250 steps':>13}   rows of {row['steps']} steps, s")
    for kind in KINDS:
        rows = " ".join(f"{seconds:.2f}" for seconds in row["row_seconds"][kind])
        cost, share = row["cost_seconds"].get(kind), row["share_of_250"].get(kind)
        numbers = "" if cost is None else f"{cost * 1000:6.0f} ms {share:13.2%}"
        print(f"{kind:8} {numbers:23}   {rows}")
    print(f"the loop itself waits {row['stall_seconds'] * 1000:.0f} ms for a save that comes later")


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found.add_argument("--device", default=device)
    found.add_argument("--size", default="gpt2")
    found.add_argument("--batch_size", type=count, default=32 if device == "cuda" else 1)
    found.add_argument(
        "--steps", type=count, default=60 if device == "cuda" else 4, help="in a row"
    )
    found.add_argument("--rows", type=count, default=3, help="of each kind")
    found.add_argument("--warmup", type=whole, default=5 if device == "cuda" else 1)
    found.add_argument("--out_dir", default="", help="a folder on the disk to write to")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
