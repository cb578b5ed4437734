"""Tests of the exercises of chapter 6; each takes the function of its name."""

from collections.abc import Callable

import torch
from torch import Tensor


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def adamw_step(function: Callable) -> None:
    """Five steps, equal to PyTorch's."""
    leaf = _random(4, 3).requires_grad_()
    optimizer = torch.optim.AdamW([leaf], lr=0.1, betas=(0.9, 0.95), weight_decay=0.3)
    state = leaf.detach().clone(), torch.zeros(4, 3), torch.zeros(4, 3)
    for t in range(1, 6):
        leaf.grad = _random(t, 4, 3)[0]
        optimizer.step()
        state = function(state, leaf.grad.clone(), t, 0.1, 0.3)
        same = torch.allclose(state[0], leaf.detach(), atol=1e-5)
        assert same, f"step {t} differs from PyTorch's"


def decays(function: Callable) -> None:
    """Matrices and embeddings."""
    for name, shape, expected in (
        ("transformer.wte.weight", (50257, 768), True),
        ("transformer.h.0.attn.c_attn.weight", (2304, 768), True),
        ("transformer.h.0.attn.c_attn.bias", (2304,), False),
        ("transformer.h.0.ln_1.weight", (768,), False),
    ):
        assert function(name, shape) is expected, f"{name}: {expected}"


def learning_rate(function: Callable) -> None:
    """Its corners and its middle."""
    for step, expected in ((0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.55), (110, 0.1)):
        found = function(step, 1.0, 10, 110)
        assert abs(found - expected) < 1e-6, f"step {step} of 110: {expected}, not {found}"


def clip(function: Callable) -> None:
    """Long gradients become shorter, short ones stay."""
    for length, expected in ((1.0, 1.0), (0.01, 0.05)):
        gradients = [torch.tensor([3.0, 0.0]) * length, torch.tensor([[4.0]]) * length]
        found = function([g.clone() for g in gradients], 1.0)
        norm = float(torch.cat([g.flatten() for g in found]).norm())
        assert abs(norm - expected) < 1e-3, f"norm {5 * length}: {expected}, not {norm:.3f}"
        ratio = float(found[1][0, 0] / found[0][0])
        assert abs(ratio - 4 / 3) < 1e-4, "the direction changed"


def accumulate(function: Callable) -> None:
    """Equal to the gradient of everything at once, computed from four pieces."""
    x = _random(8, 3)
    sizes: list[int] = []

    def gradient(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows.square().mean(0)

    found = function(gradient, x, 4)
    assert sizes == [2, 2, 2, 2], f"the pieces had {sizes} rows, not [2, 2, 2, 2]"
    assert torch.allclose(found, x.square().mean(0), atol=1e-6), "the gradient differs"
