"""Batches from shards: one global order that ranks slice, prefetched, with an exact position.

The order (`sequence_order.py`) is a pure function: the number of sequences that all ranks together
have consumed is the whole state. A run may therefore resume with another number of ranks.

Shapes: `B` sequences per micro-batch, `T` block_size.
"""

import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..config.model import IGNORE
from ..config.train import BatchPlan
from .sequence_order import Mixture
from .shards import SequenceReader

# (inputs, targets), each (B, T) int64; of conversations also their beginnings, see `packed.Packed`
Batch = tuple[Tensor, ...]


class TrainLoader:
    """Micro-batches of one rank, read ahead by a thread.

    `position` counts the sequences that all ranks have consumed in finished calls of `next_step`;
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

    def next_step(self, micro_batches: int = 0) -> list[Batch]:
        """The micro-batches of the next optimizer step, on the device; 0: as many as planned.

        Raises:
            UserError: a damaged shard (see `shards.Shard.read`).
        """
        count = micro_batches or self.plan.grad_accum_steps
        batches = [self._next() for _ in range(count)]
        self.position += count * self.plan.batch_size * self.plan.world_size
        return batches

    def close(self) -> None:
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

    def _read_ahead(self) -> None:
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
        sequences = [shard.sequence(start, T) for shard, start in self.order.locate(first, B)]
        batch = [torch.from_numpy(np.stack(rows)) for rows in zip(*sequences, strict=True)]
        return tuple(t.pin_memory() if self.device.type == "cuda" else t for t in batch)


def available_eval_tokens(shards: list[SequenceReader], asked: int) -> int:
    """Tokens that validation predicts: as many as are asked for, or all there are."""
    return min(asked, sum(max(0, shard.tokens - 1) for shard in shards))


def eval_batches(
    shards: list[SequenceReader],
    *,
    block_size: int,
    batch_size: int,
    eval_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """This rank's share of the validation sequences, in the order of the files.

    All ranks together predict exactly `available_eval_tokens` tokens, each once and in one context,
    whatever the batch size and the number of ranks. The last sequence may be short. It and the last
    batch are filled up with targets that do not count: all shapes are equal, and all ranks have
    equally many batches.

    Yields:
        As `TrainLoader.next_step`: inputs and targets (B, T), and where documents begin.
    """
    sequences = list(_eval_sequences(shards, block_size, eval_tokens))
    mine = sequences[rank::world_size]
    for first in range(0, len(sequences[::world_size]), batch_size):
        parts = len(sequences[0][0].sequence(0, 0))  # a rank's last batch may hold no sequence
        batch = [np.full((batch_size, block_size), fill) for fill in (0, IGNORE, 0)[:parts]]
        for i, (shard, start, count) in enumerate(mine[first : first + batch_size]):
            for rows, row in zip(batch, shard.sequence(start, count), strict=True):
                rows[i, :count] = row
        yield tuple(torch.from_numpy(rows).to(device) for rows in batch)


def _eval_sequences(
    shards: list[SequenceReader], block_size: int, eval_tokens: int
) -> Iterator[tuple[SequenceReader, int, int]]:
    """(shard, first token, predicted tokens) of each validation sequence."""
    left = available_eval_tokens(shards, eval_tokens)
    for shard in shards:
        for start in range(0, shard.tokens - 1, block_size):
            if not left:
                return
            count = min(block_size, shard.tokens - 1 - start, left)
            left -= count
            yield shard, start, count
