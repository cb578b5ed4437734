"""One optimizer step, from its micro-batches to the new weights.

`train_step` reads from top to bottom: rates, batches, forward and backward of each micro-batch, the
norm of the gradient, the update. It does not wait for a GPU: the loss is read when the next step is
under way (`loop.py`).
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.model import IGNORE
from ..config.train import TrainConfig
from ..data.loader import Batch
from ..distributed import fsdp
from ..distributed.device_copy import DeviceCopy
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..model.packed_documents import Packed
from ..report import console
from . import sampled_loss, second_token
from .optimizer import clip_gradients
from .optimizer_state import supports_found_inf
from .schedules import attention_window_at, micro_batches_at, set_rates
from .state import TrainState
from .weight_average import update_average


@dataclass
class Launched:
    """A step that the GPU may still be computing."""

    step: int  # number of the step, from 1
    lr: float
    tokens: int  # trained on so far by all ranks, this step included
    own_tokens: int  # of this step alone
    numbers: DeviceCopy  # mean loss in nats, gradient norm, ranks that stop, or have no time left

    def read(self) -> list[float]:
        """The numbers; waits until the device has computed this step."""
        return self.numbers.read()


def train_step(state: TrainState, config: TrainConfig, rt: Runtime) -> Launched:
    """One optimizer step over all micro-batches of all ranks; does not wait for the device.

    The loss is the sum over the step's valid tokens divided by their number over all ranks. The
    gradient therefore does not depend on how the step is cut into micro-batches and ranks.

    Raises:
        UserError: a damaged shard.
    """
    lr = set_rates(state.optimizer, state.step, config.optim)
    if config.optim.window_warmup:
        context = state.plan.block_size
        state.model.limit_attention_window(attention_window_at(state.step, config.optim, context))
    if state.model.sampled_ids is not None:
        sampled_loss.choose(state, state.model.sampled_ids, config.optim)
    if state.model.second_share is not None:
        state.model.second_share.fill_(second_token.share_at(state.step, config.optim))
    tokens_before = state.tokens
    batches = next_batches(state, rt, micro_batches_at(state.step, config.optim, state.plan))

    counts = [(y != IGNORE).sum() for _, y, *_ in batches]
    valid_tokens = rt.all_sum(sum(counts[1:], start=counts[0]))
    # DDP and FSDP average gradients over ranks; the world size turns that into a sum.
    factor = state.scaler.scale(rt.world_size / valid_tokens)
    loss_sum = torch.zeros((), device=rt.device)
    for micro, batch in enumerate(state.progress.micro_batches(batches, state.step + 1)):
        with rt.gradient_sync(state.wrapped_model, last=micro == len(batches) - 1):
            loss_sum += micro_batch(state, config, rt, batch, factor, first=micro == 0)
    rt.average_gradients(state.wrapped_model)

    state.scaler.unscale_(state.optimizer)
    grad_norm = fsdp.gradient_norm(state.model.parameters())
    if config.optim.grad_clip:
        in_optimizer = rt.device.type == "cuda" and not state.scaler.is_enabled()
        in_optimizer = in_optimizer and supports_found_inf(state.optimizer)
        clip_gradients(state.optimizer, grad_norm, config.optim.grad_clip, in_optimizer)
    # One all-reduce for all that ranks must agree on; its copy to the CPU overlaps the update.
    no_time = rt.flag(state.clock.next_is_last(config.optim.max_seconds))
    own = [loss_sum / valid_tokens, grad_norm / rt.world_size, rt.stop_flag(), no_time]
    agreed = rt.all_sum(torch.stack(own))
    numbers = DeviceCopy(agreed)
    _update(state, skip=~agreed[:2].isfinite().all())
    state.step += 1
    update_average(state.optimizer, state.step, config.optim.ema_steps)
    return Launched(state.step, lr, state.tokens, state.tokens - tokens_before, numbers)


def micro_batch(  # noqa: PLR0917
    state: TrainState, config: TrainConfig, rt: Runtime, batch: Batch, factor: Tensor, first: bool
) -> Tensor:
    """Forward and backward of one micro-batch, by a CUDA graph where there is one.

    Args:
        state: of the run; gradients add up in its model's parameters.
        config: its settings.
        rt: this process.
        batch: inputs and targets (B, T); for conversations also where each document begins.
        factor: () the loss is multiplied by it before backward.
        first: whether it is the first of the step.

    Returns:
        () the loss in nats, summed over the valid tokens.
    """
    x, y, *begins = batch
    if begins:  # the mask of the documents is another tensor each time: no graph can hold it
        documents = Packed(begins[0], config.model.dropout)
        return forward_backward(state, rt, x, y, factor, documents)
    return state.graph(functools.partial(forward_backward, state, rt), (x, y, factor), first)


def forward_backward(  # noqa: PLR0917
    state: TrainState,
    rt: Runtime,
    x: Tensor,
    y: Tensor,
    factor: Tensor,
    documents: Packed | None = None,
) -> Tensor:
    """Forward and backward of (B, T) ids: back-propagates loss × factor.

    Returns:
        () the loss in nats, summed over the valid tokens.
    """
    with rt.autocast():
        loss = state.wrapped_model(x, y, reduction="sum", cache=documents)
    (loss * factor).backward()
    return loss.detach()


def next_batches(state: TrainState, rt: Runtime, count: int) -> list[Batch]:
    """The step's micro-batches; a damaged shard is named by the rank that meets it."""
    try:
        return state.loader.next_step(count)
    except UserError as error:
        if not rt.is_main:  # the command line prints the error of rank 0
            console.error(f"[rank {rt.rank}] {error}")
        raise


def _update(state: TrainState, skip: Tensor) -> None:
    """Updates the weights, unless `skip`: the loss or the gradient norm is NaN or infinite.

    `skip` is a () bool on the device. Fused optimizers read it there as `found_inf`, so the skip
    needs no synchronisation.
    """
    if not state.scaler.is_enabled():  # an enabled scaler skips by itself, and lowers its scale
        if supports_found_inf(state.optimizer):
            state.optimizer.found_inf = skip.float()  # type: ignore[attr-defined] # of GradScaler
        elif skip:  # of a plugin: this waits for the device
            state.optimizer.zero_grad(set_to_none=True)
            return
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
