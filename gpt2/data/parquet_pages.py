"""Sizes of the pages of a parquet file, before Arrow decompresses one.

A column of a row group is a run of pages, each behind a header in Thrift's compact protocol. Arrow
decompresses a page whole. Values that occur often are in one page, the dictionary: a batch of rows
can therefore be larger than all pages together.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

HEADER_BYTES = 2**16  # of a page header, with its statistics
MAX_FOOTER_BYTES = 2**24
MAX_VALUES = 2**24  # of a column in a row group; lists of one row can hold all of them
DICTIONARY_PAGE = 2  # in `PageType`
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


@dataclass(frozen=True)
class Pages:
    """Sums over columns of a row group, in bytes after decompression."""

    dictionary: int  # of the largest dictionary page of each column
    largest: int  # of the largest data page of each column
    total: int  # of all data pages

    def rows_at_once(self, most_bytes: int, keeps_dictionary: bool = False) -> int:
        """Rows of a batch, at least one, so that their values take at most so many bytes.

        A value is no larger than its page. Values from a dictionary are copied, each once for every
        row that refers to it, unless Arrow keeps the dictionary.
        """
        dictionary = 0 if keeps_dictionary else self.dictionary
        by_page = most_bytes // max(1, dictionary, self.largest)
        by_total = max(0, most_bytes - self.total) // max(1, dictionary)
        return max(1, by_page, by_total)


def pages_of(path: Path, group: Any, limit: int, column: str = "") -> Pages:
    """Reads the headers of the pages of a row group.

    Args:
        path: the parquet file.
        group: `metadata.row_group(i)` of pyarrow.
        limit: most bytes of a page.
        column: path of one column; empty: all columns.

    Raises:
        UserError: a page is larger than `limit`, all columns need twice as much at once, or a
            column has more than `MAX_VALUES` values.
        OSError: a header cannot be read.
    """
    found = []
    with open(path, "rb") as file:
        for number in range(group.num_columns):
            chunk = group.column(number)
            if column in ("", chunk.path_in_schema):
                found.append(_pages_of_column(file, chunk))
    sums = Pages(*(sum(getattr(p, f.name) for p, _ in found) for f in fields(Pages)))
    largest = max((max(p.dictionary, p.largest) for p, _ in found), default=0)
    if largest > limit or sums.dictionary + sums.largest > 2 * limit:
        largest = max(largest, (sums.dictionary + sums.largest) // 2)
        raise UserError(
            f"{path}: a page of {largest:,} bytes; pages of up to {limit:,} are read, so write the "
            "file with a smaller data_page_size"
        )
    if any(values > MAX_VALUES for _, values in found):
        raise UserError(
            f"{path}: a row group of over {MAX_VALUES:,} values; write the file with a smaller "
            "row_group_size"
        )
    return sums


def _pages_of_column(file: BinaryIO, chunk: Any) -> tuple[Pages, int]:
    """(pages of a column, number of its values)."""
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        at = min(at, chunk.dictionary_page_offset)
    end = at + chunk.total_compressed_size
    dictionary = largest = total = values = 0
    while at < end:
        file.seek(at)
        try:
            header = _Header(file.read(HEADER_BYTES))
            kind, size, held, count = header.page()
        except (IndexError, KeyError, ValueError):
            raise OSError("the header of a page cannot be read") from None
        size = max(size, held)
        if kind == DICTIONARY_PAGE:
            dictionary = max(dictionary, size)
        else:
            largest, total, values = max(largest, size), total + size, values + count
        at += header.length + held
    return Pages(dictionary, largest, total), values


class _Header:
    """A reader of Thrift's compact protocol."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def length(self) -> int:
        """Bytes that were read."""
        return self._at

    def page(self) -> tuple[int, int, int, int]:
        """(kind, bytes decompressed, bytes compressed, number of values) of a page.

        Raises:
            IndexError: the header ends early.
            KeyError: a size is missing.
            ValueError: no page header.
        """
        numbers = self._struct(0)
        # Headers of data pages, of the dictionary and of data pages in version 2 are structs.
        values = max(numbers.get(-field, 0) for field in (5, 7, 8))
        if min(numbers[2], numbers[3], values) < 0:
            raise ValueError
        return numbers[1], numbers[2], numbers[3], values

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
        """The integers of a struct by their field numbers; other fields are skipped.

        The first integer of an inner struct is under the negative number of its field.
        """
        if depth > MAX_DEPTH:
            raise ValueError
        numbers: dict[int, int] = {}
        field = 0
        while byte := self._byte():
            field = field + (byte >> 4) if byte >> 4 else self._integer()
            kind = byte & 0x0F
            if kind in INTEGERS:
                numbers[field] = self._integer()
            elif kind == STRUCT:
                numbers[-field] = self._struct(depth + 1).get(1, 0)
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
