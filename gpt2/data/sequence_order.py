"""Which sequence of which shard comes when: a pure function of (seed, position).

A sequence is block_size tokens with block_size targets: block_size + 1 neighbouring tokens of a
shard, of which the first block_size are the inputs and the last block_size the targets.

An epoch visits every sequence of a dataset once. Its order balances two needs:

- Randomness: the sequences of one optimizer step should come from many documents.
- Locality: a shuffle over the whole dataset would read each sequence from another place on the
  disk, and its permutation would need memory in proportion to the dataset.

So the order of the shards is shuffled, and then the sequences within a shard. One shard of 100M
tokens (200 MB) stays in the operating system's file cache while it is read in random order, and its
permutation of 97,656 sequences is small. A small shard may hold a single book, which would then
fill whole steps. Small shards that follow one another in the epoch are therefore put into groups of
up to 128M tokens, and each group is shuffled as one.

From the second epoch on, the sequences of a shard begin a few tokens later, by a random shift, so
that documents are cut at other places.

There is no state: the number of sequences that a run has consumed determines what comes next. A
resumed run, or one on another number of ranks, continues from that number.
"""

import bisect
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .shards import SequenceReader

# Limits of a group. A shard of more tokens is a group by itself; 128M tokens are 256 MB.
GROUP_TOKENS, GROUP_SHARDS = 128_000_000, 128


class EpochOrder(NamedTuple):
    """The shards of one epoch in their order, cut into groups."""

    shards: list[int]  # number of each shard, in the order of the epoch
    shard_starts: list[int]  # sequences of the epoch before each shard; last: all of them
    group_shards: list[int]  # number of the first shard of each group
    group_starts: list[int]  # sequences of the epoch before each group; last: all of them


