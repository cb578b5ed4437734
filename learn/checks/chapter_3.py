"""Tests of the exercises of chapter 3; each takes the function of its name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from learn.solutions import chapter_3 as solutions


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    assert isinstance(found, Tensor), f"{what}: the result is no tensor"
    shapes = tuple(found.shape), tuple(expected.shape)
    assert shapes[0] == shapes[1], f"{what}: the shape is {shapes[0]}, not {shapes[1]}"
    assert torch.allclose(found, expected, atol=1e-5), f"{what}: the numbers differ"


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def causal_mask(function: Callable) -> None:
    """A whole mask and one with a window."""
    found = function(3, 3)
    assert found.dtype == torch.bool, f"its dtype is {found.dtype}, not torch.bool"
    expected = [[True, False, False], [True, True, False], [True, True, True]]
    assert found.tolist() == expected, f"causal_mask(3, 3) is {expected}"
    assert torch.equal(function(7, 2), solutions.causal_mask(7, 2)), "a window of 2 is wrong"


def attention(function: Callable) -> None:
    """Equal to PyTorch's, for one head and for a batch of heads."""
    for shape in ((5, 4), (2, 3, 6, 8)):
        q, k, v = _random(3, *shape)
        many = (t if t.ndim > 2 else t[None] for t in (q, k, v))
        expected = F.scaled_dot_product_attention(*many, is_causal=True).view(shape)
        _same(function(q, k, v), expected, f"shape {shape}")


def split_heads(function: Callable) -> None:
    """Each head has neighbouring channels."""
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    found = function(x, 4)
    assert tuple(found.shape) == (2, 4, 3, 2), f"the shape is {tuple(found.shape)}"
    assert torch.equal(found[1, 3], x[1, :, 6:8]), "head 3 does not have the channels 6 and 7"


def join_heads(function: Callable) -> None:
    """The inverse."""
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    _same(function(solutions.split_heads(x, 4)), x, "join_heads(split_heads(x))")


def multi_head(function: Callable) -> None:
    """Equal to the answer."""
    x, w_qkv, w_out = _random(2, 5, 12), _random(12, 36), _random(12, 12)
    for heads in (1, 3):
        expected = solutions.multi_head(x, w_qkv, w_out, heads)
        _same(function(x, w_qkv, w_out, heads), expected, f"{heads} heads")
