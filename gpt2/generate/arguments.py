"""What Python callers pass to generation: numbers of numpy and tensors, None, wrong types."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import UserError
from ..untrusted.display import shown

WHOLE = {"max_new_tokens", "top_k", "seed"}
NUMBERS = WHOLE | {"temperature", "top_p", "min_p", "repetition_penalty"}
LARGEST = 9 * 10**18  # of a seed; generators take 64 bits, and row i of a batch has seed + i


def plain_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with Python's own numbers in place of numpy's and of tensors of one number.

    Raises:
        UserError: a number is of a wrong type, or a seed too large.
    """
    return {
        name: _number(name, value) if name in NUMBERS else value for name, value in settings.items()
    }


def _number(name: str, given: Any) -> int | float | None:
    try:
        value = given.item() if hasattr(given, "item") else given
    except (RuntimeError, ValueError):  # several numbers
        value = given
    if name == "seed" and value is None:
        return None
    wanted = int if name in WHOLE else int | float
    if isinstance(value, bool) or not isinstance(value, wanted):
        kind = "whole number" if name in WHOLE else "number"
        raise UserError(f"{name}={shown(repr(given))}: use a {kind}")
    if name == "seed" and abs(value) > LARGEST:
        raise UserError(f"seed={value}: use a whole number up to {LARGEST:.0e}")
    return value


@contextmanager
def mode_kept(model: nn.Module) -> Iterator[None]:
    """Modules that are in training mode before the block are so after it, too."""
    training = [module for module in model.modules() if module.training]
    try:
        yield
    finally:
        for module in training:
            module.training = True
