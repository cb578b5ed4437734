"""Exercises of chapter 7. Replace each `raise NotImplementedError`; then `python -m learn.check 7`.

`learn/chapter_7_speed.py` explains what is needed. Shapes: `N` rows, `T` new positions, `S`
positions so far, `C` channels, `D` head width, `V` vocabulary.
"""

from collections.abc import Iterable

from torch import Tensor


def online_softmax(blocks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """(D,) Σ softmax(scores) · values, from blocks of (scores (n,), values (n, D)).

    Each block may be used once, in its turn; keep a maximum, a sum and a mean, not the blocks.
    """
    raise NotImplementedError


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> float:
    """The mean cross-entropy of hidden weightᵀ; (N, C), (V, C), (N,).

    Never holds more than `rows` · V logits at a time.
    """
    raise NotImplementedError


def attend(q: Tensor, k: Tensor, v: Tensor, cache: dict[str, Tensor]) -> Tensor:
    """Causal attention of T new positions, all (T, D), which come after those of the cache.

    The cache is empty at first. It is to hold "k" and "v", (S, D), the new ones included.
    """
    raise NotImplementedError


def mfu(tokens_per_second: float, parameters: int, layers: int, width: int, T: int) -> float:
    """Model FLOPs utilisation in training, of a device with a peak of 1e15 operations a second."""
    raise NotImplementedError
