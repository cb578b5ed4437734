"""Answers to the exercises of chapter 3."""

import torch
from torch import Tensor


def causal_mask(T: int, window: int) -> Tensor:
    """(T, T) bool, True where query t (row) may see key s (column)."""
    back = torch.arange(T)[:, None] - torch.arange(T)  # how far key s lies behind query t
    return (back >= 0) & (back < window)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; all (..., T, D)."""
    T, D = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / D**0.5
    return scores.masked_fill(~causal_mask(T, T), float("-inf")).softmax(-1) @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, C) -> (B, H, T, D)."""
    B, T, C = x.shape
    return x.view(B, T, heads, C // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, C)."""
    return x.transpose(1, 2).flatten(2)


def multi_head(x: Tensor, w_qkv: Tensor, w_out: Tensor, heads: int) -> Tensor:
    """A whole attention layer without biases: (B, T, C) -> (B, T, C)."""
    q, k, v = (split_heads(part, heads) for part in (x @ w_qkv).chunk(3, dim=-1))
    return join_heads(attention(q, k, v)) @ w_out
