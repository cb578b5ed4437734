"""Tests of the exercises of chapter 4; each takes the function of its name."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .compare import compare


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer_norm(function: Callable) -> None:
    """Equal to PyTorch's, also where eps matters."""
    gain, bias = _random(16), _random(16) + 1
    for scale in (5.0, 1e-3):
        x = scale * _random(2, 3, 16) + 2
        expected = F.layer_norm(x, (16,), gain, bias, 1e-5)
        centred, std = x - x.mean(-1, keepdim=True), x.std(-1, keepdim=True, correction=0)
        mistakes = {
            "the variance is a sum, not a mean": centred / (16 * std**2 + 1e-5).sqrt(),
            "the variance is the unbiased one, which divides by C - 1": centred
            / (std**2 * 16 / 15 + 1e-5).sqrt(),
            "eps is outside of the root": centred / (std + 1e-5),
            "there is no eps": centred / std,
            "the root is missing": centred / (std**2 + 1e-5),
            "the mean is not subtracted": x / (std**2 + 1e-5).sqrt(),
        }
        mistakes = {why: gain * wrong + bias for why, wrong in mistakes.items()}
        mistakes["the gain and the bias are missing"] = F.layer_norm(x, (16,), None, None, 1e-5)
        mistakes["the bias is missing"] = expected - bias
        mistakes["it is not over the last dimension alone"] = (
            gain * F.layer_norm(x, x.shape, None, None, 1e-5) + bias
        )
        found = function(x, gain, bias, 1e-5)
        compare(found, expected, f"for x of deviation {scale}, the result", mistakes, atol=1e-4)


def rms_norm(function: Callable) -> None:
    """Equal to PyTorch's, also where eps matters; the mean is not subtracted."""
    for scale in (1.0, 1e-3):
        x = scale * (_random(3, 8) + 2)
        squares = x.square().mean(-1, keepdim=True)
        mistakes = {
            "the squares are summed, not averaged": x / (8 * squares + 1e-6).sqrt(),
            "eps is outside of the root": x / (squares.sqrt() + 1e-6),
            "there is no eps": x / squares.sqrt(),
            "the root is missing": x / (squares + 1e-6),
            "the mean is subtracted, which LayerNorm does": F.layer_norm(x, (8,), eps=1e-6),
            "it is not over the last dimension alone": F.rms_norm(x, x.shape, eps=1e-6),
        }
        expected = F.rms_norm(x, (8,), eps=1e-6)
        compare(function(x, 1e-6), expected, f"for x around {2 * scale}, the result", mistakes)


def gelu(function: Callable) -> None:
    """Equal to PyTorch's tanh form, which differs from the exact one."""
    x = torch.linspace(-4, 4, 101)
    expected = F.gelu(x, approximate="tanh")
    mistakes = {
        "this is the exact form; GPT-2 has the tanh form": F.gelu(x),
        "this is the form with a sigmoid; GPT-2 has the tanh form": x * torch.sigmoid(1.702 * x),
        "it is twice as large": 2 * expected,
        "the cubic term is missing": x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * x)),
        "this is ReLU": x.relu(),
    }
    compare(function(x.clone()), expected, "for 101 numbers from -4 to 4, the result", mistakes)


def block(function: Callable) -> None:
    """With parts that do not commute."""
    x, w = _random(4, 6), _random(6, 6)
    parts = (lambda t: 2 * t, lambda t: t @ w, lambda t: t + 1, torch.tanh)
    after = x + parts[1](parts[0](x))
    norm_1, attention, norm_2, mlp = parts
    mistakes = {
        "nothing is added to the stream": mlp(norm_2(attention(norm_1(x)))),
        "the second half reads x as it was before the first": after + mlp(norm_2(x)),
        "the second half adds to x as it was before the first": x + mlp(norm_2(after)),
        "the MLP is not added to the stream": mlp(norm_2(after)),
        "the norms come behind the sums, as in the Transformer of 2017": norm_2(
            norm_1(x + attention(x)) + mlp(norm_1(x + attention(x)))
        ),
        "the norms come behind their parts": x
        + norm_1(attention(x))
        + norm_2(mlp(x + norm_1(attention(x)))),
        "the norms are missing": x + attention(x) + mlp(x + attention(x)),
    }
    compare(function(x, *parts), after + mlp(norm_2(after)), "the block's result", mistakes)


def init_std(function: Callable) -> None:
    """0.02, and less for what writes into the stream."""
    for name in ("attn.c_attn", "mlp.c_fc", "wte"):
        found = function(name, 12)
        assert abs(found - 0.02) < 1e-9, f"{name} has 0.02, not {found}"
    for name in ("attn.c_proj", "mlp.c_proj"):
        found = function(name, 12)
        mistakes = {
            0.02: "it writes into the stream",
            0.0057735: "how often does a block write into the stream?",
            0.02 / 24: "the root is missing",
        }
        why = next((f"; {why}" for n, why in mistakes.items() if abs(found - n) < 1e-6), "")
        assert abs(found - 0.0040825) < 1e-6, f"{name} of 12 layers has 0.00408, not {found}{why}"
