"""Schedules: learning rate, momentum, batch size and attention window of step n.

Pure functions of the step and the options, except for `set_rates`, which writes to an optimizer.
"""

import math

import torch

from ..config.registry import registered, share_of_peak
from ..config.train import BatchPlan, OptimOptions, warmup_steps, with_floor
from ..errors import UserError

MOMENTUM_BEGINS = 0.85  # of Muon, where it grows (modded-nanogpt)


def learning_rate_at(step: int, options: OptimOptions) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then by `options.schedule`.

    cosine: half a cosine from the peak down to `min_lr_ratio` times the peak at `max_steps` (Brown
    et al. 2020, appendix B; Loshchilov & Hutter 2017).
    wsd (warm-up, stable, decay): constant, then linear down to `min_lr_ratio` times the peak over
    the last `cooldown` of the steps (Hu et al. 2024, arXiv:2404.06395; Hägele et al. 2024).
    """
    options = with_floor(options)
    peak, warmup = options.learning_rate, warmup_steps(options)
    if own := registered("schedule", options.schedule):
        return peak * share_of_peak(own(step, options), step, options.schedule)
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.schedule == "wsd":
        decay = min(options.cooldown * options.max_steps, options.max_steps - warmup)
        share = min(1.0, max(0.0, (options.max_steps - step) / max(1, decay)))
        return peak * (options.min_lr_ratio + (1 - options.min_lr_ratio) * share)
    progress = min(1.0, (step - warmup) / max(1, options.max_steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (options.min_lr_ratio + (1 - options.min_lr_ratio) * cosine)


def momentum_at(step: int, options: OptimOptions) -> float:
    """Muon's momentum: linear from `MOMENTUM_BEGINS` over `muon_momentum_warmup` steps."""
    full, warmup = options.muon_momentum, options.muon_momentum_warmup
    if step >= warmup:
        return full
    return MOMENTUM_BEGINS + step / warmup * (full - MOMENTUM_BEGINS)


def micro_batches_at(step: int, options: OptimOptions, plan: BatchPlan) -> int:
    """Micro-batches per rank of update `step`: batch warm-up grows them by eighths of the plan."""
    return math.ceil(plan.grad_accum_steps * _eighths(step, options.batch_warmup, options) / 8)


def attention_window_at(step: int, options: OptimOptions, full: int) -> int:
    """Attention window at update `step`, in tokens: grows by eighths of `full`."""
    return math.ceil(full * _eighths(step, options.window_warmup, options) / 8)


def _eighths(step: int, share: float, options: OptimOptions) -> int:
    """1, 2, … 7 while the first `share` of the run lasts, then 8."""
    warmup = share * options.max_steps
    return 8 if step >= warmup else 1 + int(7 * step / warmup)


def sequences_left(step: int, options: OptimOptions, plan: BatchPlan) -> int:
    """Sequences that all ranks together train on from update `step` (from 0) to the last."""
    grown = max(step, min(options.max_steps, math.ceil(options.batch_warmup * options.max_steps)))
    micro = sum(micro_batches_at(i, options, plan) for i in range(step, grown))
    micro += (options.max_steps - grown) * plan.grad_accum_steps
    return micro * plan.batch_size * plan.world_size


def check_plan(step: int, options: OptimOptions, plan: BatchPlan) -> None:
    """Raises UserError when batch warm-up is active but a step has a single micro-batch."""
    growing = step < options.batch_warmup * options.max_steps
    if growing and plan.grad_accum_steps == 1:
        raise UserError("batch_warmup: a step has only one micro-batch; use a smaller --batch_size")


def set_rates(optimizer: torch.optim.Optimizer, step: int, options: OptimOptions) -> float:
    """Sets learning rate and momentum of update `step` in every group; returns the base rate.

    A group's rate is the base rate times its `lr_ratio`, or the base rate.
    """
    rate, momentum = learning_rate_at(step, options), momentum_at(step, options)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)
        if "momentum" in group:
            group["momentum"] = momentum
    return rate
