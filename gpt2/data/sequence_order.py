"""Which sequence comes when: a pure function of (seed, position), for one dataset and for a mix.

A sequence is block_size + 1 tokens of a shard: the first block_size are the input, the last
block_size the targets. An epoch of a dataset visits every sequence once: shards in a random order,
and within each shard its sequences in a random order. A shard is so read from the disk once, and
then comes from memory. From the second epoch on sequences begin elsewhere, so that text is not cut
where it was cut before.

Small shards are shuffled in groups of up to 128M tokens. Otherwise a whole step might come from one
small shard, and be a single book. Nothing here has a state: the number of sequences consumed is all
that a checkpoint needs.
"""

import bisect
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..tokenizer import END_OF_TEXT
from .shards import Shard

GROUP_TOKENS, GROUP_SHARDS = 128_000_000, 128  # at most, but one shard of any size; 256 MB


class EpochOrder(NamedTuple):
    """The order of an epoch; counts of sequences end with the total."""

    shards: list[int]  # in the order in which they come
    shard_starts: list[int]  # sequences before each shard
    first_shards: list[int]  # the first shard of each group
    group_starts: list[int]  # sequences before each group


class SequenceOrder:
    """Where the n-th sequence of a dataset is, for n = 0, 1, 2, … without end.

    Args:
        shards: the training shards of one dataset.
        block_size: tokens that a sequence predicts.
        seed: of the random order.
        shuffle: False visits shards and sequences in the order of the files.
        sequence_start: "anywhere": a sequence every block_size tokens, each token predicted once
            but for fewer than block_size at the ends of each shard; "document": see
            `document_sequences`.

    Raises:
        UserError: not a single sequence; a token outside the vocabulary ("document" reads it all).
    """

    def __init__(
        self,
        shards: list[Shard],
        block_size: int,
        seed: int,
        shuffle: bool,
        sequence_start: str = "anywhere",
    ):
        self.shards, self.block_size = shards, block_size
        self.seed, self.shuffle, self.sequence_start = seed, shuffle, sequence_start
        # One group may end and the next begin within a batch, so two permutations are kept.
        self._shards_of = functools.lru_cache(maxsize=2)(self._order_of_shards)
        self._sequences_of = functools.lru_cache(maxsize=2)(self._order_of_sequences)
        self._shift_of = functools.lru_cache(maxsize=2 * GROUP_SHARDS)(self._shift)
        self._documents_of = functools.lru_cache(maxsize=2 * GROUP_SHARDS)(
            lambda shard: document_sequences(shards[shard], block_size)  # 0.5 MB of 100M tokens
        )
        with ThreadPoolExecutor() as pool:
            self.counts = list(pool.map(self._count, range(len(shards))))
        self.per_epoch = sum(self.counts)
        if not self.per_epoch:
            held = sum(shard.tokens for shard in shards)
            raise UserError(
                f"{shards[0].path.parent}: {held} training tokens are too few for one window of "
                f"block_size={block_size}; use a smaller --block_size, or more text"
            )

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens that the sequences of an epoch predict; tokens of two sequences count twice."""
        return self.per_epoch * self.block_size

    def locate(self, n: int) -> tuple[Shard, int]:
        """(shard, first token) of the n-th sequence."""
        epoch, place = divmod(n, self.per_epoch)
        of_epoch = self._shards_of(epoch)
        group = bisect.bisect_right(of_epoch.group_starts, place) - 1
        start = of_epoch.group_starts[group]
        place = start + int(self._sequences_of(epoch, group)[place - start])
        turn = bisect.bisect_right(of_epoch.shard_starts, place) - 1
        shard, number = of_epoch.shards[turn], place - of_epoch.shard_starts[turn]
        if self.sequence_start == "document":
            return self.shards[shard], int(self._documents_of(shard)[number])
        return self.shards[shard], self._shift_of(epoch, shard) + number * self.block_size

    def _shift(self, epoch: int, shard: int) -> int:
        """Tokens of a shard to leave out before its first sequence; 0 in the first epoch."""
        if epoch == 0 or not self.shuffle:
            return 0
        left_over = (self.shards[shard].tokens - 1) % self.block_size
        return int(self._random(1, epoch, len(self.shards) + 1 + shard)[0] % (left_over + 1))

    def _count(self, shard: int) -> int:
        if self.sequence_start == "document":
            return len(self._documents_of(shard))
        return max(0, (self.shards[shard].tokens - 1) // self.block_size)

    def _order_of_shards(self, epoch: int) -> "EpochOrder":
        """The shards of an epoch, and the groups whose sequences are shuffled together."""
        order = self._permutation(len(self.counts), epoch, 0).tolist()
        begins = [0, *accumulate(self.counts[shard] for shard in order)]
        firsts, starts, tokens, members = [], [], 0, 0
        for shard, begin in zip(order, begins, strict=False):
            tokens, members = tokens + self.shards[shard].tokens, members + 1
            if not firsts or tokens > GROUP_TOKENS or members > GROUP_SHARDS:
                firsts.append(shard)
                starts.append(begin)
                tokens, members = self.shards[shard].tokens, 1
        return EpochOrder(order, begins, firsts, [*starts, begins[-1]])

    def _order_of_sequences(self, epoch: int, group: int) -> np.ndarray:
        of_epoch = self._shards_of(epoch)
        start, end = of_epoch.group_starts[group : group + 2]
        return self._permutation(end - start, epoch, of_epoch.first_shards[group] + 1)

    def _permutation(self, count: int, epoch: int, stream: int) -> np.ndarray:
        """0 … count - 1 in an order that is the same on every machine.

        Sorted by the output of Philox, a counter-based generator (Salmon et al. 2011) whose
        integers numpy promises to keep; it does not promise that of `Generator.permutation`.
        """
        if not self.shuffle:
            return np.arange(count)
        return np.argsort(self._random(count, epoch, stream), kind="stable")

    def _random(self, count: int, epoch: int, stream: int) -> np.ndarray:
        """Integers of Philox. Stream 0 orders shards, the next sequences, the last are shifts."""
        return np.random.Philox(key=[self.seed, (epoch << 32) + stream]).random_raw(count)


def document_sequences(shard: Shard, block_size: int) -> np.ndarray:
    """First tokens of a shard's sequences that begin with documents, uint32 and ascending.

    The first sequence begins at the first token. The next one begins at the last document (its
    end-of-text token) that begins among the tokens that the sequence before predicts: the document
    that was cut off is read again from its beginning. A document longer than a sequence goes on in
    sequences that begin where the one before ended. Every token of the shard is so predicted, but
    for fewer than block_size at its end, and a document of at most block_size tokens is whole in a
    sequence.

    Raises:
        UserError: a damaged shard.
    """
    begins = _documents(shard)
    lengths = np.diff(begins, append=shard.tokens)
    further = (lengths - 1) // block_size  # sequences that a document needs beyond its first
    last = begins + (further + 1) * block_size  # last token that its sequences predict
    following = (np.searchsorted(begins, last, side="right") - 1).tolist()
    chosen = [0]  # documents at which a sequence begins
    while following[chosen[-1]] > chosen[-1]:
        chosen.append(following[chosen[-1]])
    counts = further[chosen] + 1
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins[chosen], counts) + number * block_size
    return starts[starts + block_size < shard.tokens].astype(np.uint32)


def _documents(shard: Shard) -> np.ndarray:
    """Places of the end-of-text tokens, and 0: a shard may begin within a document."""
    found, first = [np.zeros(1, dtype=np.int64)], 0
    for chunk in shard.chunks():
        found.append(first + np.flatnonzero(chunk == END_OF_TEXT))
        first += len(chunk)
    return np.unique(np.concatenate(found))


class Mixture:
    """Which sequence of which dataset is the g-th of the run.

    The n-th sequence of a dataset with share s is due at (n + 1/2) / s, and sequences come in the
    order in which they are due. Each dataset so always has its share of the sequences, to within a
    few, and the g-th is found without going through those before it. Datasets have epochs of their
    own.

    Args:
        orders: one for each dataset.
        shares: of the sequences; they sum to 1.
        began: sequences that the run had consumed when this mix began.
        before: sequences of each dataset among those.
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

    def locate(self, g: int, count: int) -> list[tuple[Shard, int]]:
        """(shard, first token) of the sequences g … g + count - 1."""
        dataset, number, _, skip = self._due(g - self.began, count)
        turns = zip(dataset[skip:].tolist(), number[skip:].tolist(), strict=True)
        return [self.orders[d].locate(self.before[d] + n) for d, n in turns][:count]

    def consumed(self, g: int) -> list[int]:
        """How many sequences of each dataset are among the first g of the run."""
        dataset, _, passed, skip = self._due(g - self.began, 0)
        recent = np.bincount(dataset[:skip], minlength=len(self.orders))
        return [b + p + int(r) for b, p, r in zip(self.before, passed, recent, strict=True)]

    def _due(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, list[int], int]:
        """Sequences that are due around `first` … `first + count`, in their order.

        Returns:
            (dataset of each, number of each within its dataset, sequences of each dataset that come
            before all of these, how many of these come before `first`).
        """
        # At most len(shares) / 2 sequences more or fewer than t are due by t.
        slack = 2 * len(self.shares)
        passed = [max(0, int((first - slack) * share)) for share in self.shares]
        ends = [int((first + count + slack) * share) + 1 for share in self.shares]
        spans = list(zip(passed, ends, strict=True))
        number = np.concatenate([np.arange(low, high) for low, high in spans])
        dataset = np.repeat(np.arange(len(spans)), [high - low for low, high in spans])
        due = (number + 0.5) / np.array(self.shares)[dataset]
        turn = np.lexsort((dataset, due))
        return dataset[turn], number[turn], passed, first - sum(passed)
