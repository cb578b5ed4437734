"""Sizes of the pages of a parquet file, before Arrow decompresses one.

A column of a row group is a run of pages, each behind a header in Thrift's compact protocol. Arrow
decompresses a page whole. Values that occur often are in one page, the dictionary: a batch of rows
can therefore be larger than all pages together, but a value is no larger than its page.
"""

from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

HEADER_BYTES = 2**16  # of a page header, with its statistics
MAX_FOOTER_BYTES = 2**24
MAX_DEPTH = 8  # of structs in a page header
BOOLEANS, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12


def check_footer(path: Path) -> None:
    """Raises OSError for a parquet file whose footer is larger than Arrow should parse."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
    if length > min(size, MAX_FOOTER_BYTES):
        raise OSError(f"its footer is said to have {length:,} bytes")


def largest_page(path: Path, group: Any, limit: int, column: str = "") -> int:
    """Bytes of the largest page of a row group, decompressed.

    Args:
        path: the parquet file.
        group: `metadata.row_group(i)` of pyarrow.
        limit: most bytes of a page.
        column: path of one column; empty: all columns.

    Raises:
        UserError: a page is larger than `limit`.
        OSError: a header cannot be read.
    """
    largest = 0
    with open(path, "rb") as file:
        for number in range(group.num_columns):
            chunk = group.column(number)
            if column in ("", chunk.path_in_schema):
                largest = max(largest, _largest_of_column(file, chunk))
    if largest > limit:
        raise UserError(
            f"{path}: a page of {largest:,} bytes; pages of up to {limit:,} are read, so write the "
            "file with a smaller data_page_size"
        )
    return largest


def _largest_of_column(file: BinaryIO, chunk: Any) -> int:
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        at = min(at, chunk.dictionary_page_offset)
    end, largest = at + chunk.total_compressed_size, 0
    while at < end:
        file.seek(at)
        try:
            sizes, length = _Header(file.read(HEADER_BYTES)).page()
        except (IndexError, KeyError, ValueError):
            raise OSError("the header of a page cannot be read") from None
        largest = max(largest, *sizes)
        at += length + sizes[1]
    return largest


class _Header:
    """A reader of Thrift's compact protocol."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def page(self) -> tuple[tuple[int, int], int]:
        """((bytes decompressed, bytes compressed) of a page, length of its header).

        Raises:
            IndexError: the header ends early.
            KeyError: a size is missing.
            ValueError: no page header.
        """
        numbers = self._struct(0)
        sizes = numbers[2], numbers[3]
        if min(sizes) < 0:
            raise ValueError
        return sizes, self._at

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError

    def _integer(self) -> int:
        value = self._varint()  # zigzag: 0, -1, 1, -2, …
        return (value >> 1) ^ -(value & 1)

    def _struct(self, depth: int) -> dict[int, int]:
        """The integers of a struct by their field numbers; other fields are skipped."""
        if depth > MAX_DEPTH:
            raise ValueError
        numbers: dict[int, int] = {}
        field = 0
        while byte := self._byte():
            field = field + (byte >> 4) if byte >> 4 else self._integer()
            kind = byte & 0x0F
            if kind in INTEGERS:
                numbers[field] = self._integer()
            else:
                self._skip(kind, depth)
        return numbers

    def _skip(self, kind: int, depth: int) -> None:
        if kind == BYTE:
            self._at += 1
        elif kind in INTEGERS:
            self._varint()
        elif kind == DOUBLE:
            self._at += 8
        elif kind == BINARY:
            length = self._varint()
            self._at += length
        elif kind in LISTS:
            byte = self._byte()
            count = byte >> 4 if byte >> 4 < 15 else self._varint()
            for _ in range(min(count, HEADER_BYTES)):
                self._skip(byte & 0x0F, depth + 1)
        elif kind == STRUCT:
            self._struct(depth + 1)
        elif kind not in BOOLEANS:
            raise ValueError
