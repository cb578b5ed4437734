"""Tests of the exercises of chapter 7; each takes the function of its name."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .compare import compare


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
    each = [s.softmax(0) @ v for s, v in blocks()]
    mistakes = {
        "this is the last block alone": each[-1],
        "this is the mean of the blocks' means, and not each weighs the same": sum(each) / 3,
        "this is the sum of the blocks' means": sum(each),
    }
    compare(found, expected, "the mean", mistakes)


def head_loss(function: Callable) -> None:
    """Equal to PyTorch's, with little memory, also if the last chunk is short."""
    hidden, weight, targets = _random(23, 4), _random(300, 4), torch.arange(23)
    with _Largest() as seen:
        found = function(hidden, weight, targets, 5)
    expected = F.cross_entropy(hidden @ weight.T, targets).item()
    chunks = zip(hidden.split(5), targets.split(5), strict=True)
    each = [F.cross_entropy(h @ weight.T, t) for h, t in chunks]
    mistakes = {
        "this is the mean of the chunks' means, and the last chunk is shorter": sum(each) / 5,
        "this is the sum over all tokens, not the mean": 23 * expected,
    }
    assert found is not None, "the result is None, not the loss"
    loss = float(found)
    why = next((f"; {why}" for why, n in mistakes.items() if abs(loss - n) < 1e-4), "")
    assert abs(loss - expected) < 1e-4, f"the loss is {expected:.4f}, not {loss:.4f}{why}"
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
        scores, n = q[part] @ k[: part.stop].T, part.stop - part.start
        later = torch.ones(n, part.stop, dtype=torch.bool).triu(1 + part.start)
        from_0 = torch.ones(n, part.stop, dtype=torch.bool).triu(1)
        right, values = scores.masked_fill(later, -torch.inf), v[: part.stop]
        mistakes = {
            "the scores are not scaled": right.softmax(-1) @ values,
            "positions see the future": (scores / 8**0.5).softmax(-1) @ values,
            "the mask counts the queries from 0, not from the length of the cache": (
                scores.masked_fill(from_0, -torch.inf) / 8**0.5
            ).softmax(-1)
            @ values,
        }
        what = f"for positions {part.start} to {part.stop - 1}, the result"
        compare(found, expected[part], what, mistakes)


def mfu(function: Callable) -> None:
    """GPT-2 (124M) without its position table, at 400,000 tokens a second."""
    found = function(400_000, 123_653_376, 12, 768, 1024)
    assert abs(found - 0.3421) < 1e-3, f"400,000 tokens/s of GPT-2 are 0.342, not {found}"
