"""FSDP2: each rank holds a part of the weights, the gradients and the optimizer state.

Zhao et al. 2023, "PyTorch FSDP" (arXiv:2304.11277), after ZeRO stage 3 (Rajbhandari et al. 2020). A
block's weights are all-gathered before its forward and its backward, and freed afterwards; its
gradients are reduce-scattered. Parameters of such a model are DTensors: every rank holds some rows
of each (`torch.chunk` of dimension 0). All functions accept plain tensors and models as well, so
that callers need not know whether FSDP is on.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError, first_line
from . import part_files

# DTensors and FSDP modules are typed as Any: the classes are known only after the imports below.
# torch.distributed.fsdp, .tensor and .checkpoint are imported inside of functions: they take a
# second, for which runs without FSDP would wait.


def shard(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a `GPT` from the CPU to the devices of all ranks, each its part, in place.

    Every block is an FSDP unit; embeddings and the last norm are another one. All ranks get rank
    0's weights, as with DDP. A GPU never holds more than its part and one block.

    Args:
        model: equal in shape on all ranks, with plain names, which stay.
        device: of this rank.
        dtype: of the matmuls; weights are all-gathered in it, gradients reduced in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in (*model.transformer.h, model):
        for p in unit.parameters():
            if not is_part(p):
                p.data = p.data.to(device)
                dist.broadcast(p.data, 0)
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has cut this model."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(model, module.FSDPModule)


def free_gathered(model: Any) -> None:
    """Lets the next forward gather the weights anew; to be called when they were changed.

    FSDP keeps what a forward without a backward has gathered of the outermost unit.
    """
    if is_sharded(model):
        for unit in (*model.transformer.h, model):
            unit.reshard()


def set_gradient_sync(model: Any, on: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks, or only accumulates them."""
    model.set_requires_gradient_sync(on)


def method(model: nn.Module, name: str) -> Callable:
    """A method of the model for which FSDP all-gathers the weights, as it does for `forward`."""
    if not is_sharded(model):
        return getattr(model, name)
    from torch.distributed.fsdp import register_fsdp_forward_method

    alias = f"gathered_{name}"  # under the own name, `forward` would gather twice
    if not hasattr(model, alias):
        setattr(model, alias, getattr(model, name))
        register_fsdp_forward_method(model, alias)
    return getattr(model, alias)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """() the norm of all gradients over the parts of all ranks; all ranks must call it."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def is_part(t: object) -> bool:
    """Whether this is a DTensor, of which every rank holds a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Any) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; a plain tensor as it is."""
    return t.to_local() if is_part(t) else t


def whole(t: Any) -> Tensor:
    """The whole tensor, all-gathered; all ranks must call it."""
    return t.full_tensor() if is_part(t) else t


def as_part_of(part: Tensor, like: Any) -> Tensor:
    """A DTensor made of this rank's part, distributed as `like`; the inverse of `local`."""
    if not is_part(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def cut(full: Tensor, like: Any) -> Tensor:
    """This rank's part of a whole tensor, which every rank holds."""
    if not is_part(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    # None: no rank sends anything
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def like(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank holds, distributed as `like` and on its device."""
    if not is_part(like):
        return full
    return as_part_of(cut(full.to(like.device, like.dtype), like), like)


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state dict; with FSDP, whole tensors on the CPU, all-gathered one after the other.

    All ranks must call it; a rank with `keep` False gets an empty dict.
    """
    if not is_sharded(model):
        return model.state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor)
        if keep:
            state[name] = full.detach().cpu()
    return state


def write_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes DTensors by Distributed Checkpoint (DCP), one safetensors file per rank.

    DCP's own format is not used: its metadata is a pickle, and reading it can execute code.

    Raises:
        UserError: on all ranks, when one could not write.
    """
    import torch.distributed.checkpoint as dcp

    if not hasattr(dcp, "HuggingFaceStorageWriter"):
        return part_files.write(folder, {name: _rows(t) for name, t in tensors.items()})
    writer = dcp.HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except (dcp.CheckpointException, OSError) as error:  # the first is no Exception
        raise UserError(f"checkpoint {folder} not written: {_reason(error)}") from None


def read_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills DTensors from the files of any number of ranks; each rank reads its own part.

    The files must have been compared with their hashes; nothing in them is executed.

    Raises:
        UserError: tensors that are not there, or of another shape.
    """
    import torch.distributed.checkpoint as dcp

    if not hasattr(dcp, "HuggingFaceStorageReader"):
        return part_files.read(folder, {name: _rows(t) for name, t in tensors.items()})
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(path=str(folder)))
    except (dcp.CheckpointException, RuntimeError, ValueError, AssertionError, OSError) as error:
        raise UserError(f"{folder} does not fit the model: {_reason(error)}") from None


def _rows(t: Any) -> part_files.Rows:
    """This rank's part of a tensor; with FSDP2 its rows are those of `torch.chunk`."""
    if not is_part(t):
        return part_files.Rows(t, 0, t.shape)
    mesh, rows = t.device_mesh, t.shape[0]
    first = min(rows, -(-rows // mesh.size()) * mesh.get_local_rank())
    return part_files.Rows(local(t), first, t.shape)


def _reason(error: BaseException) -> str:
    """The first line of the first failure; DCP gives one for each rank."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return first_line(error)
