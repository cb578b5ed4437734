"""Batches from shards: one global order that ranks slice, prefetched, with an exact position.

The order (`order.py`) is a pure function, so that the number of windows consumed by all ranks
together is the whole state. No rank can fall behind another, and a run may go on with another
number of ranks.

Shapes: `B` sequences per micro-batch, `T` block_size.
"""

import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .config import BatchPlan
from .ops import IGNORE
from .order import Mixture
from .shards import Shard

Batch = tuple[Tensor, Tensor]  # (inputs, targets), each (B, T) int64


class TrainLoader:
    """Micro-batches of one rank, read ahead by a thread.

    `position` counts the windows that all ranks have consumed in finished calls of `next_step`;
    a loader made with that position continues exactly there.
    """

    def __init__(
        self,
        order: Mixture,
        plan: BatchPlan,
        *,
        rank: int = 0,
        position: int = 0,
        device: torch.device | str = "cpu",
        prefetch: int = 4,
    ):
        self.order, self.plan, self.rank = order, plan, rank
        self.position = position
        self.device = torch.device(device)
        self._queue: queue.Queue = queue.Queue(prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, daemon=True)
        self._thread.start()

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next optimizer step, on the device.

        Raises:
            UserError: a damaged shard (see `shards.Shard.read`).
        """
        batches = [self._next() for _ in range(self.plan.grad_accum_steps)]
        self.position += self.plan.sequences_per_step
        return batches

    def close(self):
        """Ends the thread."""
        self._closed.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)

    def _next(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return tuple(t.to(self.device, non_blocking=True) for t in item)

    def _read_ahead(self):
        plan, position = self.plan, self.position
        try:
            while True:
                # Micro-batch m of rank r: r and m only decide who computes which part of a step.
                for micro in range(plan.grad_accum_steps):
                    first = (micro * plan.world_size + self.rank) * plan.batch_size
                    if not self._put(self._read(position + first)):
                        return
                position += plan.sequences_per_step
        except Exception as error:  # noqa: BLE001 - raised again where the batch is asked for
            self._put(error)

    def _put(self, item: Batch | Exception) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _read(self, first: int) -> Batch:
        B, T = self.plan.batch_size, self.plan.block_size
        rows = np.empty((B, T + 1), dtype=np.int64)
        for row, (shard, start) in zip(rows, self.order.locate(first, B), strict=True):
            row[:] = shard.read(start, T + 1)
        return _to_batch(rows, pin=self.device.type == "cuda")


def _to_batch(rows: np.ndarray, pin: bool) -> Batch:
    tokens = torch.from_numpy(rows)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return (x.pin_memory(), y.pin_memory()) if pin else (x, y)


def available_eval_tokens(shards: list[Shard], asked: int) -> int:
    """Tokens that validation predicts: as many as asked for, or all there are."""
    return min(asked, sum(max(0, shard.tokens - 1) for shard in shards))


def eval_batches(
    shards: list[Shard],
    *,
    block_size: int,
    batch_size: int,
    eval_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """This rank's share of the validation windows, in the order of the files.

    Together the ranks predict exactly `available_eval_tokens` tokens, each once and with the same
    context, whatever the batch size and the number of ranks. The last window may be short; it and
    the last batch are filled up with targets that do not count, so that all shapes are equal and
    all ranks have equally many batches.
    """
    windows = list(_eval_windows(shards, block_size, eval_tokens))
    mine = windows[rank::world_size]
    for first in range(0, len(windows[::world_size]), batch_size):
        rows = np.zeros((batch_size, block_size), dtype=np.int64)
        targets = np.full((batch_size, block_size), IGNORE, dtype=np.int64)
        for i, (shard, start, count) in enumerate(mine[first : first + batch_size]):
            tokens = shard.read(start, count + 1)
            rows[i, :count], targets[i, :count] = tokens[:-1], tokens[1:]
        yield torch.from_numpy(rows).to(device), torch.from_numpy(targets).to(device)


def _eval_windows(shards: list[Shard], block_size: int, eval_tokens: int):
    """(shard, start, predicted tokens) of each validation window."""
    left = available_eval_tokens(shards, eval_tokens)
    for shard in shards:
        for start in range(0, shard.tokens - 1, block_size):
            if not left:
                return
            count = min(block_size, shard.tokens - 1 - start, left)
            left -= count
            yield shard, start, count
