"""`BatchDecoder`: continuous batching (Yu et al. 2022, "Orca", OSDI).

Sequences join and leave the batch between steps while others go on. Each has its own sampling
settings and seed. Its tokens are those that it would get alone, up to rounding of matmuls with more
or fewer rows. On a GPU, where the recorded step always computes all slots, the other rows have no
effect at all.

Shapes: `B` rows, `V` vocabulary.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.gpt import LanguageModel
from .cached_forward import CachedForward, HostCopy
from .decoder import LAG
from .logprobs import LogprobsCopy, TokenLogprobs
from .sampling import Sampling, choose, uniforms

PROMPT_POSITIONS = 128  # of which logits are held at once: 26 MB in float32


@dataclass(eq=False, kw_only=True)
class Generation:
    """A text being generated.

    Args:
        tokens: the prompt, at least one token; new tokens are appended.
        limit: new tokens to generate, at least one. Prompt and new tokens fit into the context; the
            last new token, which predicts nothing, may lie one position behind it.
        sampling: how they are chosen.
        seed: as in `generate.stream`; None for different tokens every time.
        top_logprobs: keep the log-probability of each new token, and those of so many likeliest
            tokens in its place; None for none at all.
        prompt_logprobs: with `top_logprobs`, begin with those of the prompt's tokens.
        ended: may be set from any thread; the generation leaves before the next step.
    """

    tokens: list[int]
    limit: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    ended: bool = False
    steps: int = 0  # begun; on a GPU ahead of the tokens that have arrived
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    uniform: list[float] = field(default_factory=list)  # a random number for each new token


class BatchDecoder:
    """Generates up to `slots` texts together. Not thread-safe.

    Row i of the cache belongs to `running[i]`. On a GPU memory for all slots is allocated at once;
    elsewhere the cache grows with the number of rows.

    Args:
        model: on any device; switched to evaluation mode. Its weights must no longer change.
        slots: texts at a time.
        graph: record a step as a CUDA graph. The graph ends with the logits of all slots: tokens
            are chosen outside, since every row has its own settings.
    """

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, slots: int, *, graph: bool = False):
        self.model, self.slots = model.eval(), slots
        self.device = model.transformer.wte.weight.device
        self.block_size = model.config.block_size
        self.forward = CachedForward(
            model,
            slots if graph else 1,
            self.block_size,
            per_row_lengths=True,
            few_rows=graph,  # without a graph the cache may soon have many rows
        )
        self.forward.copy_head()
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=self.device)  # the newest
        shape = (slots, model.config.vocab_size)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.filled = [0] * slots  # tokens of each row but the newest
        self.running: list[Generation] = []
        self._sent: deque[tuple[list[Generation], HostCopy, LogprobsCopy | None]] = deque()
        self._recorded_logits: Tensor | None = None  # (slots, V), written by each replay
        self.graph = self.forward.record(self._recorded_step) if graph else None

    def _recorded_step(self) -> None:
        self._recorded_logits = self.forward.next_logits(self.tokens)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.running or self._sent)

    def holds(self, generation: Generation) -> bool:
        """Whether a generation has a row, or tokens that have not arrived yet."""
        sent = (generation in generations for generations, _, _ in self._sent)
        return generation in self.running or any(sent)

    @torch.inference_mode()
    def join(self, generation: Generation) -> None:
        """Gives a generation a row and reads its prompt; the next step writes its first token."""
        at, prompt = len(self.running), generation.tokens
        assert at < self.slots, "no free slot"
        assert prompt, "a prompt needs a token"
        assert 0 < generation.limit <= self.block_size - len(prompt) + 1, generation
        generation.uniform = uniforms(generation.seed, 1, generation.limit).flatten().tolist()
        if at == self.forward.rows:
            self._grow()
        self.running.append(generation)
        hidden = self.forward.prefill([at], [prompt[:-1]])
        if generation.prompt_logprobs:
            self._keep_prompt_logprobs(generation, hidden)
        self.filled[at] = len(prompt) - 1
        self.tokens[at] = prompt[-1]
        self.seen[at] = False
        self.seen[at, torch.tensor(prompt, device=self.device)] = True

    @torch.inference_mode()
    def leave(self) -> None:
        """Removes generations that have ended; the last rows move into their places."""
        for at in reversed(range(len(self.running))):
            if self.running[at].ended or self.running[at].steps == self.running[at].limit:
                moved, last = self.running.pop(), len(self.running)
                if at < last:
                    self.running[at] = moved
                    self.forward.cache.take(at, self.forward.cache, last)
                    self.filled[at] = self.filled[last]
                    self.tokens[at], self.seen[at] = self.tokens[last], self.seen[last]

    @torch.inference_mode()
    def step(self) -> list[tuple[Generation, int]]:
        """Computes one token for every row; returns the tokens that have arrived on the CPU.

        With a CUDA graph tokens arrive `LAG` steps late. Tokens of generations that have ended
        meanwhile are dropped. A generation whose limit is reached leaves before the next step.
        """
        self.leave()
        if self.running:
            count = len(self.running)
            numbers = [g.uniform[g.steps] for g in self.running]
            uniform = torch.tensor(numbers, dtype=torch.float32, device="cpu")
            logits = self._logits()
            self._choose(logits, uniform.to(self.device, non_blocking=True))
            logprobs = self._logprobs(logits)
            self.filled[:count] = [filled + 1 for filled in self.filled[:count]]
            for generation in self.running:
                generation.steps += 1
            tokens = HostCopy(self.tokens, wait=not self.graph)
            self._sent.append((list(self.running), tokens, logprobs))
        arrived: list[tuple[Generation, int]] = []
        while len(self._sent) > (LAG if self.graph and self.running else 0):
            arrived += self._receive()
        return arrived

    def _logits(self) -> Tensor:
        """Logits after the newest tokens: (B, V) of all rows, or of all slots with a graph."""
        count, cache = len(self.running), self.forward.cache
        assert cache.lengths is not None  # `per_row_lengths`
        filled = self.filled[:count] + [0] * (len(cache.lengths) - count)
        lengths = torch.tensor(filled, device="cpu")
        cache.lengths.copy_(lengths, non_blocking=True)
        if self.graph:
            self.graph.replay()
            assert self._recorded_logits is not None  # written while recording
            return self._recorded_logits
        part = cache.first(count)
        part.length = max(self.filled[:count])
        return self.forward.next_logits(self.tokens[:count], part)

    def _choose(self, logits: Tensor, uniform: Tensor) -> None:
        """Chooses the next token of every row; rows with equal settings are chosen together."""
        rows_of: dict[Sampling, list[int]] = {}
        for at, generation in enumerate(self.running):
            rows_of.setdefault(generation.sampling, []).append(at)
        for sampling, rows in rows_of.items():
            index = torch.tensor(rows).to(self.device, non_blocking=True)
            tokens = choose(logits[index], uniform[index], sampling, self.seen[index])
            self.tokens[index] = tokens
            self.seen[index, tokens] = True

    def _logprobs(self, logits: Tensor) -> LogprobsCopy | None:
        """Log-probabilities (B rows) of the newest tokens, for the rows that keep them."""
        wanted = [(at, g.top_logprobs) for at, g in enumerate(self.running)]
        rows = [at for at, count in wanted if count is not None]
        if not rows:
            return None
        most = max(count for _, count in wanted if count is not None)
        index = torch.tensor(rows).to(self.device, non_blocking=True)
        return LogprobsCopy(logits[index], self.tokens[index], most, wait=not self.graph)

    def _keep_prompt_logprobs(self, generation: Generation, hidden: Tensor | None) -> None:
        """Log-probabilities of the prompt; `hidden` is (1, T, C) of all its tokens but the last."""
        prompt, count = generation.tokens, generation.top_logprobs or 0
        generation.logprobs.append(TokenLogprobs(prompt[0], None, ()))
        if hidden is None:
            return
        targets = torch.tensor(prompt[1:], device=self.device)
        parts = zip(hidden[0].split(PROMPT_POSITIONS), targets.split(PROMPT_POSITIONS), strict=True)
        for part, tokens in parts:
            logits = self.forward.logits(part)
            generation.logprobs += LogprobsCopy(logits, tokens, count, wait=True).get()

    def _receive(self) -> list[tuple[Generation, int]]:
        """Waits for the oldest tokens on their way to the CPU and appends them."""
        generations, copy, logprobs = self._sent.popleft()
        keeping = [g for g in generations if g.top_logprobs is not None]
        for generation, found in zip(keeping, logprobs.get() if logprobs else (), strict=True):
            top = found.top[: generation.top_logprobs]
            generation.logprobs.append(found._replace(top=top))
        arrived = []
        for generation, token in zip(generations, copy.get(), strict=False):  # then free slots
            if not generation.ended:
                generation.tokens.append(token)
                arrived.append((generation, token))
        return arrived

    def _grow(self) -> None:
        """Doubles the rows of the cache, up to the number of slots."""
        old, rows = self.forward.cache, min(self.slots, 2 * self.forward.rows)
        cache = self.model.new_cache(rows, old.keys.dtype, self.forward.capacity)
        cache.lengths = torch.zeros(rows, dtype=torch.int64, device=self.device)
        for row in range(len(self.running)):
            cache.take(row, old, row)
        self.forward.cache = cache
