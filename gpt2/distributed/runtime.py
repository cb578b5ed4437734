"""The machine: processes, device, precision, compilation, seeds and signals.

The only module that knows environment variables and, beside `parallel`, torch.distributed.
Everything above it works with a `Runtime` and does not ask whether there is one rank or many, a GPU
or none.
"""

import contextlib
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

from ..config.model import ModernConfig
from ..config.train import SystemOptions
from ..errors import UserError
from . import fsdp
from .devices import choose_device, choose_dtype, describe, keep_freed_memory
from .rendezvous import meet
from .watchdog import Watchdog

DEEP = 24  # blocks that are still compiled all at once
START_TIMEOUT = datetime.timedelta(minutes=30)  # the first step may compile for minutes
MARGIN = datetime.timedelta(minutes=10)  # of a collective's timeout beyond that of the watchdog
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last is what Slurm is often told to send


@dataclass
class Runtime:
    """This process among all processes, and what it computes with."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    notes: list[str] = field(default_factory=list)  # what was chosen, and why
    sharded: bool = False  # by FSDP2, see `parallel`; else every rank holds all
    stop_signal: int = 0  # number of the signal that asked this rank to stop, 0: none
    hang_timeout: int = 0  # seconds; 0: none
    watchdog: Watchdog | None = None  # where there are other ranks
    watched: bool = False  # whether the first step is done

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

    def place(self, model: nn.Module):
        """Moves a model on the CPU to the device: all of it, or this rank's part; in place."""
        if self.sharded:
            fsdp.shard(model, self.device, self.dtype)
        else:
            model.to(self.device)

    def compile(self, model: nn.Module):
        """Compiles in place: names in the state dict stay as they are.

        FSDP gathers weights between blocks, where the compiler could not look past. PyTorch 2.11,
        given the whole model, keeps most of what activation checkpointing should drop. And 48
        blocks at once take it over a minute. So then each block is compiled by itself, all by the
        same code. Blocks with switches differ, and their masks are made outside of them.
        """
        deep = len(model.transformer.h) > DEEP and not isinstance(model.config, ModernConfig)
        apart = self.sharded or model.checkpoint_activations or deep
        model.compiled_apart = apart
        for part in model.transformer.h if apart else [model]:
            part.compile()

    def wrap(self, model: nn.Module) -> Callable[..., Tensor]:
        """The callable to train with. The raw model keeps its plain names for checkpoints."""
        if self.world_size == 1 or self.sharded:
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
        self._beat()
        if self.sharded:
            fsdp.send_gradients(forward, last)
        if self.world_size == 1 or self.sharded or last:
            return contextlib.nullcontext()
        return forward.no_sync()

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Calls a function on rank 0; every rank gets its result, or the UserError it raised."""
        result, problem = None, None
        with self._long_timeout():
            if self.is_main:
                try:
                    with self.alone():
                        result = function()
                except UserError as error:
                    problem = str(error)
            result, problem = self.broadcast((result, problem))
        self._beat()
        if problem:
            raise UserError(problem)
        return result

    def alone(self) -> contextlib.AbstractContextManager:
        """Around long work of this rank for which the others wait: they are not to call it hung."""
        return self.watchdog.alone() if self.watchdog else contextlib.nullcontext()

    def reached(self, step: int):
        """Takes down that a step is done; from the first on a rank that hangs is noticed soon."""
        if self.watchdog:
            self.watchdog.reached(step)
            if not self.watched:
                _set_timeout(datetime.timedelta(seconds=self.hang_timeout) + MARGIN)
            self.watched = True

    def _beat(self):
        if self.watchdog:
            self.watchdog.beat()

    @contextlib.contextmanager
    def _long_timeout(self) -> Iterator[None]:
        """A slow disk of one rank must not end the collective in which the others wait for it."""
        if self.watched:
            _set_timeout(START_TIMEOUT)
        yield
        if self.watched:
            _set_timeout(datetime.timedelta(seconds=self.hang_timeout) + MARGIN)

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
        self._beat()
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
def start(
    options: SystemOptions, log: Callable[[str], None] = lambda text: None
) -> Iterator[Runtime]:
    """Joins the process group (under torchrun), chooses the device and catches signals.

    Args:
        options: of the machine.
        tell: is given a line when a rank hangs, before the process ends.
    """
    rank, local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
    )
    device = choose_device(options.device, local_rank)
    dtype, reason = choose_dtype(options.dtype, device)
    sharded = options.parallel == "fsdp" and world_size > 1
    if sharded and dtype == torch.float16:
        raise UserError(
            "parallel=fsdp does not scale the loss, which float16 needs; use --parallel=ddp, or "
            "--dtype=float32 (bfloat16 where the GPU has it)"
        )
    rt = Runtime(device, dtype, rank, world_size, sharded=sharded)
    rt.notes.append(f"device {describe(device)}, dtype {str(dtype)[6:]}: {reason}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # float32 products on tensor cores
    else:
        keep_freed_memory()
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = next(iter(dist.rendezvous("env://", timeout=START_TIMEOUT)))[0]
        store = dist.PrefixStore(meet(store, rank, world_size), store)
        ranks = {"rank": rank, "world_size": world_size}
        dist.init_process_group(backend, store=store, timeout=START_TIMEOUT, **ranks)
        how = "each with a part of the weights (fsdp)" if sharded else "each with all weights (ddp)"
        rt.notes.append(f"{world_size} ranks by {backend}, {how}")
        _watch(rt, options.hang_timeout_seconds, log)
    elif options.parallel == "fsdp":
        rt.notes.append("parallel=fsdp: one rank holds all weights")
    seed(options.seed)
    try:
        with _catch_signals(rt):
            yield rt
    finally:
        if rt.watchdog:
            rt.watchdog.close()
        if world_size > 1:
            dist.destroy_process_group()


def _watch(rt: Runtime, seconds: int, log: Callable[[str], None]):
    """Starts the watchdog, where this torch lets us have the store by which the ranks met."""
    get_store = getattr(dist.distributed_c10d, "_get_default_store", None)
    if seconds and get_store:
        store = dist.PrefixStore("watchdog", get_store())
        rt.hang_timeout = seconds
        rt.watchdog = Watchdog(store, rt.rank, rt.world_size, seconds=seconds, log=log)


def _set_timeout(timeout: datetime.timedelta):
    """Sets how long collectives that begin from now on wait, where this torch can."""
    set_timeout = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
    if set_timeout:
        set_timeout(timeout)


def leave(code: int, at_once: bool = False) -> int:
    """The exit code of a run that is over; one of several ranks ends its process here.

    So does a run that ends `at_once`, while a thread is still writing. While Python takes itself
    apart, a thread of gloo that wants Python's lock makes the process abort (seen once in hundreds
    of runs): a finished run would be reported as failed.
    """
    if at_once or int(os.environ.get("WORLD_SIZE", "1")) > 1:
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
    """SIGINT, SIGTERM and SIGUSR1 set `stop_signal`; a second Ctrl-C, later, ends at once.

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

    caught = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
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
