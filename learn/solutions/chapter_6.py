"""Answers to the exercises of chapter 6."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor, Tensor]


def adamw_step(state: Moments, g: Tensor, t: int, lr: float, decay: float) -> Moments:
    """(p, m, v) after step t with gradient g."""
    p, m, v = state
    m = 0.9 * m + 0.1 * g
    v = 0.95 * v + 0.05 * g**2
    update = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    return p - lr * decay * p - lr * update, m, v


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies to a parameter of this name and shape."""
    return len(shape) >= 2


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """The rate of a step (from 0)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def clip(gradients: list[Tensor], limit: float) -> list[Tensor]:
    """The gradients, scaled so that their common norm is at most `limit`."""
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return [g * min(1.0, limit / float(norm)) for g in gradients]


def accumulate(gradient: Callable, x: Tensor, pieces: int) -> Tensor:
    """The gradient of the mean loss of all rows of x, from equal pieces of it."""
    return torch.stack([gradient(rows) for rows in x.chunk(pieces)]).mean(0)
