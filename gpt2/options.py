"""What every table of options is made of: a field with its help text, and errors people correct."""

from dataclasses import field
from typing import Any


class UserError(ValueError):
    """Input that a person can correct: one line, saying what is wrong and what to do."""


class DamagedFile(UserError):
    """A file of a source that cannot be read to its end; `name`: as the manifest calls it."""

    name = ""


def option(default: Any, help: str, choices: tuple[str, ...] = (), alias: str = "") -> Any:
    """A dataclass field with the text, the choices and a second name for the command line."""
    return field(default=default, metadata={"help": help, "choices": choices, "alias": alias})


def at_least(low: int, **values: float):
    """Raises UserError for a value below `low`, naming it."""
    for name, value in values.items():
        if value < low:
            raise UserError(f"{name}={value}: use {low} or more")
