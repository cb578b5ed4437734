"""Tokens per second that the loader of `gpt2 train` takes from shards, on one core.

    python -m benchmarks.loader
    python -m benchmarks.loader --data_dir=fineweb --batch_size=64

Without --data_dir two shards of random tokens are made. Each is measured cold, after the system was
asked to forget the files (Linux; whatever caches lie below it remain), and warm; beside the rate
stands the one per second of processor time, which other programs do not change. The last line is
what a training step sees: how long it waits for a batch when it takes the time that computing the
batch takes at --tokens_per_second.
"""

import argparse
import inspect
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gpt2.config.model import GPT2_VOCAB_SIZE
from gpt2.config.train import BatchPlan
from gpt2.data.loader import TrainLoader
from gpt2.data.sequence_order import Mixture, SequenceOrder
from gpt2.data.shards import Shard, find_shards, write_shard

from .arguments import amount, count


def forget(shards: list[Shard]) -> bool:
    """Asks the system to drop the files from its cache; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for shard in shards:
        with open(shard.path, "rb") as file:
            os.fsync(file.fileno())  # what is not written yet is not dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def rate(shards: list[Shard], plan: BatchPlan, seconds: float) -> str:
    """Tokens per second of a loader from its first batch on."""
    used = time.process_time()
    loader = TrainLoader(Mixture([SequenceOrder(shards, plan.block_size, 1337, True)]), plan)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        loader.next_step()
        steps += 1
    passed, used = time.perf_counter() - began, time.process_time() - used
    loader.close()
    millions = steps * plan.tokens_per_step / 1e6
    return f"{millions / passed:.1f}M tokens/s, {millions / used:.1f}M per core-second"


def wait(shards: list[Shard], plan: BatchPlan, step_seconds: float, steps: int) -> list[float]:
    """Seconds that each step waits for its batch while the device computes for `step_seconds`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    order = Mixture([SequenceOrder(shards, plan.block_size, 1337, True)])
    loader = TrainLoader(order, plan, device=device)
    waited = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        loader.next_step()
        waited.append(time.perf_counter() - began)
        time.sleep(step_seconds)
    loader.close()
    return waited[1:]  # the first one opens the files


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--data_dir", type=Path, help="a folder of shards")
    made.add_argument("--shard_tokens", type=count, default=100_000_000, help="of those made here")
    made.add_argument("--batch_size", type=count, default=64, help="sequences")
    made.add_argument("--block_size", type=count, default=1024)
    made.add_argument("--seconds", type=amount, default=3.0, help="for each measurement")
    made.add_argument("--tokens_per_second", type=amount, default=600_000, help="of the training")
    return made


def main() -> int:
    """Measures and prints."""
    options = parser().parse_args()
    if hasattr(os, "sched_setaffinity"):  # threads made later inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    plan = BatchPlan(options.batch_size, options.block_size, 1, 1)
    with tempfile.TemporaryDirectory() as made:
        folder = options.data_dir or Path(made)
        if not options.data_dir:
            random = np.random.default_rng(0)
            for number in (1, 2):
                tokens = random.integers(GPT2_VOCAB_SIZE, size=options.shard_tokens)
                write_shard(folder / f"random_train_{number:06d}.bin", tokens.astype(np.uint16))
        shards = find_shards(folder, "train")
        cold = "cold" if forget(shards) else "cold (not possible here: warm)"
        print(f"{cold}: {rate(shards, plan, options.seconds)}")
        print(f"warm: {rate(shards, plan, options.seconds)}")
        step = plan.tokens_per_step / options.tokens_per_second
        waited = wait(shards, plan, step, max(3, int(options.seconds / step)))
        share = statistics.median(waited) / step
        print(
            f"a step of {1e3 * step:.1f} ms waits {1e3 * statistics.median(waited):.3f} ms "
            f"({share:.2%}), at most {1e3 * max(waited):.3f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
