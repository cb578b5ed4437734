"""Exercises of chapter 3. Replace each `raise NotImplementedError`; then `python -m learn.check 3`.

`learn/chapter_3_attention.py` explains what is needed. Use no function of PyTorch that has
attention in its name. Shapes: `B` batch, `T` positions, `C` channels, `H` heads, `D` = C / H.
"""

from torch import Tensor


def causal_mask(T: int, window: int) -> Tensor:
    """(T, T) bool, True where query t (row) may see key s (column).

    A query sees itself and the `window - 1` positions before it, and nothing later.
    """
    raise NotImplementedError


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, softmax(q kᵀ / √D + M) v; all (..., T, D)."""
    raise NotImplementedError


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, C) -> (B, H, T, D): head h has the channels h D … (h + 1) D - 1."""
    raise NotImplementedError


def join_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, C), the inverse of `split_heads`."""
    raise NotImplementedError


def multi_head(x: Tensor, w_qkv: Tensor, w_out: Tensor, heads: int) -> Tensor:
    """A whole attention layer without biases: (B, T, C) -> (B, T, C).

    `w_qkv` is (C, 3C): queries, keys, values side by side. `w_out` is (C, C).
    """
    raise NotImplementedError
