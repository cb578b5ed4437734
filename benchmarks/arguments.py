"""Numbers on the command lines of benchmarks.

argparse turns the `ArgumentTypeError` of a type into one line and exit code 2.
"""

import argparse
import math


def whole(text: str, least: int = 0) -> int:
    """A whole number, 0 or more."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is too few; use {least} or more")
    return number


def count(text: str) -> int:
    """A whole number, 1 or more."""
    return whole(text, least=1)


def counts(text: str) -> list[int]:
    """Whole numbers, 1 or more each, with commas between them."""
    return [count(part) for part in text.split(",")]


def counts_as_text(text: str) -> str:
    """The text of `counts`, which another process is given."""
    return ",".join(map(str, counts(text)))


def amount(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return number