class SequenceOrder:
    """Where the n-th sequence of a dataset is, for n = 0, 1, 2, … without end.

    Args:
        shards: the training shards of one dataset.
        block_size: tokens of a sequence.
        seed: of the random order.
        shuffle: False visits shards and sequences in the order of the files.
        sequence_start: "anywhere": a sequence every block_size tokens. An epoch predicts each token
            once, except for fewer than block_size at the ends of each shard.
            "document": sequences begin with documents; see `document_sequences`.

    Raises:
        UserError: too few tokens for one sequence; a token outside the vocabulary (found here only
            with "document", which reads all shards).
    """

    def __init__(
        self,
        shards: Sequence[SequenceReader],
        block_size: int,
        seed: int,
        shuffle: bool,
        sequence_start: str = "anywhere",
    ):
        self.shards, self.block_size = shards, block_size
        self.seed, self.shuffle, self.sequence_start = seed, shuffle, sequence_start
        # Two entries, because a batch may contain the end of one group and the start of the next.
        self._epoch_order = functools.lru_cache(maxsize=2)(self._order_epoch)
        self._group_permutation = functools.lru_cache(maxsize=2)(self._permute_group)
        self._shift = functools.lru_cache(maxsize=2 * GROUP_SHARDS)(self._draw_shift)
        self._document_starts = functools.lru_cache(maxsize=2 * GROUP_SHARDS)(
            lambda shard: document_sequences(shards[shard], block_size)  # 0.5 MB of 100M tokens
        )
        with ThreadPoolExecutor() as pool:
            self.counts = list(pool.map(self._count, range(len(shards))))  # sequences per shard
        self.per_epoch = sum(self.counts)
        if not self.per_epoch:
            held = sum(shard.tokens for shard in shards)
            raise UserError(
                f"{shards[0].path.parent}: {held} training tokens are too few for one sequence of "
                f"block_size={block_size}; use a smaller --block_size, or more text"
            )

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens predicted in an epoch; a token that two sequences share counts twice."""
        return self.per_epoch * self.block_size

    def locate(self, n: int) -> tuple[SequenceReader, int]:
        """(shard, index of the first token) of the n-th sequence."""
        epoch, index = divmod(n, self.per_epoch)
        order = self._epoch_order(epoch)
        group = bisect.bisect_right(order.group_starts, index) - 1
        start = order.group_starts[group]
        index = start + int(self._group_permutation(epoch, group)[index - start])
        turn = bisect.bisect_right(order.shard_starts, index) - 1
        shard, sequence = order.shards[turn], index - order.shard_starts[turn]
        if self.sequence_start == "document":
            return self.shards[shard], int(self._document_starts(shard)[sequence])
        return self.shards[shard], self._shift(epoch, shard) + sequence * self.block_size

    def _count(self, shard: int) -> int:
        """Sequences of a shard."""
        if self.sequence_start == "document":
            return len(self._document_starts(shard))
        return max(0, (self.shards[shard].tokens - 1) // self.block_size)

    def _order_epoch(self, epoch: int) -> EpochOrder:
        """Shuffles the shards, and puts neighbours into groups up to the two limits."""
        shards = self._permutation(len(self.counts), epoch, 0).tolist()
        shard_starts = [0, *accumulate(self.counts[shard] for shard in shards)]
        group_shards: list[int] = []
        group_starts: list[int] = []
        tokens, members = 0, 0
        for shard, start in zip(shards, shard_starts, strict=False):
            tokens, members = tokens + self.shards[shard].tokens, members + 1
            if not group_shards or tokens > GROUP_TOKENS or members > GROUP_SHARDS:
                group_shards.append(shard)
                group_starts.append(start)
                tokens, members = self.shards[shard].tokens, 1
        return EpochOrder(shards, shard_starts, group_shards, [*group_starts, shard_starts[-1]])

    def _permute_group(self, epoch: int, group: int) -> np.ndarray:
        """Order of the sequences of a group."""
        order = self._epoch_order(epoch)
        count = order.group_starts[group + 1] - order.group_starts[group]
        return self._permutation(count, epoch, order.group_shards[group] + 1)

    def _draw_shift(self, epoch: int, shard: int) -> int:
        """Tokens to skip at the start of a shard: at most the remainder that fills no sequence.

        The first epoch skips none.
        """
        if epoch == 0 or not self.shuffle:
            return 0
        left_over = (self.shards[shard].tokens - 1) % self.block_size
        return int(self._random(1, epoch, len(self.shards) + 1 + shard)[0]) % (left_over + 1)

    def _permutation(self, count: int, epoch: int, stream: int) -> np.ndarray:
        """A permutation of 0 … count - 1 that is equal on every machine and numpy version.

        Sorts the output of Philox, a counter-based generator (Salmon et al. 2011). numpy guarantees
        Philox's integers across versions, but not the result of `Generator.permutation`.
        """
        if not self.shuffle:
            return np.arange(count)
        return np.argsort(self._random(count, epoch, stream), kind="stable")

    def _random(self, count: int, epoch: int, stream: int) -> np.ndarray:
        """uint64 (count,) of Philox. Each permutation and each shift has a stream of its own.

        Stream 0 orders the shards. The next len(shards) streams permute groups, one for each
        possible first shard. Another len(shards) streams shift the shards.
        """
        return np.random.Philox(key=[self.seed, (epoch << 32) + stream]).random_raw(count)


def document_sequences(shard: SequenceReader, block_size: int) -> np.ndarray:
    """Where the sequences of a shard begin if they begin with documents.

    The first sequence begins at the first token of the shard. The next sequence begins with the
    last document that starts among the targets of the sequence before: this document was cut off,
    and is read again from its end-of-text token. A document longer than a sequence continues in
    further sequences, without overlap.

    Every token of the shard is thus predicted, except for fewer than block_size at its end. A
    document of at most block_size tokens is whole in some sequence.

    Returns:
        uint32, ascending: index of each sequence's first token.

    Raises:
        UserError: a damaged shard.
    """
    documents = _document_starts(shard)
    lengths = np.diff(documents, append=shard.tokens)
    further = (lengths - 1) // block_size  # sequences of each document beyond its first one
    last = documents + (further + 1) * block_size  # last target of a document's last sequence
    following = (np.searchsorted(documents, last, side="right") - 1).tolist()
    chosen = [0]  # documents with which a sequence begins
    while following[chosen[-1]] > chosen[-1]:
        chosen.append(following[chosen[-1]])
    counts = further[chosen] + 1
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(documents[chosen], counts) + number * block_size
    return starts[starts + block_size < shard.tokens].astype(np.uint32)


def _document_starts(shard: SequenceReader) -> np.ndarray:
    """Index of every end-of-text token, and 0 because a shard may begin within a document."""
    found, first = [np.zeros(1, dtype=np.int64)], 0
    for chunk in shard.chunks():
        found.append(first + np.flatnonzero(chunk == shard.vocabulary.end_of_text))
        first += len(chunk)
    return np.unique(np.concatenate(found))


class DueSequences(NamedTuple):
    """Consecutive sequences of a mixture; they begin a little before the first requested one."""

    dataset: np.ndarray  # int64: dataset of each sequence
    number: np.ndarray  # int64: number of each sequence within its dataset
    passed: list[int]  # sequences of each dataset before the first entry
    skip: int  # entries before the first requested sequence


class Mixture:
    """Which sequence of which dataset is the g-th of the run.

    The n-th sequence of a dataset with share s is due at (n + 1/2) / s. All sequences come in the
    order in which they are due. Every dataset therefore has its share of any part of the run, to
    within a few sequences, and the g-th sequence is found without counting through those before.
    Each dataset has epochs of its own.

    Args:
        orders: one for each dataset.
        shares: share of each dataset in the sequences; they sum to 1.
        began: sequences that the run had consumed when this mixture began.
        before: sequences of each dataset among the first `began`.
    """

    def __init__(
        self,
        orders: list[SequenceOrder],
        shares: Sequence[float] = (1.0,),
        began: int = 0,
        before: Sequence[int] | None = None,
    ):
        assert len(orders) == len(shares), (orders, shares)
        assert abs(sum(shares) - 1) < 1e-9, shares
        self.orders, self.shares, self.began = orders, list(shares), began
        self.before = list(before or [0] * len(orders))

    def locate(self, g: int, count: int) -> list[tuple[SequenceReader, int]]:
        """(shard, index of the first token) of the sequences g … g + count - 1."""
        due = self._due(g - self.began, count)
        datasets, numbers = due.dataset[due.skip :].tolist(), due.number[due.skip :].tolist()
        turns = zip(datasets, numbers, strict=True)
        return [self.orders[d].locate(self.before[d] + n) for d, n in turns][:count]

    def consumed(self, g: int) -> list[int]:
        """Sequences of each dataset among the first g of the run."""
        due = self._due(g - self.began, 0)
        recent = np.bincount(due.dataset[: due.skip], minlength=len(self.orders))
        return [b + p + int(r) for b, p, r in zip(self.before, due.passed, recent, strict=True)]

    def _due(self, first: int, count: int) -> DueSequences:
        """The sequences `first` … `first + count - 1`, with a few more on either side."""
        # By time t, a dataset is ahead or behind by at most len(shares) / 2 sequences.
        slack = 2 * len(self.shares)
        passed = [max(0, int((first - slack) * share)) for share in self.shares]
        ends = [int((first + count + slack) * share) + 1 for share in self.shares]
        spans = list(zip(passed, ends, strict=True))
        number = np.concatenate([np.arange(low, high) for low, high in spans])
        dataset = np.repeat(np.arange(len(spans)), [high - low for low, high in spans])
        due = (number + 0.5) / np.array(self.shares)[dataset]
        turn = np.lexsort((dataset, due))
        return DueSequences(dataset[turn], number[turn], passed, first - sum(passed))
