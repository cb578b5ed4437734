"""Tests of the exercises of chapter 8; each takes the function of its name."""

from collections.abc import Callable

import torch
from torch import Tensor

from learn.solutions import chapter_8 as solutions

from .compare import compare


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _norm(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) + torch.arange(x.shape[-1])


def logit_lens(function: Callable) -> None:
    """The norm matters."""
    stream, wte = _random(3, 5, 4), _random(7, 4)
    found = function(stream, _norm, wte)
    assert tuple(found.shape) == (3, 5), f"the shape is {tuple(found.shape)}, not (3, 5)"
    expected = solutions.logit_lens(stream, _norm, wte)
    without = (stream @ wte.T).argmax(-1)
    why = "the norm is not applied" if torch.equal(found, without) else "is the norm applied?"
    assert torch.equal(found, expected), f"{expected.tolist()}, not {found.tolist()}; {why}"


def induction_score(function: Callable) -> None:
    """A head that is one, a head that looks at the equal token itself, and a random one."""
    T, period = 9, 4
    weights = torch.zeros(1, 3, T, T)
    for t in range(T):
        weights[0, 0, t, max(0, t - period + 1)] = 1
        weights[0, 1, t, max(0, t - period)] = 1
    weights[0, 2] = _random(T, T).masked_fill(torch.ones(T, T).triu(1) > 0, -1e9).softmax(-1)
    found = function(weights, period)
    assert tuple(found.shape) == (1, 3), f"the shape is {tuple(found.shape)}, not (1, 3)"
    assert found[0, 0] == 1, f"an induction head has the score 1, not {found[0, 0]:.2f}"
    assert found[0, 1] == 0, "a head that looks at the equal token, not behind it, has the score 0"
    expected = solutions.induction_score(weights, period)
    compare(found, expected, "the score of an induction head, of another and a random one, at")


def silence_head(function: Callable) -> None:
    """Only one head is silent, and the matrix itself is not changed."""
    matrix, x = _random(6, 6), _random(2, 6)
    before = matrix.clone()
    found = function(matrix, 1, 3)
    assert torch.equal(matrix, before), "the matrix itself was changed"
    x_without = x.clone()
    x_without[:, 2:4] = 0
    wrong = {f"head {n} is silent": torch.cat((x[:, : 2 * n], 0 * x[:, 2 * n : 2 * n + 2],
             x[:, 2 * n + 2 :]), 1) @ matrix.T for n in (0, 2)}  # fmt: skip
    compare(x @ found.T, x_without @ matrix.T, "without head 1, the output", wrong)


def patch(function: Callable) -> None:
    """One position, in a copy."""
    a, b = _random(5, 3), _random(3, 5).T
    before = a.clone()
    found = function(a, b, 2)
    assert torch.equal(a, before), "A's stream itself was changed"
    assert torch.equal(found[2], b[2]), "position 2 is not B's"
    assert torch.equal(found[[0, 1, 3, 4]], a[[0, 1, 3, 4]]), "another position changed"


def share_of_effect(function: Callable) -> None:
    """Nothing, all, a half, and the wrong way."""
    for patched, expected in ((-2.0, 0.0), (6.0, 1.0), (2.0, 0.5), (-6.0, -0.5)):
        found = function(patched, -2.0, 6.0)
        assert abs(found - expected) < 1e-9, (
            f"{patched} between -2 and 6 is {expected}, not {found}"
        )
