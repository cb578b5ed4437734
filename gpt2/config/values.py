"""The text of an option's value as a number, a switch or one of its choices, for argparse."""

import argparse
import math

from .model import OLD_SIZES

TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def to_int(text: str) -> int:
    """A whole number, also as 1e6; raises ArgumentTypeError, of which argparse makes a line."""
    try:
        return int(text)
    except ValueError:
        value = _number(text, "whole number")  # 1e6 is a whole number too
        if not math.isfinite(value) or value != int(value):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number") from None
        return int(value)


def to_float(text: str) -> float:
    """A finite number; raises ArgumentTypeError for others."""
    value = _number(text, "number")
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _number(text: str, kind: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid {kind} value: {text!r}") from None


def to_bool(text: str) -> bool:
    """True or False, in the words of `TRUE` and `FALSE`; raises ArgumentTypeError for others."""
    if text.lower() not in TRUE | FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in TRUE


def to_choice(choices: tuple[str, ...], text: str) -> str:
    """The choice that equals the text but for upper and lower case: `true` is `True`, as is `1`."""
    text = OLD_SIZES.get(text, text)
    if "True" in choices and text.lower() in TRUE | FALSE:
        return str(text.lower() in TRUE)
    return next((choice for choice in choices if choice.lower() == text.lower()), text)
