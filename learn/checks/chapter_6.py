"""Tests of the exercises of chapter 6; each takes the function of its name."""

from collections.abc import Callable

import torch
from torch import Tensor

from .compare import compare


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _wrong_steps(state: tuple, g: Tensor, t: int, lr: float, decay: float) -> dict[str, Tensor]:
    """What usual mistakes make of the parameters in one step of AdamW."""

    def step(g: Tensor, b1: float = 0.9, b2: float = 0.95, power: float = 0.5) -> Tensor:
        m, v = b1 * state[1] + (1 - b1) * g, b2 * state[2] + (1 - b2) * g**2
        return lr * m / (1 - b1**t) / ((v / (1 - b2**t)) ** power + 1e-8)

    p, right = state[0], step(g)
    m, v = 0.9 * state[1] + 0.1 * g, 0.95 * state[2] + 0.05 * g**2
    plain = lr * m / (v.sqrt() + 1e-8)
    return {
        "m and v are not corrected for their beginning at 0": p - lr * decay * p - plain,
        "m is not corrected for its beginning at 0": p
        - lr * decay * p
        - lr * m / ((v / (1 - 0.95**t)).sqrt() + 1e-8),
        "v is not corrected for its beginning at 0": p
        - lr * decay * p
        - lr * m / (1 - 0.9**t) / (v.sqrt() + 1e-8),
        "the weight decay is part of the gradient, which is Adam with L2": p - step(g + decay * p),
        "the weight decay is missing": p - right,
        "the weight decay is not multiplied by lr": p - decay * p - right,
        "the root of v is missing": p - lr * decay * p - step(g, power=1.0),
        "beta1 and beta2 are exchanged": p - lr * decay * p - step(g, 0.95, 0.9),
        "it goes up the gradient": p - lr * decay * p + right,
    }


def adamw_step(function: Callable) -> None:
    """Five steps, equal to PyTorch's; also with gradients so small that eps matters."""
    for size in (1.0, 1e-4):
        leaf = _random(4, 3).requires_grad_()
        optimizer = torch.optim.AdamW([leaf], lr=0.1, betas=(0.9, 0.95), weight_decay=0.3)
        state = leaf.detach().clone(), torch.zeros(4, 3), torch.zeros(4, 3)
        for t in range(1, 6):
            leaf.grad = size * _random(t, 4, 3)[0]
            optimizer.step()
            state = _compare_step(function, state, leaf, t, optimizer.state[leaf])


def _compare_step(
    function: Callable, state: tuple, leaf: torch.Tensor, t: int, moments: dict
) -> tuple:
    """The reader's (p, m, v) after step t, equal to those of PyTorch."""
    assert leaf.grad is not None
    g, (m, v) = leaf.grad.clone(), state[1:]
    mistakes = _wrong_steps(state, g, t, 0.1, 0.3)
    state = function(state, g.clone(), t, 0.1, 0.3)
    assert isinstance(state, tuple | list), f"the result is {state!r:.60}, not (p, m, v)"
    assert len(state) == 3, f"the result has {len(state)} parts, not the three p, m, v"
    compare(state[0], leaf.detach(), f"in step {t}, p", mistakes)
    exchanged, corrected = "the betas are exchanged", "the correction is for the update alone"
    after = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
    wrong = {exchanged: 0.95 * m + 0.05 * g, corrected: after[0] / (1 - 0.9**t)}
    compare(state[1], moments["exp_avg"], f"in step {t}, m", wrong)
    wrong = {exchanged: 0.9 * v + 0.1 * g**2, corrected: after[1] / (1 - 0.95**t)}
    compare(state[2], moments["exp_avg_sq"], f"in step {t}, v", wrong)
    return tuple(state)


def decays(function: Callable) -> None:
    """Matrices and embeddings."""
    for name, shape, expected in (
        ("transformer.wte.weight", (50257, 768), True),
        ("transformer.h.0.attn.c_attn.weight", (2304, 768), True),
        ("transformer.h.0.attn.c_attn.bias", (2304,), False),
        ("transformer.h.0.ln_1.weight", (768,), False),
    ):
        found = function(name, shape)
        assert found is expected, f"decays({name!r}, {shape}) is {expected}, not {found}"


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
        assert abs(ratio - 4 / 3) < 1e-4, (
            f"the direction changed: 4 to 3 became {3 * ratio:.2f} to 3; is it one factor?"
        )


def accumulate(function: Callable) -> None:
    """Equal to the gradient of everything at once, computed from four pieces."""
    x = _random(8, 3)
    sizes: list[int] = []

    def gradient(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows.square().mean(0)

    found = function(gradient, x, 4)
    assert sizes == [2, 2, 2, 2], f"the pieces had {sizes} rows, not [2, 2, 2, 2]"
    expected = x.square().mean(0)
    mistakes = {
        "the pieces are summed, and each is a mean already": 4 * expected,
        "the pieces are divided by the number of rows": expected / 2,
        "this is the last piece alone": x[6:].square().mean(0),
    }
    compare(found, expected, "the gradient", mistakes, atol=1e-6)
