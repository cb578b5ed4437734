"""Tests of the exercises of chapter 5; each takes the function of its name."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .compare import compare


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def count_parameters(function: Callable) -> None:
    """The released sizes, and a small one."""
    for shape, expected in (
        ((12, 768, 50257, 1024), 124_439_808),
        ((48, 1600, 50257, 1024), 1_557_611_200),
        ((1, 2, 3, 5), 94),
    ):
        found = function(*shape)
        assert found == expected, f"count_parameters{shape} is {expected:,}, not {found:,}"


def embed(function: Callable) -> None:
    """The table of positions is longer than the text."""
    ids, wte, wpe = torch.tensor([[3, 1, 3], [0, 2, 1]]), _random(5, 4), _random(9, 4)
    tokens = F.embedding(ids, wte)
    mistakes = {
        "the positions are missing": tokens,
        "the table of positions is asked for the ids": tokens + wpe[ids],
        "the positions begin at 1": tokens + wpe[1:4],
    }
    compare(function(ids, wte, wpe), tokens + wpe[:3], "the embedding", mistakes)


def head(function: Callable) -> None:
    """A linear layer without bias."""
    hidden, wte = _random(2, 3, 4), _random(7, 4)
    expected = F.linear(hidden, wte)
    mistakes = {"these are probabilities, not logits": expected.softmax(-1)}
    compare(function(hidden, wte), expected, "the logits", mistakes)


def next_token_loss(function: Callable) -> None:
    """Perfect knowledge of the next token has no loss, and of the same token a large one."""
    ids = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]])
    knows = 50.0 * F.one_hot(ids.roll(-1, dims=1), 4)
    assert float(function(knows, ids)) < 1e-3, "logits that know the next token have a loss"
    assert float(function(50.0 * F.one_hot(ids, 4), ids)) > 10, "it compares with the same token"
    found = float(function(torch.zeros(2, 4, 4), ids))
    assert abs(found - math.log(4)) < 1e-5, f"equal logits have ln 4 = 1.386, not {found:.3f}"


def first_loss(function: Callable) -> None:
    """GPT-2, and another one."""
    for numbers, expected in (((768, 50257, 0.02), 10.978), ((1600, 1000, 0.05), 8.908)):
        found = function(*numbers)
        assert abs(found - expected) < 1e-3, f"first_loss{numbers} is {expected}, not {found:.3f}"
