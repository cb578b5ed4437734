"""Errors that a person can correct, and how an outside error becomes one line."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class UserError(ValueError):
    """Input that a person can correct: one line, saying what is wrong and what to do."""


class DamagedFile(UserError):
    """A file of a source that cannot be read to its end; `name`: as the manifest calls it."""

    name = ""
