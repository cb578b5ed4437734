"""Tests of the exercises of chapter 2; each takes the function of its name."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


def bigram_table(function: Callable) -> None:
    """0 is followed by 1 twice and by 2 once."""
    found = function(torch.tensor([0, 1, 0, 1, 0, 2]), 3, 1.0)
    assert tuple(found.shape) == (3, 3), f"the shape is {tuple(found.shape)}, not (3, 3)"
    expected = torch.tensor([[1, 3, 2], [3, 1, 1], [1, 1, 1]]) / torch.tensor([[6], [5], [3]])
    assert torch.allclose(found.sum(1), torch.ones(3)), "rows do not sum to 1"
    assert torch.allclose(found, expected), (
        f"0 1 0 1 0 2 with add=1 gives {expected.tolist()}, not {found.tolist()}"
    )
    found = function(torch.tensor([0, 1, 0, 1]), 2, 0.5)
    expected = torch.tensor([[0.5, 2.5], [1.5, 0.5]]) / torch.tensor([[3.0], [2.0]])
    told = f"0 1 0 1 with add=0.5 gives {expected.tolist()}, not {found.tolist()}"
    assert torch.allclose(found, expected), told


def loss_in_nats(function: Callable) -> None:
    """Of a uniform table, and of one that is not."""
    found = function(torch.full((5, 5), 0.2), torch.tensor([0, 3, 1]))
    assert abs(found - math.log(5)) < 1e-5, f"a uniform guess costs ln 5 = 1.609, not {found}"
    found = function(torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([0, 1, 1, 0]))
    expected = -(math.log(0.5) + math.log(0.1) + math.log(0.9)) / 3
    assert abs(found - expected) < 1e-5, f"another table has {expected:.4f}, not {found}"


def bits_per_byte(function: Callable) -> None:
    """One bit a token and four bytes a token make a quarter."""
    found = function(math.log(2), 100, 400)
    assert abs(found - 0.25) < 1e-9, f"ln 2 nats, 100 tokens, 400 bytes: 0.25, not {found}"


def gradient_of_logits(function: Callable) -> None:
    """Equal to autograd's."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    leaf = logits.clone().requires_grad_()
    F.cross_entropy(leaf[None], torch.tensor([2])).backward()
    found = function(logits.clone(), 2)
    assert abs(float(found.sum())) < 1e-6, "its sum is not 0"
    assert torch.allclose(found, leaf.grad, atol=1e-6), (
        f"autograd has {leaf.grad.tolist()}, not {found.tolist()}"
    )
