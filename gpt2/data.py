"""Batches from shards: one global order that ranks slice, prefetched, with an exact position.

Each shard is cut into windows of block_size + 1 tokens, one block_size apart; the first block_size
tokens are the input, the last block_size the targets. An epoch visits every window once: shards in
a random order, and windows in a random order within each shard. The order follows from (seed,
epoch) alone by a counter-based generator, so that the number of windows consumed by all ranks
together is the whole state. No rank can fall behind another, and a run may go on with another
number of ranks.

Shapes: `B` sequences per micro-batch, `T` block_size.
"""

import functools
import queue
import threading
from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .config import BatchPlan, UserError
from .ops import IGNORE
from .shards import Shard

Batch = tuple[Tensor, Tensor]  # (inputs, targets), each (B, T) int64


class WindowOrder:
    """Where the g-th window of the run is, for g = 0, 1, 2, … without end."""

    def __init__(self, shards: list[Shard], block_size: int, seed: int, shuffle: bool):
        self.windows = [max(0, (shard.tokens - 1) // block_size) for shard in shards]
        self.per_epoch = sum(self.windows)
        if not self.per_epoch:
            held = sum(shard.tokens for shard in shards)
            raise UserError(
                f"{shards[0].path.parent}: {held} training tokens are too few for one window of "
                f"block_size={block_size}; use a smaller --block_size, or more text"
            )
        self.seed, self.shuffle = seed, shuffle
        self._shards_of = functools.lru_cache(maxsize=2)(self._order_of_shards)
        self._windows_of = functools.lru_cache(maxsize=2)(self._order_of_windows)

    def locate(self, g: int) -> tuple[int, int]:
        """(shard, window in that shard) of the g-th window."""
        epoch, place = divmod(g, self.per_epoch)
        order, ends = self._shards_of(epoch)
        turn = int(np.searchsorted(ends, place, side="right"))
        shard = order[turn]
        within = place - (ends[turn] - self.windows[shard])
        return shard, int(self._windows_of(epoch, shard)[within])

    def _order_of_shards(self, epoch: int) -> tuple[list[int], list[int]]:
        count = len(self.windows)
        order = self._generator(epoch, 0).permutation(count) if self.shuffle else range(count)
        order = [int(shard) for shard in order]
        return order, list(accumulate(self.windows[shard] for shard in order))

    def _order_of_windows(self, epoch: int, shard: int) -> np.ndarray:
        count = self.windows[shard]
        if not self.shuffle:
            return np.arange(count)
        return self._generator(epoch, shard + 1).permutation(count)

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 32) + stream]))


class TrainLoader:
    """Micro-batches of one rank, read ahead by a thread.

    `position` counts the windows that all ranks have consumed in finished calls of `next_step`;
    a loader made with that position continues exactly there.
    """

    def __init__(
        self,
        shards: list[Shard],
        plan: BatchPlan,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        position: int = 0,
        device: torch.device | str = "cpu",
        prefetch: int = 4,
    ):
        self.shards, self.plan, self.rank = shards, plan, rank
        self.position = position
        self.device = torch.device(device)
        self.order = WindowOrder(shards, plan.block_size, seed, shuffle)
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
                    batch = self._read(range(position + first, position + first + plan.batch_size))
                    if not self._put(batch):
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

    def _read(self, windows: range) -> Batch:
        T = self.plan.block_size
        rows = np.empty((len(windows), T + 1), dtype=np.int64)
        for row, g in zip(rows, windows, strict=True):
            shard, window = self.order.locate(g)
            row[:] = self.shards[shard].read(window * T, T + 1)
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
