"""Errors that a person can correct, and how an outside error becomes one line."""

from pathlib import Path

DISTRIBUTION = "gpt2-from-scratch"  # the package index has another project under the name gpt2


def install_command(extra: str) -> str:
    """The command that installs the packages of an extra, in a clone or beside a wheel."""
    if (Path(__file__).parent.parent / "pyproject.toml").is_file():
        return f'pip install -e ".[{extra}]"'
    return f'pip install "{DISTRIBUTION}[{extra}]"'


def first_line(error: BaseException, silent: str = "") -> str:
    """The first line of an error's text, at most 200 characters.

    Args:
        error: of any kind.
        silent: the answer for an error without a text; by default the name of its class.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else silent or type(error).__name__


class UserError(ValueError):
    """Input that a person can correct: one line that says what is wrong and what to do."""


class DamagedFile(UserError):
    """A file of a source that cannot be read to its end.

    `name` is the file's name in the manifest; whoever knows the source sets it.
    """

    name = ""
