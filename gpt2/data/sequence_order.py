"""Which window comes when: a pure function of (seed, position), for one dataset and for a mix.

A window is block_size + 1 tokens of a shard: the first block_size are the input, the last
block_size the targets. An epoch of a dataset visits every window once: shards in a random order,
and windows in a random order within each shard, so that a shard is read from the disk once and
then comes from memory. From the second epoch on they begin elsewhere, so that text is not cut as
it was before. Small shards take turns in groups, whose windows are shuffled together: a step's
windows would else come from one small shard, and a book in it fill them. Nothing here has a state:
the number of windows consumed says it all.
"""

import bisect
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np

from ..errors import UserError
from ..tokenizer import END_OF_TEXT
from .shards import Shard

GROUP_TOKENS, GROUP_SHARDS = 128_000_000, 128  # at most, but one shard of any size; 256 MB


class SequenceOrder:
    """Where the n-th window of a dataset is, for n = 0, 1, 2, … without end.

    Args:
        shards: the training shards of one dataset.
        block_size: tokens that a window predicts.
        seed: of the random order.
        shuffle: False visits shards and windows in the order of the files.
        sequence_start: "anywhere": a sequence every block_size tokens, each token predicted once
            but for fewer than block_size at the ends of each shard; "document": see
            `document_sequences`.

    Raises:
        UserError: not a single window; a token outside the vocabulary ("document" reads it all).
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
        self._windows_of = functools.lru_cache(maxsize=2)(self._order_of_windows)
        self._shift_of = functools.lru_cache(maxsize=2 * GROUP_SHARDS)(self._shift)
        self._documents_of = functools.lru_cache(maxsize=2 * GROUP_SHARDS)(
            lambda shard: document_sequences(shards[shard], block_size)  # 0.5 MB of 100M tokens
        )
        with ThreadPoolExecutor() as pool:
            self.windows = list(pool.map(self._count, range(len(shards))))
        self.per_epoch = sum(self.windows)
        if not self.per_epoch:
            held = sum(shard.tokens for shard in shards)
            raise UserError(
                f"{shards[0].path.parent}: {held} training tokens are too few for one window of "
                f"block_size={block_size}; use a smaller --block_size, or more text"
            )

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens that the windows of an epoch predict, those that two windows share twice."""
        return self.per_epoch * self.block_size

    def locate(self, n: int) -> tuple[Shard, int]:
        """(shard, first token) of the n-th window."""
        epoch, place = divmod(n, self.per_epoch)
        order, begins, _, starts = self._shards_of(epoch)
        group = bisect.bisect_right(starts, place) - 1
        place = starts[group] + int(self._windows_of(epoch, group)[place - starts[group]])
        turn = bisect.bisect_right(begins, place) - 1
        shard, window = order[turn], place - begins[turn]
        if self.sequence_start == "document":
            return self.shards[shard], int(self._documents_of(shard)[window])
        return self.shards[shard], self._shift_of(epoch, shard) + window * self.block_size

    def _shift(self, epoch: int, shard: int) -> int:
        """Tokens before the first window of a shard, of those that fill no whole window."""
        if epoch == 0 or not self.shuffle:
            return 0
        left_over = (self.shards[shard].tokens - 1) % self.block_size
        return int(self._random(1, epoch, len(self.shards) + 1 + shard)[0] % (left_over + 1))

    def _count(self, shard: int) -> int:
        if self.sequence_start == "document":
            return len(self._documents_of(shard))
        return max(0, (self.shards[shard].tokens - 1) // self.block_size)

    def _order_of_shards(self, epoch: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """The shards of an epoch, and the groups whose windows are shuffled together.

        Returns:
            (shards in their order, windows before each of them and in all, the first shard of each
            group, windows before each group and in all).
        """
        order = self._permutation(len(self.windows), epoch, 0).tolist()
        begins = [0, *accumulate(self.windows[shard] for shard in order)]
        firsts, starts, tokens, members = [], [], 0, 0
        for shard, begin in zip(order, begins, strict=False):
            tokens, members = tokens + self.shards[shard].tokens, members + 1
            if not firsts or tokens > GROUP_TOKENS or members > GROUP_SHARDS:
                firsts.append(shard)
                starts.append(begin)
                tokens, members = self.shards[shard].tokens, 1
        return order, begins, firsts, [*starts, begins[-1]]

    def _order_of_windows(self, epoch: int, group: int) -> np.ndarray:
        _, _, firsts, starts = self._shards_of(epoch)
        return self._permutation(starts[group + 1] - starts[group], epoch, firsts[group] + 1)

    def _permutation(self, count: int, epoch: int, stream: int) -> np.ndarray:
        """0 … count - 1 in an order that is the same on every machine.

        Sorted by the output of Philox, a counter-based generator (Salmon et al. 2011) whose
        integers numpy promises to keep; it does not promise that of `Generator.permutation`.
        """
        if not self.shuffle:
            return np.arange(count)
        return np.argsort(self._random(count, epoch, stream), kind="stable")

    def _random(self, count: int, epoch: int, stream: int) -> np.ndarray:
        """Philox's integers: stream 0 is for the order of shards, then windows', then shifts."""
        return np.random.Philox(key=[self.seed, (epoch << 32) + stream]).random_raw(count)


def document_sequences(shard: Shard, block_size: int) -> np.ndarray:
    """First tokens of a shard's windows, uint32 and ascending, when they begin with documents.

    The first window begins at the first token. The next one begins at the last document (its
    end-of-text token) that begins among the tokens that the one before predicts: the document that
    was cut off is read again from its beginning. A document longer than a window goes on in windows
    that begin where the one before ended. So every token of the shard is predicted, but for fewer
    than block_size at its end, and a document of at most block_size tokens is whole in a window.

    Raises:
        UserError: a damaged shard.
    """
    begins = _documents(shard)
    lengths = np.diff(begins, append=shard.tokens)
    further = (lengths - 1) // block_size  # windows that a document needs beyond its first
    last = begins + (further + 1) * block_size  # last token that its windows predict
    following = (np.searchsorted(begins, last, side="right") - 1).tolist()
    chosen = [0]  # documents at which a window begins
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
    """Which window of which dataset is the g-th of the run.

    The n-th window of a dataset with share s is due at (n + 1/2) / s; windows come in the order
    in which they are due. So each dataset always has its share of the windows, to within a few,
    and the g-th is found without going through those before it. Each dataset has epochs of its own.

    Args:
        orders: one for each dataset.
        shares: of the windows, which sum to 1.
        began: windows that the run had consumed when this mix began.
        before: windows of each dataset among those.
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
        """(shard, first token) of the windows g … g + count - 1."""
        dataset, number, _, skip = self._due(g - self.began, count)
        turns = zip(dataset[skip:].tolist(), number[skip:].tolist(), strict=True)
        return [self.orders[d].locate(self.before[d] + n) for d, n in turns][:count]

    def consumed(self, g: int) -> list[int]:
        """How many windows of each dataset are among the first g of the run."""
        dataset, _, passed, skip = self._due(g - self.began, 0)
        recent = np.bincount(dataset[:skip], minlength=len(self.orders))
        return [b + p + int(r) for b, p, r in zip(self.before, passed, recent, strict=True)]

    def _due(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, list[int], int]:
        """Windows that are due around `first` … `first + count`, in their order.

        Returns:
            (dataset of each, number of each within its dataset, windows of each dataset that come
            before all of these, how many of these come before `first`).
        """
        # At most len(shares) / 2 windows more or fewer than t are due by t.
        slack = 2 * len(self.shares)
        passed = [max(0, int((first - slack) * share)) for share in self.shares]
        ends = [int((first + count + slack) * share) + 1 for share in self.shares]
        spans = list(zip(passed, ends, strict=True))
        number = np.concatenate([np.arange(low, high) for low, high in spans])
        dataset = np.repeat(np.arange(len(spans)), [high - low for low, high in spans])
        due = (number + 0.5) / np.array(self.shares)[dataset]
        turn = np.lexsort((dataset, due))
        return dataset[turn], number[turn], passed, first - sum(passed)
