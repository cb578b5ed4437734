"""Documents to tokens on every core, in order.

Threads of one process: both tokenizers compute without holding Python's lock, and nothing has to be
copied from process to process.
"""

import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..data.text_files import Repaired
from ..errors import UserError
from ..tokenizer import END_OF_TEXT_NAME
from .fast_tokenizer import FastTokenizer, tokenizer_class
from .sources import Source

BATCH_CHARS, BATCH_ROWS = 1_000_000, 10_000  # what a worker is given at once
MOST_WORKERS = 16  # by default: one thread reads, and cannot feed more
ODD = ("skipped", "repaired", "literal")  # rows that are counted
CHECK_EVERY = 1000  # documents of which one is compared with tiktoken

Encoded = tuple["RowBatch", np.ndarray, np.ndarray]  # uint16 tokens; int64 tokens of each row


@dataclass(frozen=True)
class Position:
    """A place in the stream of tokens, where a shard begins."""

    part: int = 0  # index of the file
    row: int = 0  # of that file, counting skipped rows
    used: int = 0  # tokens of that row's document that earlier shards hold
    skipped: int = 0  # rows without a text, before this place
    repaired: int = 0  # rows with something that UTF-8 cannot hold
    literal: int = 0  # rows in which `<|endoftext|>` is text

    @property
    def odd(self) -> list[int]:
        """Numbers of rows of the kinds in `ODD`."""
        return [getattr(self, kind) for kind in ODD]


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows with the part and number of each."""

    texts: list[str | None]
    places: list[tuple[int, int]]
    read_bytes: int  # of the source, up to the last of these rows

    def odd(self) -> np.ndarray:
        """(rows, 3) bool: which rows a `Position` counts as skipped, repaired and literal."""
        return np.array(
            [
                (text is None, isinstance(text, Repaired), END_OF_TEXT_NAME in (text or ""))
                for text in self.texts
            ]
        )

    def documents(self) -> list[str]:
        """The rows that have a text."""
        return [text for text in self.texts if text is not None]


def encode_rows(
    source: Source, start: Position, num_workers: int, tokenizer: str
) -> Generator[Encoded, None, None]:
    """Encodes all rows from a position on.

    Batches come out in order and few are under way at once, so that memory stays flat.

    Args:
        source: where the rows come from.
        start: the first row, and what is counted up to there.
        num_workers: threads that encode; 0: one per core, at most 16.
        tokenizer: auto, gigatoken or tiktoken.

    Raises:
        UserError: a damaged source, or gigatoken is missing or differs from tiktoken.
    """
    num_workers = num_workers or min(_cores(), MOST_WORKERS)
    make, of_thread, one_at_a_time = tokenizer_class(tokenizer), threading.local(), threading.Lock()

    def encode(batch: RowBatch) -> Encoded:
        first = not hasattr(of_thread, "tokenizer")
        if first:
            with one_at_a_time:  # the first one reads the merges for all
                of_thread.tokenizer = make()
        encoded = _per_row(batch, *of_thread.tokenizer.encode_documents(batch.documents()))
        if make is FastTokenizer:
            _compare(source, of_thread.tokenizer, encoded, first)
        return encoded

    pool = ThreadPoolExecutor(num_workers)
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in _batches(source, start):
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _compare(source: Source, tokenizer: FastTokenizer, encoded: Encoded, first: bool) -> None:
    """Compares the first document, if wanted, and every 1000th with what tiktoken makes of it."""
    batch, tokens, lengths = encoded
    ends = np.cumsum(lengths)
    for row, (text, (part, number)) in enumerate(zip(batch.texts, batch.places, strict=True)):
        if text is not None and (first or (part + number) % CHECK_EVERY == 0):
            first = False
            if tokenizer.differs(text, tokens[ends[row] - lengths[row] : ends[row]]):
                raise UserError(
                    f"{source.parts[part].name}, row {number}: gigatoken and tiktoken make "
                    "different tokens of it; use --tokenizer=tiktoken with a new --out_dir="
                )


def _per_row(batch: RowBatch, tokens: np.ndarray, lengths: np.ndarray) -> Encoded:
    """Gives rows without a text their length, zero."""
    row_lengths = np.zeros(len(batch.texts), np.int64)
    row_lengths[[text is not None for text in batch.texts]] = lengths
    return batch, tokens, row_lengths


def _cores() -> int:
    """Cores that this process may use, which in a container can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _batches(source: Source, start: Position) -> Iterator[RowBatch]:
    """All rows from a position on; a batch may span files."""
    texts, places, chars, earlier_bytes = [], [], 0, 0
    for index, part in enumerate(source.parts):
        first = start.row if index == start.part else 0
        rows = source.rows(index, first) if index >= start.part else ()
        for number, (text, read_bytes) in enumerate(rows, first):
            texts.append(text)
            places.append((index, number))
            chars += len(text or "")
            if chars >= BATCH_CHARS or len(texts) == BATCH_ROWS:
                yield RowBatch(texts, places, earlier_bytes + read_bytes)
                texts, places, chars = [], [], 0
        earlier_bytes += part.size_bytes
    if texts:
        yield RowBatch(texts, places, earlier_bytes)
