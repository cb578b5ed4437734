"""JSON and TOML from outside the project. No other module parses them.

JSON and TOML of strangers can be too large, too deep, or of another shape than expected.
`load_json` and `load_toml` then raise a UserError that names the file. The limits bound the memory
before anything is parsed: an empty list takes 3 bytes in JSON and 64 in Python.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from .display import shown

MAX_FILE_BYTES = 2**24  # of a JSON or TOML file; the manifest of 40,000 shards is smaller
MAX_VALUES = 500_000  # numbers, strings, lists and objects of a JSON text
MAX_DIGITS = 300  # of a number in JSON, so that `float` takes it
MAX_BITS = 1000  # of a number in TOML, as many
KINDS: dict[type, str] = {dict: "object", list: "list"}
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
# Python keeps the bytes of a file name that are not UTF-8 as lone surrogates. A setting that names
# such a file is written and read with these surrogates.
SURROGATES = "surrogatepass"


def to_json(value: Any, *, indent: int | None = None, allow_nan: bool = True) -> bytes:
    """JSON in UTF-8, of which a lone surrogate is JSON's escape: UTF-8 has no bytes for it."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=allow_nan)
    return text.encode(errors="backslashreplace")


def read_bytes(
    path: Path, advice: str = "", limit: int = MAX_FILE_BYTES, asked_by: str = ""
) -> bytes:
    """The bytes of a small file.

    Args:
        path: the file.
        advice: how to go on, for the error message.
        limit: most bytes.
        asked_by: begins the message about a file that cannot be read, instead of the path.

    Raises:
        UserError: the file is missing, unreadable, or larger than `limit`.
    """
    try:
        if not path.is_file() and path.exists():  # reading a FIFO would wait for ever
            raise UserError(_because(f"{asked_by or path}:", "not a file", advice))
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(_because(f"{asked_by or path}:", str(reason), advice)) from None
    if len(data) > limit:
        raise UserError(_because(path, f"is larger than {limit:,} bytes", advice))
    return data


def read_json(path: Path, kind: type = dict, advice: str = "") -> Any:
    """The value of a JSON file in UTF-8, which must be of this kind.

    Raises:
        UserError: the file is missing, too large, or not JSON of this kind.
    """
    return load_json(read_bytes(path, advice), path, kind, advice)


def load_json(
    data: bytes, where: object, kind: type = object, advice: str = "", max_values: int = MAX_VALUES
) -> Any:
    """The value of a JSON text in UTF-8, which must be of this kind.

    Args:
        data: the text.
        where: file, or file and row, for the error message.
        kind: dict, list, or object for any value.
        advice: how to go on, for the error message.
        max_values: most numbers, strings, lists and objects.

    Raises:
        UserError: not JSON, too many values, too deeply nested, or of another kind.
    """
    if _has_more(data, max_values) and _has_more(STRING.sub(b"", data), max_values):
        raise UserError(_because(where, f"has more than {max_values:,} values of JSON", advice))
    try:
        value = DECODER.decode(data.decode("utf-8-sig"))
    except RecursionError:
        raise UserError(_because(where, "is JSON that is nested too deeply", advice)) from None
    except ValueError as error:  # also bytes that are not UTF-8
        raise UserError(_because(where, f"is not JSON in UTF-8 ({error})", advice)) from None
    if not isinstance(value, kind):
        raise UserError(_because(where, f"is not a JSON {KINDS[kind]}", advice))
    return value


def read_toml(path: Path, asked_by: str = "") -> dict[str, Any]:
    """The table of a TOML file in UTF-8.

    Args:
        path: the file.
        asked_by: begins the message about a file that cannot be read, instead of the path.

    Raises:
        UserError: the file is missing, too large, or not TOML.
    """
    return load_toml(read_bytes(path, limit=2**20, asked_by=asked_by), path)


def load_toml(data: bytes, where: object) -> dict[str, Any]:
    """The table of a TOML text in UTF-8.

    Raises:
        UserError: not TOML, or too deeply nested.
    """
    try:
        table = tomllib.loads(data.decode("utf-8-sig", SURROGATES))
    except RecursionError:
        raise UserError(_because(where, "is TOML that is nested too deeply")) from None
    except ValueError as error:
        raise UserError(f"{where} is not a TOML file: {shown(error)}") from None
    for name, value in table.items():
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise UserError(_because(f"{where}:", f"{shown(name)} has too many digits"))
    return table


@contextmanager
def named(where: object) -> Iterator[None]:
    """Puts the name of a file in front of a UserError about what it says."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    return int(digits)


DECODER = json.JSONDecoder(parse_int=_whole_number)


def _because(where: object, reason: str, advice: str = "") -> str:
    return f"{where} {shown(reason)}{advice and f'; {advice}'}"


def _has_more(data: bytes, values: int) -> bool:
    """Whether a JSON text may have more values than this, by the marks in front of them."""
    if len(data) <= values:  # the usual row of a .jsonl file
        return False
    return sum(data.count(mark) for mark in (b",", b"[", b"{", b":")) > values
