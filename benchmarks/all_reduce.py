"""Bus bandwidth of all-reduce between the GPUs of a machine, as nccl-tests defines it.

    torchrun --standalone --nproc_per_node=8 -m benchmarks.all_reduce

All ranks reduce one float32 tensor of each size again and again. An all-reduce of S bytes between n
ranks that takes t seconds has a bus bandwidth of 2 (n - 1) / n S / t: what each rank sends, and so
what the slowest link carries. Rank 0 prints a line of JSON for each size. CPUs reduce by gloo.
"""

import argparse
import inspect
import json
import statistics
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from gpt2.config.train import SystemOptions
from gpt2.distributed import runtime
from gpt2.distributed.devices import wait_for
from gpt2.distributed.runtime import Runtime
from gpt2.errors import UserError

from .arguments import counts
from .scaling import BUCKET, parameters, ring_bytes

WARMUP, TOGETHER, REPEATS = 5, 10, 5  # all-reduces, all-reduces of a measurement, measurements
SIZES = (4, BUCKET, 4 * parameters("gpt2"))  # bytes: a number, a bucket of DDP, all gradients


def measure(sizes: list[int], rt: Runtime) -> Iterator[dict]:
    """A row for each size: seconds of an all-reduce, the median, and its bus bandwidth."""
    for size in sizes:
        tensor = torch.zeros(max(1, size // 4), device=rt.device)
        for _ in range(WARMUP):
            dist.all_reduce(tensor)
        seconds = []
        for _ in range(REPEATS):
            wait_for(rt.device)
            dist.barrier()
            wait_for(rt.device)
            began = time.perf_counter()
            for _ in range(TOGETHER):
                dist.all_reduce(tensor)
            wait_for(rt.device)
            seconds.append((time.perf_counter() - began) / TOGETHER)
        median = statistics.median(seconds)
        yield {
            "bytes": size,
            "seconds": median,
            "bus_bandwidth": ring_bytes(size, rt.world_size) / median,
            "gpus": rt.world_size,
            "device": rt.device_name,
            "torch": torch.__version__,
        }
        del tensor


def main() -> int:
    """Prints the rows on rank 0."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--device", default="auto", help="auto, cuda or cpu")
    said = ",".join(map(str, SIZES))
    made.add_argument("--bytes", type=counts, default=SIZES, help=f"sizes, with commas; {said}")
    options = made.parse_args()
    try:
        with runtime.start(SystemOptions(device=options.device)) as rt:
            if rt.world_size == 1:
                raise UserError("one rank reduces nothing; start several: torchrun, as in --help")
            for row in measure(options.bytes, rt):
                if rt.is_main:
                    print(json.dumps(row), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
