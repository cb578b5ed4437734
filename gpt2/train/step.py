"""One optimizer step over all micro-batches of all ranks, forward and backward included."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.model import IGNORE
from ..config.train import TrainConfig
from ..data.loader import Batch
from ..distributed import fsdp
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..model.packed_documents import Packed, packed
from ..report import console
from .optimizer import clip_gradients
from .schedules import attention_window_at, micro_batches_at, set_rates
from .state import TrainState


def begin_step(state: TrainState, config: TrainConfig) -> int:
    """Grows the windows while `window_warmup` lasts; the micro-batches of the step."""
    if config.optim.window_warmup:
        state.model.limit_attention_window(
            attention_window_at(state.step, config.optim, state.plan.block_size)
        )
    return micro_batches_at(state.step, config.optim, state.plan)


@dataclass
class Launched:
    """A step that the device may still be working on."""

    step: int
    lr: float
    tokens: int  # trained on so far, this step included
    own_tokens: int  # of this step
    read: Callable[[], list[float]]  # waits; mean loss in nats, norm of the gradient, stops


def train_step(state: TrainState, config: TrainConfig, rt: Runtime) -> Launched:
    """One optimizer step over all micro-batches of all ranks; does not wait for the device.

    The loss is the sum over the step's valid tokens divided by their number over all ranks, so its
    gradient does not depend on how the step is cut into micro-batches and ranks.
    """
    lr = set_rates(state.optimizer, state.step, config.optim)
    before = state.tokens
    batches = next_batches(state, rt, begin_step(state, config))
    valid_tokens = rt.all_sum(sum((y != IGNORE).sum() for _, y, *_ in batches))
    loss_sum = torch.zeros((), device=rt.device)
    # DDP and FSDP take the mean over ranks of what should be a sum
    factor = state.scaler.scale(rt.world_size / valid_tokens)
    for micro, (x, y, *begins) in enumerate(batches):
        inside = packed(*begins, dropout=config.model.dropout)
        with rt.accumulate(state.forward, last=micro == len(batches) - 1):
            loss_sum += state.micro_batches(x, y, factor, inside, first=micro == 0)  # nats
    state.scaler.unscale_(state.optimizer)
    grad_norm = fsdp.gradient_norm(state.model.parameters())
    if config.optim.grad_clip:
        inside = rt.device.type == "cuda" and not state.scaler.is_enabled()
        clip_gradients(state.optimizer, grad_norm, config.optim.grad_clip, inside)
    # one message for all that ranks must agree on, copied while the weights change
    parts = [loss_sum / valid_tokens, grad_norm / rt.world_size, rt.stop_flag()]
    parts = rt.all_sum(torch.stack(parts))
    read = rt.read_later(parts)
    _update(state, skip=~parts[:2].isfinite().all())
    state.step += 1
    return Launched(state.step, lr, state.tokens, state.tokens - before, read)


def next_batches(state: TrainState, rt: Runtime, count: int) -> list[Batch]:
    """The step's micro-batches; a damaged shard is named by the rank that meets it."""
    try:
        return state.loader.next_step(count)
    except UserError as error:
        if not rt.is_main:  # rank 0's errors are told by the command line
            console.error(f"[rank {rt.rank}] {error}")
        raise


def _update(state: TrainState, skip: Tensor):
    """Changes the weights, unless `skip` (on the device): the gradient holds NaN or infinity."""
    if not state.scaler.is_enabled():  # the scaler skips by itself, and lowers its scale
        state.optimizer.found_inf = skip.float()  # what fused optimizers look at, without a wait
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)


def forward_backward(  # noqa: PLR0917 - the last four are `micro_batch.Run`'s
    state: TrainState, rt: Runtime, x: Tensor, y: Tensor, factor: Tensor, inside: Packed | None
) -> Tensor:
    """The loss of a micro-batch, summed over its tokens; the gradient of its `factor`-fold."""
    with rt.autocast():
        loss = state.forward(x, y, reduction="sum", cache=inside)
    (loss * factor).backward()
    return loss.detach()
