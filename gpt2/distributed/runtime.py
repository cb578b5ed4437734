"""This process among all processes, and what it computes with: ranks, device, precision, DDP.

Beside `fsdp` the only module that knows torch.distributed. Everything above works with a `Runtime`
and does not ask whether there is one rank or many, a GPU or none.
"""

import contextlib
import datetime
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config.train import SystemOptions
from ..errors import UserError, first_line
from . import fsdp
from .devices import choose_device, choose_dtype, describe, keep_freed_memory
from .environment import check_meeting_place, ranks
from .random_state import seed
from .rendezvous import meet
from .signals import caught
from .watchdog import HUNG, Watchdog

START_TIMEOUT = datetime.timedelta(minutes=30)  # the first step may compile for minutes
# Gloo's errors of a rank that is gone are plain RuntimeErrors.
OF_A_LOST_RANK = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Socket closed")
MARGIN = datetime.timedelta(minutes=10)  # of a collective's timeout beyond that of the watchdog


@dataclass
class Runtime:
    """This process among all processes, and what it computes with."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    sharded: bool = False  # by FSDP2: a rank holds a part of the weights, else all of them
    choices: tuple[str, ...] = ()  # device, precision and ranks in words, and why
    stop_signal: int = 0  # number of the signal that asked this rank to stop, 0: none
    hang_timeout: int = 0  # seconds; 0: none
    watchdog: Watchdog | None = None  # where there are other ranks
    watched: bool = False  # whether the first step is done

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one that writes files and logs."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """Name of the GPU as its driver gives it, else the kind of device."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type

    def peak_gib(self) -> float | None:
        """GiB that tensors of this rank took at most so far, on a GPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matmuls in `dtype`; softmax, norms and losses in float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in fp16, whose smallest number is 6e-8; does nothing elsewhere."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def stop(self, number: int) -> None:
        """Notes the signal that asked this rank to stop."""
        self.stop_signal = number

    def place(self, model: nn.Module) -> None:
        """Moves a model from the CPU to the device, in place; with FSDP, this rank's part."""
        if self.sharded:
            fsdp.shard(model, self.device, self.dtype)
        else:
            model.to(self.device)

    def wrap(self, model: nn.Module, recorded: bool = False) -> nn.Module:
        """The module to train with, DDP around the model where there are several ranks.

        The model inside keeps its plain names for checkpoints. A CUDA graph cannot hold DDP's
        all-reduces as they are; with `recorded`, the model stays bare and `average_gradients` does
        DDP's work. Either way all ranks get the weights of rank 0.
        """
        if self.world_size == 1 or self.sharded:
            return model
        if recorded:
            for p in model.parameters():
                dist.broadcast(p.data, 0)
            return model
        on_gpu = self.device.type == "cuda"
        return DistributedDataParallel(
            model,
            device_ids=[self.device.index] if on_gpu else None,
            gradient_as_bucket_view=True,  # gradients live in the buffers that are sent
            # no static_graph: together with no_sync it raises an error inside of PyTorch
        )

    def gradient_sync(self, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of a micro-batch: gradients are summed on the last only.

        Args:
            wrapped: the module that `wrap` gave.
            last: whether this is the last micro-batch of the step; the others run in `no_sync`.
        """
        self._beat()
        if self.sharded:
            fsdp.set_gradient_sync(wrapped, last)
        if last or not isinstance(wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()

    def average_gradients(self, wrapped: nn.Module) -> None:
        """Averages gradients over ranks, in place, where neither DDP nor FSDP has done so.

        Args:
            wrapped: the module that `wrap` gave.
        """
        bare = not isinstance(wrapped, DistributedDataParallel)
        if self.world_size > 1 and bare and not self.sharded:
            average([p.grad for p in wrapped.parameters() if p.grad is not None])

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
        """Around long work for which the other ranks wait: the watchdog does not count it."""
        return self.watchdog.alone() if self.watchdog else contextlib.nullcontext()

    def reached(self, step: int) -> None:
        """Tells the watchdog that a step is done; after the first, timeouts are short."""
        if self.watchdog:
            self.watchdog.reached(step)
            if not self.watched:
                _set_timeout(datetime.timedelta(seconds=self.hang_timeout) + MARGIN)
            self.watched = True

    def _beat(self) -> None:
        if self.watchdog:
            self.watchdog.beat()

    @contextlib.contextmanager
    def _long_timeout(self) -> Iterator[None]:
        """Lengthens the collective timeout: the other ranks may wait for one rank's slow disk."""
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
        """Steps that are launched before the loss of an earlier one is read."""
        return int(self.device.type == "cuda")

    def stop_flag(self) -> Tensor:
        """1 when a signal has asked this rank to stop, else 0, on the device."""
        return self.flag(bool(self.stop_signal))

    def flag(self, value: bool) -> Tensor:
        """() 1 or 0 on the device, for `all_sum`."""
        return torch.full((), float(value), device=self.device)

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


@contextlib.contextmanager
def start(
    options: SystemOptions,
    log: Callable[[str], None] = lambda text: None,
    answer: Callable[[int], None] = lambda number: None,
) -> Iterator[Runtime]:
    """Joins the process group (under torchrun), chooses the device and catches signals.

    Args:
        options: of the machine.
        log: gets one line when a rank hangs or is gone, before the process ends with `HUNG`.
        answer: is called on rank 0 with the number of the first signal, by a thread and at once.

    Raises:
        UserError: a device that is not there, or a precision that does not fit.
    """
    rank, local_rank, world_size, _ = ranks()
    device = choose_device(options.device, local_rank)
    dtype, reason = choose_dtype(options.dtype, device)
    sharded = options.parallel == "fsdp" and world_size > 1
    if sharded and dtype == torch.float16:
        raise UserError(
            "parallel=fsdp does not scale the loss, which float16 needs; use --parallel=ddp, or "
            "--dtype=float32 (bfloat16 where the GPU has it)"
        )
    rt = Runtime(device, dtype, rank, world_size, sharded)
    rt.choices = (f"device {describe(device)}, dtype {str(dtype)[6:]}: {reason}",)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # float32 matmuls on tensor cores
    else:
        keep_freed_memory()
    if world_size > 1:
        check_meeting_place()
        how, store = _join(rt)
        rt.choices += (how,)
        _watch(rt, store, options.hang_timeout_seconds, log)
    elif options.parallel == "fsdp":
        rt.choices += ("parallel=fsdp: one rank holds all weights",)
    seed(options.seed)
    try:
        with caught(rt.stop, answer if rt.is_main else lambda number: None):
            yield rt
    except RuntimeError as error:
        if world_size == 1 or not (reason := _of_a_lost_rank(error)):
            raise
        log(
            f"[rank {rank}] another rank has ended ({reason}): it said why, or the system killed "
            "it (see dmesg; as a rule for its memory); start the same command again"
        )
        raise SystemExit(HUNG) from None
    finally:
        if rt.watchdog:
            rt.watchdog.close()
        if world_size > 1:
            _groups_left.append(dist.group.WORLD)
            dist.destroy_process_group()


def _of_a_lost_rank(error: RuntimeError) -> str:
    """What the error of a collective says, when another rank is gone; "" for other errors."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return first_line(error)
    found = OF_A_LOST_RANK.search(first_line(error)) if "gloo" in str(error) else None
    return found[0] if found else ""


# Groups whose runs are over. The destructor of a group waits for gloo's threads while it holds the
# GIL. A thread that waits for the GIL at that moment would stop the process for ever (seen in one
# of 13 runs on a busy machine), so groups live as long as the process.
_groups_left: list[Any] = []


def average(tensors: list[Tensor]) -> None:
    """Averages tensors over all ranks, in place; NCCL sends them as one group where it can."""
    by_nccl = dist.get_backend() == "nccl"
    operation = dist.ReduceOp.AVG if by_nccl else dist.ReduceOp.SUM  # gloo has no AVG
    coalesced = getattr(dist, "_coalescing_manager", None) if by_nccl else None
    with coalesced() if coalesced else contextlib.nullcontext():
        for tensor in tensors:
            dist.all_reduce(tensor, operation)
    if not by_nccl:
        for tensor in tensors:
            tensor.div_(dist.get_world_size())


def _join(rt: Runtime) -> tuple[str, Any]:
    """Joins the process group; returns what it is in words, and the store of all ranks."""
    backend = "nccl" if rt.device.type == "cuda" else "gloo"
    store = next(iter(dist.rendezvous("env://", timeout=START_TIMEOUT)))[0]
    store = dist.PrefixStore(meet(store, rt.rank, rt.world_size), store)
    dist.init_process_group(
        backend, store=store, timeout=START_TIMEOUT, rank=rt.rank, world_size=rt.world_size
    )
    how = "each with a part of the weights (fsdp)" if rt.sharded else "each with all weights (ddp)"
    return f"{rt.world_size} ranks by {backend}, {how}", store


def _watch(rt: Runtime, store: Any, seconds: int, log: Callable[[str], None]) -> None:
    """Starts the watchdog, on the store by which the ranks met."""
    if seconds:
        rt.hang_timeout = seconds
        store = dist.PrefixStore("watchdog", store)
        rt.watchdog = Watchdog(store, rt.rank, rt.world_size, seconds=seconds, log=log)


def _set_timeout(timeout: datetime.timedelta) -> None:
    """Sets how long collectives that begin from now on wait, where this torch can."""
    set_timeout = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
    if set_timeout:
        set_timeout(timeout)
