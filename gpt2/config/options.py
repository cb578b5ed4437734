"""Building blocks of all options: a dataclass field with a help text, and checks of values."""

from dataclasses import Field, field, fields, is_dataclass
from typing import Any

from ..errors import UserError
from .registry import with_registered


def option(default: Any, help: str, choices: tuple[str, ...] = (), alias: str = "") -> Any:
    """A dataclass field that is also an option of a command line.

    Args:
        default: value where nothing is given.
        help: text for `--help`.
        choices: the values that are allowed; empty: all of the field's type.
        alias: a second name on the command line and in TOML files.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "alias": alias})


def choices_of(f: Field) -> tuple[str, ...]:
    """The values of an option that are allowed, those of plugins included; empty: all."""
    choices = f.metadata["choices"]
    return with_registered(f.name, choices) if choices else ()


def is_switch(f: Field) -> bool:
    """Whether the bare name of an option means True."""
    return type_of(f) is bool or "True" in f.metadata["choices"]


def type_of(f: Field) -> type:
    """The type of an option. Annotations are no strings in the modules of `config`."""
    assert isinstance(f.type, type), f
    return f.type


def resolve(options: Any, **values: Any) -> None:
    """Replaces defaults such as "auto" in the `__post_init__` of a frozen dataclass.

    A frozen dataclass forbids assignments, and dataclasses themselves set its fields through
    `object.__setattr__`. No one else holds the instance yet.
    """
    for name, value in values.items():
        object.__setattr__(options, name, value)


def flatten(config: Any) -> dict[str, Any]:
    """A (nested) dataclass as one flat dict, under the names of the command line."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat |= flatten(value) if is_dataclass(value) else {f.name: value}
    return flat


def at_least(low: int, **values: float) -> None:
    """Raises UserError for a value below `low`, naming it."""
    for name, value in values.items():
        if value < low:
            raise UserError(f"{name}={value}: use {low} or more")


def at_most(high: int, **values: float) -> None:
    """Raises UserError for a value above `high`, naming it."""
    for name, value in values.items():
        if value > high:
            raise UserError(f"{name}={value}: use {high:,} or less")


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that the random generators do not take."""
    if not 0 <= seed < 2**63 - 2**32:  # room for a number per rank and sample
        raise UserError(f"seed={seed}: use a whole number from 0 to 9e18")
