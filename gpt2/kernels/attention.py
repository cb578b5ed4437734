"""Causal attention, with and without a cache, by `scaled_dot_product_attention`.

Shapes: `B` batch, `H` heads, `T` new positions, `S` positions so far, `D` head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import HAS_TRITON


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D) v, in which no query sees a later key (Vaswani et al. 2017, eq. 1).

    Args:
        q: (B, H, T, D), the last T of S positions.
        k: (B, H, S, D) with S ≥ T; S > T when the first S - T positions come from a cache.
        v: (B, H, S, D).
        dropout: probability of dropping an attention weight.
    """
    new, total = q.shape[-2], k.shape[-2]
    if new == total:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if new == 1:  # the last position sees everything
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    visible = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)


def cached_attention(  # noqa: PLR0917 - what attention has
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, end: int
) -> Tensor:
    """Attention of new positions over a KV cache whose rows differ in length.

    Stores the new keys and values in the cache. Reads nothing back from the device, so a CUDA graph
    can capture it.

    Args:
        q: (B, H, T, D), queries of the T new positions of every row; so k and v.
        k: (B, H, T, D).
        v: (B, H, T, D).
        keys: (B, H, S_max, D), changed in place.
        values: (B, H, S_max, D), changed in place.
        lengths: (B,) int64, positions of each row before the new ones.
        end: S, the longest row with its new positions; the Triton kernel does not use it.
    """
    T = q.shape[2]
    if q.is_cuda and T == 1 and HAS_TRITON and q.dtype != torch.float64:
        from .triton_decoding import cached_attention_

        return cached_attention_(q, k, v, keys, values, lengths)
    at = lengths[:, None] + torch.arange(T, device=q.device)  # (B, T)
    rows = torch.arange(len(q), device=q.device)[:, None]
    keys[rows, :, at], values[rows, :, at] = k.transpose(1, 2), v.transpose(1, 2)
    visible = torch.arange(end, device=q.device) <= at[:, None, :, None]  # (B, 1, T, S)
    keys, values = keys[:, :, :end], values[:, :, :end]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`causal_attention` by the formula, for tests."""
    new, total = q.shape[-2], k.shape[-2]
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    visible = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v
