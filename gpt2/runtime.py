"""The machine: processes, device, precision, compilation, seeds and signals.

The only module that knows torch.distributed and environment variables. Everything above it works
with a `Runtime` and does not ask whether there is one rank or many, a GPU or none.
"""

import contextlib
import ctypes
import datetime
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import SystemOptions, UserError
from .devices import choose_device, choose_dtype, describe

START_TIMEOUT = datetime.timedelta(minutes=30)  # the first step may compile for minutes


@dataclass
class Runtime:
    """This process among all processes, and what it computes with."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    notes: list[str] = field(default_factory=list)  # what was chosen, and why
    stop_signal: int = 0  # number of the signal that asked this rank to stop, 0: none

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and speaks."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The name that a table of peak rates is asked for."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in `dtype`, everything delicate in float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in fp16, whose small numbers end at 6e-8; does nothing elsewhere."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def wrap(self, model: nn.Module) -> Callable[..., Tensor]:
        """The callable to train with. The raw model keeps its plain names for checkpoints."""
        if self.world_size == 1:
            return model
        on_gpu = self.device.type == "cuda"
        return DistributedDataParallel(
            model,
            device_ids=[self.device.index] if on_gpu else None,
            gradient_as_bucket_view=True,  # gradients live in the buffers that are sent
            # no static_graph: with no_sync (see `accumulate`) it ends in an error of PyTorch's own
        )

    def accumulate(self, forward: Callable, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of a micro-batch: gradients are sent on the last only."""
        if self.world_size == 1 or last:
            return contextlib.nullcontext()
        return forward.no_sync()

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Calls a function on rank 0; every rank gets its result, or the UserError it raised."""
        result, problem = None, None
        if self.is_main:
            try:
                result = function()
            except UserError as error:
                problem = str(error)
        result, problem = self.broadcast((result, problem))
        if problem:
            raise UserError(problem)
        return result

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank; changes the tensor."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    @property
    def steps_ahead(self) -> int:
        """Steps that are launched before the numbers of an earlier one are waited for."""
        return int(self.device.type == "cuda")

    def read_later(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Starts to copy numbers from the device; the result waits for them and nothing behind."""
        if self.device.type != "cuda":
            return numbers.tolist
        copy = torch.empty_like(numbers, device="cpu", pin_memory=True)
        copy.copy_(numbers, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record()

        def read() -> list[float]:
            copied.synchronize()
            return copy.tolist()

        return read

    def stop_flag(self) -> Tensor:
        """1 when a signal has asked this rank to stop, else 0, on the device."""
        return torch.full((), float(bool(self.stop_signal)), device=self.device)

    def stop_requested(self) -> bool:
        """Whether a signal has asked any rank to stop; all ranks must ask together."""
        return self.all_sum(self.stop_flag()).item() > 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value of a small picklable object, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value of a small picklable object, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def rng_state(self) -> dict[str, Any]:
        """State of the random generators of this rank, as plain values and tensors."""
        state = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_rng_state(self, state: dict[str, Any]):
        """Puts back what `rng_state` gave."""
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


@contextlib.contextmanager
def start(options: SystemOptions) -> Iterator[Runtime]:
    """Joins the process group (under torchrun), chooses the device and catches signals."""
    rank, local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
    )
    device = choose_device(options.device, local_rank)
    dtype, reason = choose_dtype(options.dtype, device)
    rt = Runtime(device, dtype, rank, world_size)
    rt.notes.append(f"device {describe(device)}, dtype {str(dtype)[6:]}: {reason}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # float32 products on tensor cores
    else:
        _keep_freed_memory()
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=START_TIMEOUT)
        rt.notes.append(f"{world_size} ranks by {backend}")
    seed(options.seed)
    try:
        with _catch_signals(rt):
            yield rt
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def _keep_freed_memory():
    """Asks glibc to reuse large blocks instead of giving them back to the system.

    By default every tensor over 32 MB is mapped anew, and its pages are cleared one by one when
    they are first touched: on two cores that took half the time of a training step. The numbers
    do not change. Other systems' allocators are left as they are.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def leave(code: int) -> int:
    """The exit code of a run that is over; one of several ranks ends its process here.

    While Python takes itself apart, a thread of gloo that wants Python's lock makes the process
    abort (seen once in hundreds of runs): a finished run would be reported as failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def variable(name: str) -> str:
    """A variable of the environment; empty where there is none."""
    return os.environ.get(name, "")


def is_first_rank() -> bool:
    """Whether this process is rank 0 under torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def seed(number: int):
    """Seeds every generator alike, so that all ranks make the same weights."""
    random.seed(number)
    torch.manual_seed(number)


@contextlib.contextmanager
def _catch_signals(rt: Runtime) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop_signal`; a second Ctrl-C, a second later, ends at once.

    A terminal sends Ctrl-C to the whole process group and torchrun passes it on once more, so a
    repetition within a second is the same request.
    """
    first_time = 0.0

    def handle(number: int, _frame: Any):
        nonlocal first_time
        if not rt.stop_signal:
            rt.stop_signal, first_time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first_time > 1:
            raise KeyboardInterrupt

    caught = [signal.SIGINT, signal.SIGTERM]
    try:
        before = {number: signal.signal(number, handle) for number in caught}
    except ValueError:  # not the main thread: signals belong to the program that embeds us
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
