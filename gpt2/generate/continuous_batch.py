"""`BatchDecoder`: sequences that join and leave while others go on (Yu et al. 2022, "Orca", OSDI).

Every pass reads the newest token of all rows together; a row keeps its place only while it is
written. Rows have settings and seeds of their own and get the tokens that they would get alone, up
to the rounding of products with more or fewer rows; on a GPU, whose recorded pass always has all
rows, there is no such difference.

Shapes: `B` rows, `V` vocabulary.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.gpt import GPT
from .decoder import LAG, Decoder
from .sampling import Sampling, choose, uniforms


@dataclass(eq=False, kw_only=True)
class Row:
    """A sequence in the making.

    Args:
        tokens: the prompt, at least one token; what is written is appended.
        limit: tokens to write, at least one; prompt and limit fit into the context.
        sampling: how they are drawn.
        seed: as in `generate.stream`; None for other tokens every time.
    """

    tokens: list[int]
    limit: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    ended: bool = False  # anyone may set it: the row leaves before the next pass
    passes: int = 0  # begun; on a GPU ahead of the tokens that have arrived
    numbers: list[float] = field(default_factory=list)  # what its tokens are drawn with


class BatchDecoder(Decoder):
    """Up to `slots` rows that are written together. For one thread.

    On a GPU the memory for all of them is taken at once; elsewhere it grows with the rows.

    Args:
        model: on any device; switched to evaluation mode. Its weights must stay as they are.
        slots: rows at a time.
        graph: record the pass as a CUDA graph.
    """

    @torch.inference_mode()
    def __init__(self, model: GPT, slots: int, *, graph: bool = False):
        self.slots, self.scores = slots, None
        rows, block_size = slots if graph else 1, model.config.block_size
        super().__init__(model, rows, block_size, Sampling(), static=True, graph=graph)
        self.few = self.few and graph  # without one there may soon be many
        if self.head is not None:
            self.head[: model.config.vocab_size] = model.transformer.wte.weight
        self.tokens = self.tokens if graph else self.tokens.new_zeros(slots)
        self.seen = torch.zeros(
            (slots, model.config.vocab_size), dtype=torch.bool, device=self.device
        )
        self.starts, self.filled = [0] * slots, [0] * slots
        self.rows: list[Row] = []  # the first of the cache's
        self.sent: deque[tuple[list[Row], Tensor, torch.cuda.Event | None]] = deque()

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.rows or self.sent)

    @torch.inference_mode()
    def join(self, row: Row):
        """Reads a prompt; the row is written from the next step on."""
        at = len(self.rows)
        assert at < self.slots, "no free slot"
        assert row.tokens, "a prompt needs a token"
        assert 0 < row.limit <= self.block_size - len(row.tokens), row
        row.numbers = uniforms(row.seed, 1, row.limit).flatten().tolist()
        if at == self.cache.keys.shape[1]:
            self._grow()
        self.rows.append(row)
        self._read([at], [r.tokens for r in self.rows])
        self.tokens[at] = row.tokens[-1]
        self.seen[at] = False
        self.seen[at, torch.tensor(row.tokens, device=self.device)] = True

    @torch.inference_mode()
    def leave(self):
        """Takes out rows that have ended; the last ones move into their places."""
        for at in reversed(range(len(self.rows))):
            if self.rows[at].ended or self.rows[at].passes == self.rows[at].limit:
                row, last = self.rows.pop(), len(self.rows)
                if at < last:
                    self.rows[at] = row
                    self.cache.take(at, self.cache, last)
                    self.filled[at] = self.filled[last]
                    self.tokens[at], self.seen[at] = self.tokens[last], self.seen[last]

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, int]]:
        """A pass for all rows; gives the tokens that have arrived, of rows that have not ended.

        A row whose limit is reached has ended. With a graph tokens come `LAG` steps late.
        """
        self.leave()
        if self.rows:
            count = len(self.rows)
            uniform = torch.tensor([row.numbers[row.passes] for row in self.rows])
            self._choose_by_row(self._scores(), uniform.to(self.device, non_blocking=True))
            self.filled[:count] = [filled + 1 for filled in self.filled[:count]]
            for row in self.rows:
                row.passes += 1
            self.sent.append((list(self.rows), *self._send()))
        arrived: list[tuple[Row, int]] = []
        while len(self.sent) > (LAG if self.graph and self.rows else 0):
            arrived += self._arrived()
        return arrived

    def _scores(self) -> Tensor:
        """Logits of the rows, (B, V), or with a graph of all slots."""
        count = len(self.rows)
        lengths = torch.tensor(self.filled[:count] + [0] * (len(self.cache.lengths) - count))
        self.cache.lengths.copy_(lengths, non_blocking=True)
        if self.graph:
            self.graph.replay()
            return self.scores
        part = self.cache.first(count)
        part.length = max(self.filled[:count])
        return self._logits_after(self.tokens[:count], part)

    def _choose(self, logits: Tensor):
        """What is recorded ends with the logits: each row chooses in its own way."""
        self.scores = logits

    def _choose_by_row(self, scores: Tensor, uniform: Tensor):
        """The next token of every row; rows of the same settings choose together."""
        alike: dict[Sampling, list[int]] = {}
        for at, row in enumerate(self.rows):
            alike.setdefault(row.sampling, []).append(at)
        for sampling, numbers in alike.items():
            at = torch.tensor(numbers).to(self.device, non_blocking=True)
            tokens = choose(scores[at], uniform[at], sampling, self.seen[at])
            self.tokens[at] = tokens
            self.seen[at, tokens] = True

    def _arrived(self) -> list[tuple[Row, int]]:
        rows, tokens, event = self.sent.popleft()
        if event:
            event.synchronize()
        arrived = []
        for row, token in zip(rows, tokens[: len(rows)].tolist(), strict=True):
            if not row.ended:
                row.tokens.append(token)
                arrived.append((row, token))
        return arrived

    def _grow(self):
        old, rows = self.cache, min(self.slots, 2 * self.cache.keys.shape[1])
        self.cache = self.model.new_cache(rows, old.keys.dtype, old.keys.shape[3])
        self.cache.lengths = old.lengths.new_zeros(rows)
        for row in range(len(self.rows)):
            self.cache.take(row, old, row)
