"""Batches of sequences: prefetched for training, in the order of the files for validation.

All ranks follow one global order, a pure function of the position (`data/sequence_order.py`), and
each rank takes its slice. The number of sequences consumed by all ranks together is therefore the
whole state of a loader. A run may continue on another number of ranks.

Shapes: `B` sequences per micro-batch, `T` block_size.
"""

import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config.model import IGNORE
from ..config.train import BatchPlan
from .sequence_order import Mixture
from .shards import SequenceReader

# (inputs, targets), each (B, T) int64. Batches of conversations have a third tensor: the position
# at which the conversation of each token begins (`model/packed_documents.py`).
Batch = tuple[Tensor, ...]


class TrainLoader:
    """The micro-batches of one rank, prefetched by a thread.

    `position` is the number of sequences that all ranks together have consumed, up to the last
    finished call of `next_step`. A new loader with this position continues exactly there.

    Args:
        order: which sequence of which shard comes when.
        plan: how a step is cut into micro-batches.
        rank: of this process.
        position: sequences that the run has consumed.
        device: for the batches.
        prefetch: micro-batches that wait in the queue.
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
        """The micro-batches of the next optimizer step, on the device.

        Args:
            micro_batches: their number; 0: `plan.grad_accum_steps`.

        Raises:
            UserError: a damaged shard; see `Shard.read`.
        """
        count = micro_batches or self.plan.grad_accum_steps
        batches = [self._next() for _ in range(count)]
        self.position += count * self.plan.batch_size * self.plan.world_size
        return batches

    def close(self) -> None:
        """Stops the thread."""
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
        """The thread: reads micro-batch after micro-batch until `close`."""
        plan, position = self.plan, self.position
        try:
            while True:
                # A step reads consecutive sequences; each micro-batch of each rank is a slice of
                # them. The step is therefore equal for any number of ranks.
                for micro in range(plan.grad_accum_steps):
                    first = (micro * plan.world_size + self.rank) * plan.batch_size
                    if not self._put(self._read(position + first)):
                        return
                position += plan.sequences_per_step
        except Exception as error:  # noqa: BLE001 - `_next` raises it in the main thread
            self._put(error)

    def _put(self, item: Batch | Exception) -> bool:
        """Puts an item into the queue; False once the loader is closed."""
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
        batch = [torch.from_numpy(np.stack(part)) for part in zip(*sequences, strict=True)]
        return tuple(t.pin_memory() if self.device.type == "cuda" else t for t in batch)


def available_eval_tokens(shards: Sequence[SequenceReader], asked: int) -> int:
    """Tokens that validation predicts: as many as asked for, or all of the shards."""
    return min(asked, sum(max(0, shard.tokens - 1) for shard in shards))


def eval_batches(
    shards: Sequence[SequenceReader],
    *,
    block_size: int,
    batch_size: int,
    eval_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """This rank's batches of validation sequences, in the order of the files.

    Together the ranks predict exactly `available_eval_tokens` tokens, each once. The context of a
    token depends neither on the batch size nor on the number of ranks. All batches have one shape,
    and all ranks have equally many: a short last sequence and a short last batch are padded with
    the target `IGNORE`.
    """
    sequences = list(_eval_sequences(shards, block_size, eval_tokens))
    mine = sequences[rank::world_size]
    for first in range(0, len(sequences[::world_size]), batch_size):
        parts = len(sequences[0][0].sequence(0, 0))  # tensors; a batch may hold only padding
        batch = [np.full((batch_size, block_size), fill) for fill in (0, IGNORE, 0)[:parts]]
        for i, (shard, start, count) in enumerate(mine[first : first + batch_size]):
            for rows, row in zip(batch, shard.sequence(start, count), strict=True):
                rows[i, :count] = row
        yield tuple(torch.from_numpy(rows).to(device) for rows in batch)


def _eval_sequences(
    shards: Sequence[SequenceReader], block_size: int, eval_tokens: int
) -> Iterator[tuple[SequenceReader, int, int]]:
    """(shard, index of the first token, tokens to predict) of each validation sequence."""
    left = available_eval_tokens(shards, eval_tokens)
    for shard in shards:
        for start in range(0, shard.tokens - 1, block_size):
            if not left:
                return
            count = min(block_size, shard.tokens - 1 - start, left)
            left -= count
            yield shard, start, count
