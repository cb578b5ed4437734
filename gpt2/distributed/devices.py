"""Which device, which precision, compiled or not: the choice, and the reason for it."""

import ctypes
import shutil
import sys

import torch

from ..errors import UserError, first_line
from .environment import ranks


def choose_device(requested: str, local_rank: int = 0) -> torch.device:
    """The device for a request of "auto", "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        UserError: when that device is not there.
    """
    if requested == "auto":
        if torch.cuda.is_available():
            requested = "cuda"
        else:
            requested = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except (RuntimeError, TypeError):
        raise UserError(f"device={requested}: use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise UserError(
                f"device={requested}: GPU number {index} is not there, this machine shows {count}; "
                "use --device=cpu, or fewer processes"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: this machine has no Apple GPU; use --device=cpu")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"device={requested}: use auto, cpu, cuda, cuda:1 or mps")
    return device


def choose_dtype(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of matmuls, and why.

    bf16 is chosen only where the hardware has it. A T4 emulates bf16, slowly, and torch reports
    support unless emulation is excluded. fp16 needs the GradScaler of `Runtime.grad_scaler`.

    Raises:
        UserError: float16 on an Apple GPU.
    """
    if requested == "float16" and device.type == "mps":
        raise UserError(
            "dtype=float16 needs loss scaling, which mps lacks; use float32 or bfloat16"
        )
    if requested == "float32" and device.type == "cuda":
        return torch.float32, "as asked (matmuls in TF32 where the GPU has it)"
    if requested != "auto":
        return getattr(torch, requested), "as asked"
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16, "this GPU has bf16 units"
        return torch.float16, "this GPU has no bf16 units; fp16 with loss scaling"
    if device.type == "cpu" and cpu_has_fast_bfloat16():
        return torch.bfloat16, "this CPU has bf16 instructions"
    return torch.float32, f"no fast bf16 on this {device.type}"


def cpu_has_fast_bfloat16() -> bool:
    """Whether the CPU has bf16 matmuls in hardware (AVX512-BF16 or AMX)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def choose_compile(requested: str, device: torch.device) -> tuple[bool, str]:
    """Whether to use torch.compile, and why; never an error.

    Checks the GPU and the C compiler, then compiles one tiny function: a broken installation is
    found before the model is compiled.
    """
    if requested == "False":
        return False, "as asked"
    if requested == "auto" and device.type != "cuda":
        return False, f"on a {device.type} it takes half a minute and gains little"
    problem = _compile_problem(device)
    if problem:
        return False, f"{problem}; going on without"
    return True, "as asked" if requested == "True" else "faster on this GPU"


COMPILERS = ("cc", "gcc", "clang", "g++")


def missing_for_compile(device: torch.device) -> str:
    """What torch.compile lacks on this machine, without trying it; empty: nothing that is known."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "torch.compile needs a GPU of compute capability 7.0 or newer"
    if sys.platform != "win32" and not any(map(shutil.which, COMPILERS)):
        return (
            "torch.compile needs a C compiler (install gcc) (docs/troubleshooting.md#no-c-compiler)"
        )
    return ""


def _compile_problem(device: torch.device) -> str:
    if missing := missing_for_compile(device):
        return missing
    try:
        trial = torch.compile(lambda x: x * 2 + 1)
        trial(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 - whatever is broken, training must go on without
        return f"torch.compile does not work here ({first_line(error)[:150]})"
    return ""


def choose_graph(device: torch.device, compiled: bool, sharded: bool) -> tuple[bool, str]:
    """Whether micro-batches become CUDA graphs, and why.

    With several ranks, gradients are then averaged after the last micro-batch, where DDP averages
    them during its backward pass. That pays where GPUs of one machine reach each other's memory.

    Args:
        device: of this rank.
        compiled: whether the network is compiled.
        sharded: whether FSDP is on, whose all-gathers a graph of ours cannot hold.
    """
    if device.type != "cuda":
        return False, f"there are none on a {device.type}"
    if not compiled:
        return False, "compile_model is off"
    if sharded:
        return False, "parallel=fsdp"
    own = ranks()
    if own.on_this_machine < own.world_size:
        return False, "ranks on several machines"
    if own.world_size > 1 and not _reaches_all_gpus(device):
        return False, "GPUs without peer access"
    return True, "one launch for each micro-batch, but for conversations"


def _reaches_all_gpus(device: torch.device) -> bool:
    others = set(range(torch.cuda.device_count())) - {device.index}
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)


def describe(device: torch.device) -> str:
    """The device in words, with its name and size."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{device} ({torch.cuda.get_device_name(device)}, {total / 2**30:.0f} GiB)"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    return str(device)


def allow_fp8(requested: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the head computes in fp8.

    Raises:
        UserError: asked for where the device cannot.
    """
    if requested == "none":
        return False
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    if not has_fp8 or dtype != torch.bfloat16:
        raise UserError(
            f"fp8={requested} needs --dtype=bfloat16 and a GPU of compute capability 8.9 or newer "
            f"(RTX 4090, L4, H100, …), not {str(dtype)[6:]} on {describe(device)}; leave it out"
        )
    return True


def keep_freed_memory() -> None:
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


def wait_for(device: torch.device) -> None:
    """Returns when the device has computed all that was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
