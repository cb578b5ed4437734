"""Comparison of a reader's numbers with the right ones: where they differ, and probably why."""

from collections.abc import Mapping

import torch
from torch import Tensor


def compare(
    found: object,
    expected: Tensor,
    what: str,
    mistakes: Mapping[str, Tensor] | None = None,
    atol: float = 1e-5,
) -> None:
    """Passes for equal tensors.

    Args:
        found: what the reader's function gave.
        expected: the right numbers.
        what: name of the result, for the message.
        mistakes: what a usual mistake is -> the numbers that it gives.
        atol: absolute difference that rounding explains.

    Raises:
        AssertionError: expected and found value where they differ most, and the mistake that gives
            the found numbers.
    """
    kind = "None" if found is None else f"a {type(found).__name__}"
    assert isinstance(found, Tensor), f"{what} is {kind}, not a tensor"
    assert found.is_floating_point(), f"{what} has dtype {found.dtype}, not {expected.dtype}"
    found = found.detach().to(expected.dtype)
    shapes = tuple(found.shape), tuple(expected.shape)
    assert shapes[0] == shapes[1], f"{what}: the shape is {shapes[0]}, not {shapes[1]}"
    if torch.allclose(found, expected, atol=atol):
        return
    far = (found - expected).abs().nan_to_num(torch.inf)
    at = tuple(int(i) for i in torch.unravel_index(far.argmax(), far.shape))
    place = f"[{', '.join(map(str, at))}]" if at else ""
    why = next((f"; {why}" for why, n in (mistakes or {}).items() if _equal(found, n, atol)), "")
    raise AssertionError(f"{what}{place} is {expected[at]:.6g}, not {found[at]:.6g}{why}")


def _equal(found: Tensor, wrong: Tensor, atol: float) -> bool:
    return found.shape == wrong.shape and torch.allclose(found, wrong, atol=atol)
