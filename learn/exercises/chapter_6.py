"""Exercises of chapter 6. Replace each `raise NotImplementedError`; then `python -m learn.check 6`.

`learn/chapter_6_training.py` explains what is needed. Use nothing of `torch.optim`, and not
`clip_grad_norm_`.
"""

from collections.abc import Callable

from torch import Tensor

Moments = tuple[Tensor, Tensor, Tensor]


def adamw_step(state: Moments, g: Tensor, t: int, lr: float, decay: float) -> Moments:
    """(p, m, v) after step t = 1, 2, … with gradient g, from (p, m, v) before it.

    beta1 is 0.9, beta2 is 0.95, eps is 1e-8.
    """
    raise NotImplementedError


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies to a parameter of this name and shape."""
    raise NotImplementedError


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """The rate of a step (from 0): linear warm-up, which ends at the peak in step warmup - 1.

    Then half a cosine: the peak at step `warmup`, a tenth of it at step `steps`.
    """
    raise NotImplementedError


def clip(gradients: list[Tensor], limit: float) -> list[Tensor]:
    """The gradients, scaled by one factor so that their common norm is at most `limit`."""
    raise NotImplementedError


def accumulate(gradient: Callable, x: Tensor, pieces: int) -> Tensor:
    """The gradient of the mean loss of all rows of x, from equal pieces of it.

    `gradient(rows)` is the gradient of the mean loss of some rows.
    """
    raise NotImplementedError
