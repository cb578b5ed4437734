"""Answers to the exercises of chapter 8."""

from collections.abc import Callable

import torch
from torch import Tensor


def logit_lens(stream: Tensor, norm: Callable, wte: Tensor) -> Tensor:
    """(L + 1, T, C) residual streams -> (L + 1, T) the likeliest next token after each layer."""
    return (norm(stream) @ wte.T).argmax(-1)


def induction_score(weights: Tensor, period: int) -> Tensor:
    """(L, H, T, T) attention weights -> (L, H) the mean weight of the induction position."""
    queries = torch.arange(period, weights.shape[-1])
    return weights[:, :, queries, queries - period + 1].mean(-1)


def silence_head(matrix: Tensor, head: int, heads: int) -> Tensor:
    """(C, C) weight of an attention's output layer -> a copy in which a head writes nothing."""
    D = matrix.shape[1] // heads
    silent = matrix.clone()
    silent[:, head * D : (head + 1) * D] = 0
    return silent


def patch(stream_a: Tensor, stream_b: Tensor, position: int) -> Tensor:
    """(T, C): a copy of A's stream with B's at one position."""
    patched = stream_a.clone()
    patched[position] = stream_b[position]
    return patched


def share_of_effect(patched: float, of_a: float, of_b: float) -> float:
    """How far a patched run of A went towards B."""
    return (patched - of_a) / (of_b - of_a)
