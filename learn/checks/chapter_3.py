"""Tests of the exercises of chapter 3; each takes the function of its name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from learn.solutions import chapter_3 as solutions

from .compare import compare


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def causal_mask(function: Callable) -> None:
    """A whole mask and one with a window."""
    found = function(3, 3)
    assert found.dtype == torch.bool, f"its dtype is {found.dtype}, not torch.bool"
    expected = [[True, False, False], [True, True, False], [True, True, True]]
    assert found.tolist() == expected, f"causal_mask(3, 3) is {expected}, not {found.tolist()}"
    rows = zip(function(7, 2).tolist(), solutions.causal_mask(7, 2).tolist(), strict=True)
    for t, (row, right) in enumerate(rows):
        assert row == right, f"causal_mask(7, 2), row {t}, is {right}, not {row}"


def attention(function: Callable) -> None:
    """Equal to PyTorch's, for one head and for a batch of heads."""
    for shape in ((5, 4), (2, 3, 6, 8)):
        q, k, v = _random(3, *shape)
        many = (t if t.ndim > 2 else t[None] for t in (q, k, v))
        expected = F.scaled_dot_product_attention(*many, is_causal=True).view(shape)
        scores = q @ k.mT
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        masked, root = scores.masked_fill(hidden, -torch.inf), shape[-1] ** 0.5
        mistakes = {
            "the scores are not scaled": masked.softmax(-1) @ v,
            "the scores are divided by D, not by its root": (masked / root**2).softmax(-1) @ v,
            "positions see the future": (scores / root).softmax(-1) @ v,
            "what is hidden has the score 0": (masked.masked_fill(hidden, 0) / root).softmax(-1)
            @ v,
            "the softmax is over the queries": (masked / root).softmax(-2) @ v,
        }
        compare(function(q, k, v), expected, f"for q of shape {shape}, the result", mistakes)


def split_heads(function: Callable) -> None:
    """Each head has neighbouring channels."""
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    found = function(x, 4)
    assert tuple(found.shape) == (2, 4, 3, 2), f"the shape is {tuple(found.shape)}"
    assert torch.equal(found[1, 3], x[1, :, 6:8]), "head 3 does not have the channels 6 and 7"


def join_heads(function: Callable) -> None:
    """The inverse."""
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    heads = solutions.split_heads(x, 4)
    mistakes = {"positions and heads are not exchanged first": heads.reshape(x.shape)}
    compare(function(heads), x, "join_heads(split_heads(x))", mistakes)


def multi_head(function: Callable) -> None:
    """Equal to the answer."""
    x, w_qkv, w_out = _random(2, 5, 12), _random(12, 36), _random(12, 12)
    for heads in (1, 3):
        expected = solutions.multi_head(x, w_qkv, w_out, heads)
        compare(function(x, w_qkv, w_out, heads), expected, f"with {heads} heads, the result")
