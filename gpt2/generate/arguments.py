"""What Python callers pass to generation: numbers of numpy and tensors, None, wrong types."""

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..untrusted.display import shown

WHOLE = {"max_new_tokens", "top_k", "seed"}
NUMBERS = WHOLE | {"temperature", "top_p", "min_p", "repetition_penalty"}
LARGEST = 9 * 10**18  # generators take 64 bits, and row i of a batch has seed + i
HUGE = 10**100  # beyond every setting; a larger whole number may be no float at all


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
    if isinstance(value, bool) or not isinstance(value, wanted) or abs(value) > HUGE:
        kind = "whole number" if name in WHOLE else "number"
        raise UserError(f"{name}={shown(repr(given))}: use a {kind}")
    if name in WHOLE and abs(value) > LARGEST:
        raise UserError(f"{name}={value}: use a whole number up to {LARGEST:.0e}")
    return value
