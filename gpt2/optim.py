"""Parameter groups, AdamW, and the schedule as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from .config import OptimOptions, warmup_steps


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Two groups: matrices and embeddings decay, biases and LayerNorm do not."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) in its fused form: one kernel over all parameters."""
    return torch.optim.AdamW(
        parameter_groups(model.parameters(), options.weight_decay),
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=1e-8,
        fused=True,
    )


def learning_rate_at(step: int, options: OptimOptions) -> float:
    """Learning rate of the step-th update (from 0): linear warm-up, then half a cosine.

    The cosine falls from the peak to `min_lr_ratio` of it at `max_steps` (Brown et al. 2020,
    appendix B; Loshchilov & Hutter 2017).
    """
    peak, warmup = options.learning_rate, warmup_steps(options)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, options.max_steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (options.min_lr_ratio + (1 - options.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float):
    """Gives every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
