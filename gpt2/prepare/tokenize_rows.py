"""Documents to tokens on every core, in order.

Workers are threads of one process. Both tokenizers release the GIL while they encode, and threads
need no copies between processes.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..data.text_encodings import garbled
from ..data.text_files import NoText, NotJson, Repaired, TooLong, Unusable
from ..errors import UserError
from ..report import console
from ..tokenizer import END_OF_TEXT_NAME, Tokenizer
from ..untrusted.long_text import has_long_word
from .fast_tokenizer import FastTokenizer, OwnByTiktoken, faster, tokenizer_class
from .sources import Source

BATCH_CHARS, BATCH_ROWS = 1_000_000, 10_000  # a batch ends at the first of these limits
WAITING_CHARS = 40_000_000  # of batches in flight; the next long document waits for the last
MOST_WORKERS = 16  # default limit: the one reading thread cannot feed more
MOST_WARNINGS = 5  # of texts that are probably none
# Kinds of rows that the manifest counts. `not_json` and `no_text` are among the skipped.
ODD = ("skipped", "repaired", "literal", "too_long", "not_json", "no_text")
WHY_UNUSABLE: dict[type, str] = {kind: kind.why for kind in (NotJson, NoText)}
CHECK_EVERY = 1000  # rows per document that is compared with tiktoken

# (rows, their tokens as uint16, number of tokens of each row as int64)
Encoded = tuple["RowBatch", np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Position:
    """A position in the stream of tokens, at which a shard begins."""

    part: int = 0  # index of the file
    row: int = 0  # index in that file, counting skipped rows
    used: int = 0  # tokens of that row's document in earlier shards
    skipped: int = 0  # rows without a text before this position
    repaired: int = 0  # rows with invalid UTF-8 before this position
    literal: int = 0  # rows with `<|endoftext|>` as text before this position
    too_long: int = 0  # rows over the limit of a document or of a word before this position
    not_json: int = 0  # lines that are not JSON before this position
    no_text: int = 0  # rows without a `text` that is a string before this position

    @property
    def odd(self) -> list[int]:
        """Number of rows of each kind in `ODD`."""
        return [getattr(self, kind) for kind in ODD]


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows."""

    texts: list[str | None]  # None, Unusable: without a text; TooLong: left out; both are empty
    places: list[tuple[int, int]]  # (part, row) of each row
    read_bytes: int  # of the source up to the last of these rows
    end_name: str = END_OF_TEXT_NAME  # which as text in a row is counted

    def odd(self) -> np.ndarray:
        """(rows, 6) bool: which rows are of each kind in `ODD`."""
        return np.array(
            [
                (
                    text is None or isinstance(text, Unusable),
                    isinstance(text, Repaired),
                    self.end_name in (text or ""),
                    isinstance(text, TooLong),
                    isinstance(text, NotJson),
                    isinstance(text, NoText),
                )
                for text in self.texts
            ]
        )

    @property
    def chars(self) -> int:
        """Characters of all texts."""
        return sum(len(text or "") for text in self.texts)

    def documents(self) -> list[str]:
        """Texts of the rows that have one."""
        return [text for text in self.texts if text]


