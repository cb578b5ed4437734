"""FSDP2: weights, gradients and moments cut into one part per rank, put together where needed.

Zhao et al. 2023, "PyTorch FSDP" (arXiv:2304.11277), whose idea is ZeRO's (Rajbhandari et al. 2020,
stage 3). A block's weights are gathered from all ranks before it is computed, forward and backward,
and let go of afterwards; its gradients are summed into the part of each rank. Parameters of such a
model are DTensors: every rank holds some rows of each (`torch.chunk` of dimension 0). Beside
`runtime` the only module that knows torch.distributed; all works on plain tensors as well, so that
callers do not ask what they have.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError, first_line

# The parts of torch.distributed that are used here are imported where they are needed: all other
# runs and commands would wait a second for them.


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype):
    """Moves a `GPT` on the CPU to the devices of all ranks, cut in parts; in place.

    Blocks are units of their own; embeddings and the last norm are one, with the model itself. All
    ranks get rank 0's weights, as DDP does it. A GPU never holds more than its part and one block.

    Args:
        model: equal in shape on all ranks, with plain names, which stay.
        device: of this rank.
        dtype: of the products; weights are gathered in it, gradients summed in float32.
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


def set_gradient_sync(model: nn.Module, on: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks, or only accumulates them."""
    model.set_requires_gradient_sync(on)


def method(model: nn.Module, name: str) -> Callable:
    """A method that is called by itself, past `forward`: gathers weights as `forward` does."""
    if not is_sharded(model):
        return getattr(model, name)
    from torch.distributed.fsdp import register_fsdp_forward_method

    alias = f"gathered_{name}"  # under the own name, `forward` would gather twice
    if not hasattr(model, alias):
        setattr(model, alias, getattr(model, name))
        register_fsdp_forward_method(model, alias)
    return getattr(model, alias)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """() the norm of all gradients, over the parts of all ranks, who must ask together."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def is_part(t) -> bool:
    """Whether this is a tensor of which every rank holds a part, a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """This rank's part, which shares its memory; a plain tensor is whole."""
    return t.to_local() if is_part(t) else t


def whole(t: Tensor) -> Tensor:
    """The tensor with the parts of all ranks, who must ask together."""
    return t.full_tensor() if is_part(t) else t


def as_part_of(part: Tensor, like: Tensor) -> Tensor:
    """A part that was computed from `local(like)`, as a tensor cut like it."""
    if not is_part(like):
        return part
    from torch.distributed.tensor import DTensor

    shape = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, **shape)


def cut(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor, which all ranks hold alike."""
    if not is_part(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    # None: no rank sends anything
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def like(full: Tensor, like: Tensor) -> Tensor:
    """A full tensor, which all ranks hold alike, on the device of another and cut like it."""
    if not is_part(like):
        return full
    return as_part_of(cut(full.to(like.device, like.dtype), like), like)


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state dict; of a model in parts, whole tensors on the CPU, one after the other.

    All ranks must ask together; those that do not `keep` them get an empty one.
    """
    if not is_sharded(model):
        return model.state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor)
        if keep:
            state[name] = full.detach().cpu()
    return state


def write_parts(folder: Path, tensors: dict[str, Tensor]):
    """Writes tensors by Distributed Checkpoint, every rank its parts, all ranks together.

    As safetensors, one file per rank. Its own format is not used: its metadata are a pickle, which
    runs what it is told to when it is read.

    Raises:
        UserError: on all ranks, when one could not write.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except (dcp.CheckpointException, OSError) as error:  # the first is no Exception
        raise UserError(f"checkpoint {folder} not written: {_reason(error)}") from None


def read_parts(folder: Path, tensors: dict[str, Tensor]):
    """Fills tensors with what any number of ranks wrote; each rank reads what it holds.

    The files must have been compared with their hashes; nothing in them is executed.

    Raises:
        UserError: tensors that are not there, or of another shape.
    """
    import torch.distributed.checkpoint as dcp

    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(path=str(folder)))
    except (dcp.CheckpointException, RuntimeError, ValueError, AssertionError, OSError) as error:
        raise UserError(f"{folder} does not fit the model: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """The first line of the first failure; DCP gives one for each rank."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return first_line(error)
