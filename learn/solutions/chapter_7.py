"""Answers to the exercises of chapter 7."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def online_softmax(blocks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """(D,) Σ softmax(scores) · values, from blocks of (scores (n,), values (n, D))."""
    largest, total, y = -math.inf, torch.zeros(()), torch.zeros(())
    for scores, values in blocks:
        new = max(largest, float(scores.max()))
        keep, p = math.exp(largest - new), (scores - new).exp()
        largest, total, y = new, keep * total + p.sum(), keep * y + p @ values
    return y / total


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> float:
    """The mean cross-entropy of hidden weightᵀ; (N, C), (V, C), (N,)."""
    total = 0.0
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        total += F.cross_entropy(h @ weight.T, t, reduction="sum").item()
    return total / len(hidden)


def attend(q: Tensor, k: Tensor, v: Tensor, cache: dict[str, Tensor]) -> Tensor:
    """Causal attention of T new positions, all (T, D), which come after those of the cache."""
    cache["k"] = torch.cat([cache["k"], k]) if cache else k
    cache["v"] = torch.cat([cache["v"], v]) if "v" in cache else v
    T, S = len(q), len(cache["k"])
    scores = q @ cache["k"].T / q.shape[1] ** 0.5
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ cache["v"]


def mfu(tokens_per_second: float, parameters: int, layers: int, width: int, T: int) -> float:
    """Model FLOPs utilisation in training."""
    return tokens_per_second * (6 * parameters + 12 * layers * width * T) / 1e15