def encode_rows(
    source: Source, start: Position, num_workers: int, tokenizer: str | Tokenizer
) -> Generator[Encoded, None, None]:
    """Encodes all rows from a position on, in order.

    The number of batches in flight is bounded, so that memory stays flat.

    Args:
        source: the source of the rows.
        start: the first row to encode.
        num_workers: encoding threads; 0: one per core, at most 16.
        tokenizer: auto, gigatoken or tiktoken for GPT-2's; or another, which all threads use.

    Raises:
        UserError: a damaged source; gigatoken is missing or differs from tiktoken.
    """
    num_workers = num_workers or min(_cores(), MOST_WORKERS)
    of_thread, one_at_a_time = threading.local(), threading.Lock()
    make: Callable[[], Tokenizer]
    if isinstance(tokenizer, Tokenizer):
        make, end_name = faster(tokenizer), tokenizer.end_of_text_name
    else:
        make, end_name = tokenizer_class(tokenizer), END_OF_TEXT_NAME

    def encode(batch: RowBatch) -> Encoded:
        first = not hasattr(of_thread, "tokenizer")
        if first:
            with one_at_a_time:  # the first thread loads the merges for all
                of_thread.tokenizer = make()
        encoded = _per_row(batch, *of_thread.tokenizer.encode_documents(batch.documents()))
        if isinstance(of_thread.tokenizer, FastTokenizer | OwnByTiktoken):
            _compare(source, of_thread.tokenizer, encoded, first)
        return encoded

    pool = ThreadPoolExecutor(num_workers)
    waiting: deque[tuple[Future[Encoded], int]] = deque()  # with their characters
    try:
        for batch in _batches(source, start, end_name):
            waiting.append((pool.submit(encode, batch), batch.chars))
            while len(waiting) > 2 * num_workers or sum(n for _, n in waiting) > WAITING_CHARS:
                yield waiting.popleft()[0].result()
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _compare(
    source: Source, tokenizer: FastTokenizer | OwnByTiktoken, encoded: Encoded, first: bool
) -> None:
    """Compares every 1000th row, and with `first` the first document, with the slower library's.

    Raises:
        UserError: the tokens differ.
    """
    batch, tokens, lengths = encoded
    ends = np.cumsum(lengths)
    for row, (text, (part, number)) in enumerate(zip(batch.texts, batch.places, strict=True)):
        if text and (first or (part + number) % CHECK_EVERY == 0):
            first = False
            if tokenizer.differs(text, tokens[ends[row] - lengths[row] : ends[row]]):
                raise UserError(
                    f"{source.parts[part].name}, row {number}: {tokenizer.libraries} make "
                    f"different tokens of it; {tokenizer.way_out}"
                )


def _per_row(batch: RowBatch, tokens: np.ndarray, lengths: np.ndarray) -> Encoded:
    """The encoded batch, with length 0 for rows without a text.

    Args:
        batch: the rows.
        tokens: tokens of all documents.
        lengths: tokens of each document.
    """
    row_lengths = np.zeros(len(batch.texts), np.int64)
    row_lengths[[bool(text) for text in batch.texts]] = lengths
    return batch, tokens, row_lengths


def _cores() -> int:
    """Cores that this process may use; a container may allow fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _batches(source: Source, start: Position, end_name: str) -> Iterator[RowBatch]:
    """All rows from a position on. A batch may span files."""
    texts, places, chars, earlier_bytes, warned = [], [], 0, 0, 0
    unusable = set(WHY_UNUSABLE)  # kinds of which no row was told yet
    for index, part in enumerate(source.parts):
        first = start.row if index == start.part else 0
        rows = source.rows(index, first) if index >= start.part else ()
        for number, (text, read_bytes) in enumerate(rows, first):
            if text and (why := garbled(text)) and warned < MOST_WARNINGS:
                warned += 1
                last = "; more are not told" if warned == MOST_WARNINGS else ""
                console.warn(f"{part.name}, row {number}: {why}{last}")
            if isinstance(text, Unusable) and type(text) in unusable:
                unusable.remove(type(text))
                why = WHY_UNUSABLE[type(text)]
                console.warn(f"{part.name}, {text.place}: {why}; such rows are left out")
            texts.append(TooLong() if text and has_long_word(text) else text)
            places.append((index, number))
            chars += len(text or "")
            if chars >= BATCH_CHARS or len(texts) == BATCH_ROWS:
                yield RowBatch(texts, places, earlier_bytes + read_bytes, end_name)
                texts, places, chars = [], [], 0
        earlier_bytes += part.size_bytes
    if texts:
        yield RowBatch(texts, places, earlier_bytes, end_name)
