"""The kinds of values in a manifest of shards, which a stranger may have written."""

from collections.abc import Callable
from typing import Any

from .vocabulary import is_described

LARGEST = 2**53  # of any count, so that sums stay exact in numpy as well


def has_right_kinds(manifest: dict[str, Any]) -> bool:
    """Whether all known keys of a manifest and of its entries hold values of their kinds."""
    entries = manifest["shards"]
    return _fits(manifest, KINDS) and all(_fits(entry, ENTRY_KINDS) for entry in entries)


def _fits(table: dict[str, Any], kinds: dict[str, Callable[[Any], bool]]) -> bool:
    return all(fits(table[name]) for name, fits in kinds.items() if name in table)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def _is_next(value: Any) -> bool:
    """Where the next shard begins (`tokenize_rows.Position`); None in a small source."""
    return value is None or (
        isinstance(value, dict)
        and PLACE <= {*value} <= {*PLACE, *ODD_ROWS}
        and all(map(_is_count, value.values()))
    )


PLACE = {"part", "row", "used"}
ODD_ROWS = ("skipped", "repaired", "literal", "too_long", "not_json", "no_text")
KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("source", "prefix", "revision", "worker", "damaged"), _is_text),
    **dict.fromkeys(("format", "shard_tokens", "max_document_mb", "workers"), _is_count),
    **dict.fromkeys(("documents", "tokens", *(f"{kind}_rows" for kind in ODD_ROWS)), _is_count),
    "complete": lambda value: isinstance(value, bool),
    "files": _is_table_of(_is_count),
    "files_sha256": _is_table_of(_is_text),
    "files_sample_sha256": _is_table_of(_is_text),
    "tokenizer": is_described,
    "cuts": lambda value: isinstance(value, list) and all(map(_is_count, value)),
}
ENTRY_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("tokens", "documents"), _is_count),
    **dict.fromkeys(("sha256", "worker"), _is_text),
    "next": _is_next,
}
