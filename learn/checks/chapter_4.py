"""Tests of the exercises of chapter 4; each takes the function of its name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer_norm(function: Callable) -> None:
    """Equal to PyTorch's, also where eps matters."""
    gain, bias = _random(16), _random(16) + 1
    for scale in (5.0, 1e-3):
        x = scale * _random(2, 3, 16) + 2
        found = function(x, gain, bias, 1e-5)
        assert found.shape == x.shape, f"the shape is {tuple(found.shape)}, not {tuple(x.shape)}"
        expected = F.layer_norm(x, (16,), gain, bias, 1e-5)
        assert torch.allclose(found, expected, atol=1e-4), f"x of deviation {scale} is wrong"


def rms_norm(function: Callable) -> None:
    """Equal to PyTorch's; the mean is not subtracted."""
    x = _random(3, 8) + 2
    assert torch.allclose(function(x, 1e-6), F.rms_norm(x, (8,), eps=1e-6), atol=1e-5), "wrong"


def gelu(function: Callable) -> None:
    """Equal to PyTorch's tanh form, which differs from the exact one."""
    x = torch.linspace(-4, 4, 101)
    found = function(x)
    wrong = (found - F.gelu(x, approximate="tanh")).abs().max()
    exact = torch.allclose(found, F.gelu(x), atol=1e-6)
    assert not exact, "this is the exact form; GPT-2 has the tanh form"
    assert wrong < 1e-5, f"it differs by up to {wrong:.3f}"


def block(function: Callable) -> None:
    """With parts that do not commute."""
    x, w = _random(4, 6), _random(6, 6)
    parts = (lambda t: 2 * t, lambda t: t @ w, lambda t: t + 1, torch.tanh)
    after = x + parts[1](parts[0](x))
    expected = after + parts[3](parts[2](after))
    assert torch.allclose(function(x, *parts), expected, atol=1e-5), (
        "the parts are put together wrongly"
    )


def init_std(function: Callable) -> None:
    """0.02, and less for what writes into the stream."""
    for name in ("attn.c_attn", "mlp.c_fc", "wte"):
        assert abs(function(name, 12) - 0.02) < 1e-9, f"{name} has 0.02"
    for name in ("attn.c_proj", "mlp.c_proj"):
        found = function(name, 12)
        assert abs(found - 0.0040825) < 1e-6, f"{name} of 12 layers has 0.00408, not {found}"
