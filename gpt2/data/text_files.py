"""Documents from .txt, .jsonl and .parquet files, compressed or not, in bounded memory.

Every row of a file is yielded, so that counting rows gives row numbers. A row without text is
yielded as None (null or empty), `NotJson` or `NoText`, a row that is too long as `TooLong`. A few
bytes of a stranger can decompress to any length, so a row is never read further than its limit.

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. JSON is one object a line, or one list.
"""

import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DamagedFile, UserError, first_line
from ..untrusted.display import shown
from ..untrusted.parsing import load_json
from .parquet_pages import check_footer, pages_of
from .text_encodings import in_utf8
from .xz_file import XzReader

DOCUMENT_BYTES = 50_000_000  # of a row in its file, decompressed, unless another limit is given
SKIPPED_BYTES = 2**20  # read at once of a row that is too long
BUFFER_BYTES = 2**20  # that Arrow reads at once
BATCH_BYTES, BATCH_ROWS = 2**27, 1024  # of parquet, before texts become Python's
AT_ONCE_BYTES = 2**24  # of a batch whose texts become Python's at once
# A page that Arrow decompresses may hold several documents.
PAGE_BYTES = 2**27
OBJECT_BYTES = 64  # of a string or number of Python, besides its value
MAX_VALUES = 2_000_000  # strings, lists and objects of one JSON list; lines have no such limit


class Repaired(str):
    """A text in which U+FFFD replaces bytes that were not UTF-8, or a lone surrogate."""


class TooLong(str):
    """Stands for a text that is longer than the limit; empty."""


class Unusable(str):
    """Stands for a row that was meant to have a text and has none; empty."""

    place = ""  # in its file: "line 3"
    why = ""  # in words


class NotJson(Unusable):
    """Stands for a line that is not JSON."""

    why = "not JSON"


class NoText(Unusable):
    """Stands for JSON that is no object with a `text`, or has one that is no string."""

    why = "no `text` that is a string"


TextRow = tuple[str | None, int]  # (document or None, bytes of the file read so far)


def read_rows(path: Path, start: int = 0, limit: int = DOCUMENT_BYTES) -> Iterator[TextRow]:
    """Like `read_marked_rows`, with None for `NotJson` and `NoText`."""
    for text, read_bytes in read_marked_rows(path, start, limit):
        yield None if isinstance(text, Unusable) else text, read_bytes


def read_marked_rows(path: Path, start: int = 0, limit: int = DOCUMENT_BYTES) -> Iterator[TextRow]:
    """Yields the rows of a file from number `start` on. A .txt file is a single document.

    Args:
        path: the file.
        start: number of the first row.
        limit: most bytes of a row; a longer one is yielded as `TooLong`.

    Raises:
        DamagedFile: the file cannot be read to its end; the message names the row.
        UserError: no row has a text.
    """
    import pyarrow as pa

    kind = path.name.lower()
    if kind.endswith(".parquet"):
        reader = _parquet_rows
    else:
        reader = _jsonl_rows if ".json" in kind or ".ndjson" in kind else _txt_rows
    number = start
    try:
        for row in reader(path, start, limit):
            yield row
            number += 1
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise DamagedFile(
            f"{path}: damaged or unreadable after row {number} ({shown(first_line(error))}); put a "
            "whole copy in its place and run the same command again: it goes on from the shards "
            "made before this file"
        ) from None


