"""Errors that a person can correct, and how an outside error becomes one line."""


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
