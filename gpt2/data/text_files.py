"""Documents from .txt, .jsonl and .parquet files, compressed or not, in constant memory.

Every row of a file is yielded, so that counting rows gives row numbers. A row without text (null,
empty, not JSON) is yielded as None.
"""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DamagedFile, UserError, first_line


class Repaired(str):
    """A text in which U+FFFD replaces bytes that were not UTF-8, or a lone surrogate."""


TextRow = tuple[str | None, int]  # (document or None, bytes of the file read so far)


def read_rows(path: Path, start: int = 0) -> Iterator[TextRow]:
    """Yields the rows of a file from number `start` on. A .txt file is a single document.

    Raises:
        DamagedFile: the file cannot be read to its end; the message names the row.
        UserError: no row has a text.
    """
    import pyarrow as pa

    kind = path.name.lower()
    if kind.endswith(".parquet"):
        reader = _parquet_rows
    else:
        reader = _jsonl_rows if ".json" in kind else _txt_rows
    number = start
    try:
        for row in reader(path, start):
            yield row
            number += 1
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise DamagedFile(
            f"{path}: damaged or unreadable after row {number} ({first_line(error)}); put a whole "
            "copy in its place and run the same command again: it goes on from the shards made "
            "before this file"
        ) from None


def read_items(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number from 1, fields) of a .jsonl (also .gz, .xz, .zst) or .parquet file.

    Raises:
        UserError: the file is missing or damaged, or a row is not an object; the message names
            the row.
    """
    import pyarrow as pa

    number = 0
    try:
        for number, item in enumerate(_items(path), 1):
            if not isinstance(item, dict):
                raise UserError(f"{path}: row {number} is not a JSON object")
            yield number, item
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        why = getattr(error, "strerror", "") or first_line(error, "damaged")
        raise UserError(f"{path}: {why} (after row {number})") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: row {number + 1} is not JSON in UTF-8 ({error})") from None


def _items(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    if path.name.lower().endswith(".parquet"):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
        return
    with _open(path) as (_, lines):
        yield from (json.loads(line.decode("utf-8-sig")) for line in lines if not line.isspace())


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yields (the raw file, a file of its decompressed bytes)."""
    import pyarrow as pa

    decompressors: dict[str, Callable[[Any], Any]] = {
        ".gz": lambda file: gzip.GzipFile(fileobj=file),
        ".xz": lzma.LZMAFile,
        ".zst": lambda file: io.BufferedReader(pa.CompressedInputStream(file, "zstd")),
    }
    wrap = decompressors.get(path.suffix.lower(), nullcontext)
    with open(path, "rb") as file, wrap(file) as data:
        yield file, data


def _txt_rows(path: Path, start: int) -> Iterator[TextRow]:
    if start == 0:
        with _open(path) as (file, data):
            yield _decode(data.read()) or None, file.tell()


def _jsonl_rows(path: Path, start: int) -> Iterator[TextRow]:
    number, texts = 0, start
    with _open(path) as (file, lines):
        for line in lines:
            number += not line.isspace()
            if number > start and not line.isspace():
                has_text, text = _text_of_json(line)
                texts += has_text
                yield text, file.tell()
    if number and not texts:
        raise UserError(f"{path}: none of its {number:,} rows is a JSON object with a `text`")


def _text_of_json(line: bytes) -> tuple[bool, str | None]:
    """(whether a line is a JSON object with a `text`, the text or None)."""
    try:
        decoded = _decode(line)
        value = json.loads(decoded)
    except (ValueError, RecursionError):
        return False, None
    if not isinstance(value, dict) or "text" not in value:
        return False, None
    text = value["text"]
    if not isinstance(text, str) or not text:
        return True, None
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell a lone surrogate, UTF-8 cannot
        text = Repaired(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    if isinstance(decoded, Repaired) and "\ufffd" in text:
        text = Repaired(text)
    return True, text


def _decode(data: bytes, encoding: str = "utf-8-sig") -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return Repaired(data.decode(encoding, "replace"))


def _parquet_rows(path: Path, start: int) -> Iterator[TextRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size_bytes, number = path.stat().st_size, 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:  # if there are any
        if "text" not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: no column `text`; its columns are {names}")
        kind = file.schema_arrow.field("text").type
        if pa.types.is_primitive(kind) or pa.types.is_nested(kind):  # numbers, dates, lists
            raise UserError(f"{path}: its column `text` is of type {kind}; it must hold strings")
        for batch in file.iter_batches(1024, columns=["text"]):
            if number + len(batch) <= start:
                number += len(batch)
                continue
            # As bytes: Arrow raises for invalid UTF-8, which `_decode` repairs.
            for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                number += 1
                if number > start:
                    text = _decode(value, "utf-8") if value else None
                    yield text, size_bytes * number // file.metadata.num_rows
