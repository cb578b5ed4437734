"""Answers to the exercises of chapter 4."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    return gain * centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() + bias


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / √(mean of x² + eps) over the last dimension."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU, elementwise."""
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def block(
    x: Tensor, norm_1: Callable, attention: Callable, norm_2: Callable, mlp: Callable
) -> Tensor:
    """A block of GPT-2 out of its four parts."""
    x = x + attention(norm_1(x))
    return x + mlp(norm_2(x))


def init_std(name: str, n_layer: int) -> float:
    """The standard deviation with which GPT-2 draws the matrix of a name."""
    return 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj") else 0.02
