"""Exercises of chapter 4. Replace each `raise NotImplementedError`; then `python -m learn.check 4`.

`learn/chapter_4_block.py` explains what is needed. Use neither `F.layer_norm` nor `F.gelu`.
Shapes: `T` positions, `C` channels.
"""

from collections.abc import Callable

from torch import Tensor


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension: (..., C), (C,), (C,) -> (..., C)."""
    raise NotImplementedError


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / √(mean of x² + eps) over the last dimension (Zhang & Sennrich 2019), (..., C)."""
    raise NotImplementedError


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU, elementwise."""
    raise NotImplementedError


def block(
    x: Tensor, norm_1: Callable, attention: Callable, norm_2: Callable, mlp: Callable
) -> Tensor:
    """A block of GPT-2 out of its four parts, each a function (T, C) -> (T, C)."""
    raise NotImplementedError


def init_std(name: str, n_layer: int) -> float:
    """The standard deviation with which GPT-2 draws the matrix of a name.

    `attn.c_proj` and `mlp.c_proj` write into the residual stream; `attn.c_attn`, `mlp.c_fc` and
    `wte` do not.
    """
    raise NotImplementedError
