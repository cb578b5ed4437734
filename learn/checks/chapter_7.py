"""Tests of the exercises of chapter 7; each takes the function of its name."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class _Largest(TorchDispatchMode):
    """Notes how many numbers the largest result of an operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor) and one.numel() > self.numbers:
                self.numbers = one.numel()
        return out


def online_softmax(function: Callable) -> None:
    """Scores so large that their exponentials overflow, and blocks that come once."""
    scores, values = 200 * _random(12), _random(12, 3)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(scores.split(5), values.split(5), strict=True)

    found, expected = function(blocks()), scores.softmax(0) @ values
    assert torch.isfinite(found).all(), "it overflows: subtract the largest score so far"
    assert torch.allclose(found, expected, atol=1e-5), "the mean differs"


def head_loss(function: Callable) -> None:
    """Equal to PyTorch's, with little memory, also if the last chunk is short."""
    hidden, weight, targets = _random(23, 4), _random(300, 4), torch.arange(23)
    with _Largest() as seen:
        found = function(hidden, weight, targets, 5)
    expected = F.cross_entropy(hidden @ weight.T, targets).item()
    assert abs(float(found) - expected) < 1e-4, f"the loss is {expected:.4f}, not {found}"
    assert seen.numbers <= 5 * 300, f"it held {seen.numbers} numbers at once, not {5 * 300}"


def attend(function: Callable) -> None:
    """A prompt of four, then one, then two."""
    q, k, v = _random(3, 7, 8)
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    cache: dict[str, Tensor] = {}
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        found = function(q[part], k[part], v[part], cache)
        assert set(cache) == {"k", "v"}, "the cache does not hold k and v"
        assert len(cache["k"]) == part.stop, f"the cache holds {len(cache['k'])} positions"
        assert torch.allclose(found, expected[part], atol=1e-5), f"positions {part} differ"


def mfu(function: Callable) -> None:
    """GPT-2 (124M) without its position table, at 400,000 tokens a second."""
    found = function(400_000, 123_653_376, 12, 768, 1024)
    assert abs(found - 0.3421) < 1e-3, f"400,000 tokens/s of GPT-2 are 0.342, not {found}"
