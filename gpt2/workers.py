"""Documents to tokens on every core, in order.

Processes are started afresh (spawn), as Windows and macOS do, and import this module and the
tokenizer but no torch.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from .config import UserError
from .sources import Source
from .tokenizer import encode_documents

BATCH_CHARS, BATCH_ROWS = 1_000_000, 10_000  # what a worker is sent at once
MOST_WORKERS = 61  # more than Windows can wait for

Encoded = tuple["Batch", np.ndarray, np.ndarray]  # uint16 tokens; int64 tokens of each row


@dataclass(frozen=True)
class Position:
    """A place in the stream of tokens, where a shard begins."""

    part: int = 0  # index of the file
    row: int = 0  # of that file, counting skipped rows
    used: int = 0  # tokens of that row's document that earlier shards hold
    skipped: int = 0  # rows without a text before this place


@dataclass(frozen=True)
class Batch:
    """Consecutive rows with the part and number of each."""

    texts: list[str | None]
    places: list[tuple[int, int]]
    read_bytes: int  # of the source, up to the last of these rows

    def documents(self) -> list[str]:
        """The rows that have a text."""
        return [text for text in self.texts if text is not None]


def encode_rows(source: Source, start: Position, num_workers: int) -> Iterator[Encoded]:
    """Encodes all rows from a position on; 0 workers: one per core.

    Batches come out in order and few are under way at once, so that memory stays flat.

    Raises:
        UserError: a damaged source, or a worker was killed.
    """
    batches = _batches(source, start)
    num_workers = min(num_workers or _cores(), MOST_WORKERS)
    if num_workers == 1:
        for batch in batches:
            yield _per_row(batch, *encode_documents(batch.documents()))
        return
    with _workers(num_workers) as pool:
        waiting = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(encode_documents, batch.documents())))
            if len(waiting) > 2 * num_workers:
                first, future = waiting.popleft()
                yield _per_row(first, *future.result())
        for batch, future in waiting:
            yield _per_row(batch, *future.result())


def _per_row(batch: Batch, tokens: np.ndarray, lengths: np.ndarray) -> Encoded:
    """Gives rows without a text their length, zero."""
    row_lengths = np.zeros(len(batch.texts), np.int64)
    row_lengths[[text is not None for text in batch.texts]] = lengths
    return batch, tokens, row_lengths


def _cores() -> int:
    """Cores that this process may use, which in a container can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _batches(source: Source, start: Position) -> Iterator[Batch]:
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
                yield Batch(texts, places, earlier_bytes + read_bytes)
                texts, places, chars = [], [], 0
        earlier_bytes += part.size_bytes
    if texts:
        yield Batch(texts, places, earlier_bytes)


@contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Started processes; Ctrl-C is the main process's business, also while they start and end."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker)
    try:
        with _no_interrupt():
            for _ in range(count):
                pool.submit(encode_documents, [])
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker process ended (out of memory?); run the same command again to continue, "
            "with a smaller --num_workers="
        ) from None
    finally:
        with _no_interrupt():
            pool.shutdown(cancel_futures=True)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Without this, workers of a killed process would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it is interrupted
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
