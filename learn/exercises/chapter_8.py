"""Exercises of chapter 8. Replace each `raise NotImplementedError`; then `python -m learn.check 8`.

`learn/chapter_8_inside.py` explains what is needed. Shapes: `T` positions, `C` channels, `L`
layers, `H` heads, `D` = C / H, `V` vocabulary.
"""

from collections.abc import Callable

from torch import Tensor


def logit_lens(stream: Tensor, norm: Callable, wte: Tensor) -> Tensor:
    """(L + 1, T, C) residual streams -> (L + 1, T) the likeliest next token after each layer.

    `norm` is the last LayerNorm; the head is the token embedding `wte`, (V, C).
    """
    raise NotImplementedError


def induction_score(weights: Tensor, period: int) -> Tensor:
    """(L, H, T, T) attention weights -> (L, H) the mean weight of the induction position.

    The text repeats after `period` tokens. Count the queries of the second round, from position
    `period` on: where does an induction head look?
    """
    raise NotImplementedError


def silence_head(matrix: Tensor, head: int, heads: int) -> Tensor:
    """(C, C) weight of an attention's output layer -> a copy in which a head writes nothing.

    As in PyTorch's `nn.Linear`, the output is x matrixᵀ, and x has the heads side by side.
    """
    raise NotImplementedError


def patch(stream_a: Tensor, stream_b: Tensor, position: int) -> Tensor:
    """(T, C): a copy of A's stream with B's at one position."""
    raise NotImplementedError


def share_of_effect(patched: float, of_a: float, of_b: float) -> float:
    """How far a patched run of A went towards B: 0 if it stayed at A's number, 1 if at B's."""
    raise NotImplementedError
