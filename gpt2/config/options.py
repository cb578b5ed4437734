"""What every table of options is made of: a field with its help text, and errors people correct."""

from dataclasses import field, fields, is_dataclass
from typing import Any

from ..errors import UserError


def option(default: Any, help: str, choices: tuple[str, ...] = (), alias: str = "") -> Any:
    """A dataclass field with the text, the choices and a second name for the command line."""
    return field(default=default, metadata={"help": help, "choices": choices, "alias": alias})


def at_least(low: int, **values: float):
    """Raises UserError for a value below `low`, naming it."""
    for name, value in values.items():
        if value < low:
            raise UserError(f"{name}={value}: use {low} or more")


def flatten(config: Any) -> dict[str, Any]:
    """A (nested) dataclass as one flat dict, under the names of the command line."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat |= flatten(value) if is_dataclass(value) else {f.name: value}
    return flat


def check_seed(seed: int):
    """Raises UserError for a number that the random generators do not take."""
    if not 0 <= seed < 2**63 - 2**32:  # room for a number per rank and sample
        raise UserError(f"seed={seed}: use a whole number from 0 to 9e18")
