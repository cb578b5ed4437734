"""FSDP2: weights, gradients and moments cut into one part per rank, put together where needed.

Zhao et al. 2023, "PyTorch FSDP" (arXiv:2304.11277), whose idea is ZeRO's (Rajbhandari et al. 2020,
stage 3). A block's weights are gathered from all ranks before it is computed, forward and backward,
and let go of afterwards; its gradients are summed into the part of each rank. Parameters of such a
model are DTensors: every rank holds some rows of each (`torch.chunk` of dimension 0). Beside
`runtime` the only module that knows torch.distributed; all works on plain tensors as well, so that
callers do not ask what they have.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype):
    """Moves a `GPT` on the CPU to the devices of all ranks, cut in parts; in place.

    Blocks are units of their own; embeddings and the last norm are one, with the model itself. All
    ranks get rank 0's weights, as DDP does it. A GPU never holds more than its part and one block.

    Args:
        model: equal in shape on all ranks, with plain names, which stay.
        device: of this rank.
        dtype: of the products; weights are gathered in it, gradients summed in float32.
    """
    low = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in (*model.transformer.h, model):
        for p in unit.parameters():
            if not isinstance(p, DTensor):
                p.data = p.data.to(device)
                dist.broadcast(p.data, 0)
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has cut this model."""
    return isinstance(model, FSDPModule)


def send_gradients(model: nn.Module, now: bool):
    """Whether the next backward pass sums gradients over ranks, or adds to what is not sent yet."""
    model.set_requires_gradient_sync(now)


def method(model: nn.Module, name: str) -> Callable:
    """A method that is called by itself, past `forward`: gathers weights as `forward` does."""
    if not is_sharded(model):
        return getattr(model, name)
    alias = f"gathered_{name}"  # under the own name, `forward` would gather twice
    if not hasattr(model, alias):
        setattr(model, alias, getattr(model, name))
        register_fsdp_forward_method(model, alias)
    return getattr(model, alias)


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scales gradients so that their norm over all ranks is `limit` at most; () the norm before."""
    parameters = [p for p in parameters if p.grad is not None]
    if not any(isinstance(p, DTensor) for p in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters]))
    if math.isfinite(limit):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def local(t: Tensor) -> Tensor:
    """This rank's part, which shares its memory; a plain tensor is whole."""
    return t.to_local() if isinstance(t, DTensor) else t


def whole(t: Tensor) -> Tensor:
    """The tensor with the parts of all ranks, who must ask together."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def as_part_of(part: Tensor, like: Tensor) -> Tensor:
    """A part that was computed from `local(like)`, as a tensor cut like it."""
    if not isinstance(like, DTensor):
        return part
    shape = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, **shape)


def cut(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor, which all ranks hold alike."""
    if not isinstance(like, DTensor):
        return full
    # None: no rank sends anything
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()