def read_items(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number from 1, fields) of a .jsonl (also .gz, .xz, .zst) or .parquet file.

    Raises:
        UserError: the file is missing or damaged, or a row is too long or no object; the message
            names the row.
    """
    import pyarrow as pa

    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise UserError(f"{path}: not a file")
    number = 0
    try:
        for number, item in enumerate(_items(path), 1):
            if not isinstance(item, dict):
                raise UserError(f"{path}: row {number} is not a JSON object")
            yield number, item
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        why = getattr(error, "strerror", "") or first_line(error, "damaged")
        raise UserError(f"{path}: {shown(why)} (after row {number})") from None


def _items(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    if path.name.lower().endswith(".parquet"):
        check_footer(path)
        with pq.ParquetFile(path, buffer_size=BUFFER_BYTES) as file:
            strings = [c.path for c in file.schema if c.physical_type == "BYTE_ARRAY"]
        # Lists of a row may refer to one long value of the dictionary a million times.
        with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, read_dictionary=strings) as file:
            for number in range(file.num_row_groups):
                pages = pages_of(path, file.metadata.row_group(number), PAGE_BYTES)
                rows = min(BATCH_ROWS, pages.rows_at_once(BATCH_BYTES, keeps_dictionary=True))
                for batch in file.iter_batches(rows, row_groups=[number]):
                    yield from _items_of_batch(batch, path)
        return
    with _open(path) as (_, data):
        values, rest = whole_list(data, path, DOCUMENT_BYTES)
        yield from values or ()
        number = 0
        for line in _lines(rest, DOCUMENT_BYTES):
            if line is None or not line.isspace():
                number += 1
                _check_first(line if number == 1 else None, path)
                where = f"{path}: row {number}"
                if line is None:
                    raise UserError(f"{where} is longer than {DOCUMENT_BYTES:,} bytes")
                yield load_json(line, where)


def _items_of_batch(batch: Any, path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a batch as Python's values, `DOCUMENT_BYTES` at once.

    Raises:
        UserError: a row is longer.
    """
    rows = len(batch)
    if sum(map(_bytes_in_python, batch.columns)) <= DOCUMENT_BYTES:
        yield from batch.to_pylist()
    elif rows == 1:
        raise UserError(f"{path}: a row is longer than {DOCUMENT_BYTES:,} bytes")
    else:
        yield from _items_of_batch(batch.slice(0, rows // 2), path)
        yield from _items_of_batch(batch.slice(rows // 2), path)


def _bytes_in_python(array: Any) -> int:
    """Bytes of an Arrow array's values as Python's objects, roughly."""
    import pyarrow as pa
    import pyarrow.compute as pc

    objects = OBJECT_BYTES * len(array)
    if pa.types.is_dictionary(array.type) and not pa.types.is_decimal(array.type.value_type):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return objects + (pc.sum(lengths).as_py() or 0)
    if pa.types.is_struct(array.type):
        return objects + sum(map(_bytes_in_python, array.flatten()))
    if pa.types.is_nested(array.type):
        return objects + _bytes_in_python(array.flatten())
    return objects + array.nbytes


def _lines(data: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is longer than `limit`."""
    while line := data.readline(limit + 1):
        if len(line) > limit and not line.endswith(b"\n"):
            del line  # while its rest is read
            while (rest := data.readline(SKIPPED_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yields (the raw file, a file of its decompressed bytes)."""
    import pyarrow as pa

    decompressors: dict[str, Callable[[Any], Any]] = {
        ".gz": lambda file: gzip.GzipFile(fileobj=file),
        ".xz": lambda file: io.BufferedReader(XzReader(file)),
        ".zst": lambda file: io.BufferedReader(pa.CompressedInputStream(file, "zstd")),
    }
    wrap = decompressors.get(path.suffix.lower(), nullcontext)
    with open(path, "rb") as file, wrap(file) as data:
        yield file, in_utf8(data)


def whole_list(data: Any, where: object, limit: int) -> tuple[list[Any] | None, BinaryIO]:
    """(the values of a file that is one JSON list, else None; what is left to be read as lines).

    Args:
        data: a binary file that can `peek`.
        where: the file, for messages.
        limit: most bytes of a list.

    Raises:
        UserError: the list is larger.
    """
    begin = data.peek(64)[:64].removeprefix(codecs.BOM_UTF8).lstrip()
    if not begin.startswith(b"["):
        return None, data
    content = data.read(limit + 1)
    if len(content) > limit:
        raise UserError(
            f"{where} is one JSON list of more than {limit:,} bytes; write one object a line "
            "(.jsonl)"
        )
    try:
        return load_json(content, where, list, max_values=MAX_VALUES), io.BytesIO()
    except UserError:
        return None, io.BytesIO(content)  # a list in each line


def _txt_rows(path: Path, start: int, limit: int) -> Iterator[TextRow]:
    if start == 0:
        with _open(path) as (file, data):
            content = data.read(limit + 1)
            if len(content) > limit:
                yield TooLong(), path.stat().st_size
            else:
                yield _decode(content) or None, file.tell()


def _jsonl_rows(path: Path, start: int, limit: int) -> Iterator[TextRow]:
    number, texts = 0, start
    with _open(path) as (file, data):
        values, rest = whole_list(data, path, limit)
        lines = chain(map(_as_line, values or ()), _lines(rest, limit))
        for place, line in enumerate(lines, 1):
            if line is not None and line.isspace():
                continue
            number += 1
            _check_first(line if number == 1 else None, path)
            if number > start:
                text = TooLong() if line is None else _text_of_json(line)
                del line  # a long text is held once
                if isinstance(text, Unusable):
                    text.place = f"{'line' if values is None else 'value'} {place}"
                else:
                    texts += 1
                yield text, file.tell()
    if number and not texts:
        raise UserError(
            f"{path}: none of its {number:,} rows is a JSON object with a `text` that is a string"
        )


def _check_first(line: bytes | None, path: Path) -> None:
    """Raises UserError if a file's first line only opens an object: its rows take several lines."""
    if line and line.endswith(b"\n") and line.removeprefix(codecs.BOM_UTF8).strip() == b"{":
        raise UserError(
            f"{path}: its objects go over several lines; write each in one: "
            f"jq -c . {path} > lines.jsonl"
        )


def _as_line(value: Any) -> bytes:
    return json.dumps(value).encode()


def _text_of_json(line: bytes) -> str | None:
    """The text in a line; None if it is null or empty, `NotJson` or `NoText` if there is none."""
    try:
        value, is_repaired = _value(line)
    except UserError:
        return NotJson()
    if not isinstance(value, dict) or "text" not in value:
        return NoText()
    text = value.pop("text")
    if not isinstance(text, str) or not text:
        return None if text in (None, "") else NoText()
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell a lone surrogate, UTF-8 cannot
        text = Repaired(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    if is_repaired and "\ufffd" in text:
        text = Repaired(text)
    return text


def _value(line: bytes) -> tuple[Any, bool]:
    """(the JSON value of a line, whether bytes that were not UTF-8 were replaced).

    Raises:
        UserError: not JSON.
    """
    try:
        return load_json(line, "row"), False
    except UserError:
        decoded = _decode(line)
        if not isinstance(decoded, Repaired):
            raise
        return load_json(decoded.encode(), "row"), True


def _decode(data: bytes, encoding: str = "utf-8-sig") -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return Repaired(data.decode(encoding, "replace"))


def _parquet_rows(path: Path, start: int, limit: int) -> Iterator[TextRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_footer(path)
    size_bytes, number = path.stat().st_size, 0
    # Checksums are verified if there are any. A buffer, because Arrow otherwise reads the column of
    # a row group whole.
    with pq.ParquetFile(path, page_checksum_verification=True, buffer_size=BUFFER_BYTES) as file:
        if "text" not in file.schema_arrow.names:
            names = shown(", ".join(file.schema_arrow.names))
            raise UserError(f"{path}: no column `text`; its columns are {names}")
        kind = file.schema_arrow.field("text").type
        if pa.types.is_primitive(kind) or pa.types.is_nested(kind):  # numbers, dates, lists
            raise UserError(f"{path}: its column `text` is of type {kind}; it must hold strings")
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            if number + metadata.num_rows <= start:
                number += metadata.num_rows
                continue
            pages = pages_of(path, metadata, PAGE_BYTES, "text")
            rows = min(BATCH_ROWS, pages.rows_at_once(BATCH_BYTES))
            for batch in file.iter_batches(rows, row_groups=[group], columns=["text"]):
                for text in _texts(batch.column(0), limit):
                    number += 1
                    if number > start:
                        yield text, size_bytes * number // max(number, file.metadata.num_rows)


def _texts(column: Any, limit: int) -> Iterator[str | None]:
    """The texts of a column of strings, one at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # As bytes: Arrow raises for invalid UTF-8, which `_decode` repairs.
    values = column.cast(pa.large_binary())
    if values.nbytes <= min(limit, AT_ONCE_BYTES):  # the usual batch, in half the time
        for value in values.to_pylist():
            yield _decode(value, "utf-8") if value else None
        return
    for number, length in enumerate(pc.binary_length(values).to_pylist()):
        if length and length > limit:
            yield TooLong()
        else:
            yield _decode(values[number].as_py(), "utf-8") if length else None
