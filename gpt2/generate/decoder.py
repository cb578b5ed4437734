"""`Decoder`: generates the tokens of several sequences, one step at a time.

A step, which appends one token to every sequence, has three forms:

- plain: a forward pass over the KV cache (or, as a reference, over all tokens without a cache);
- CUDA graph: the same pass and the choice of the tokens, recorded once and replayed. Launching the
  kernels one by one takes ten times as long as running them;
- speculative decoding (one float32 sequence on a CPU): several tokens per step, see `speculative`.

When the context is full, a sequence drops its older half: its newest block_size // 2 tokens are
read again, and generation goes on.

Shapes: `B` rows (sequences), `N` new tokens, `V` vocabulary.
"""

import time
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from ..model.evaluation_mode import check_logits
from ..model.gpt import LanguageModel
from .cached_forward import CachedForward, HostCopy, pad
from .sampling import Sampling, choose, uniforms
from .speculative import DRAFT_TOKENS, SpeculativeDecoding

GRAPH_MIN_TOKENS = 12  # recording takes about as long as so many steps
LAG = 2  # steps that the GPU runs ahead of the tokens read from it


class Decoder:
    """Continues `batch_size` sequences; `write` may be called repeatedly.

    Args:
        model: on any device; switched to evaluation mode.
        batch_size: sequences at a time.
        capacity: positions to reserve for prompt and new tokens; at most block_size are used.
        sampling: how tokens are chosen.
        use_cache: False recomputes all positions for every token, as a reference.
        static: keep the lengths of the rows in a tensor; needed for prompts of different lengths.
        graph: record a step as a CUDA graph; implies `static`.
        draft: speculative decoding; for one sequence, and weights that no longer change.
        packed: see `CachedForward`.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        capacity: int,
        sampling: Sampling,
        *,
        use_cache: bool = True,
        static: bool = False,
        graph: bool = False,
        draft: bool = False,
        packed: bool = False,
    ):
        assert not draft or (batch_size == 1 and use_cache and not static and not graph)
        self.model, self.sampling = model.eval(), sampling
        self.checked = False  # whether its logits are numbers; without a graph, which has none
        self.greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
        self.device = model.transformer.wte.weight.device
        self.block_size = model.config.block_size
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=self.device)  # the newest
        self.uniform = torch.zeros(batch_size, device=self.device)
        self.seen: Tensor | None = None  # (B, V) tokens that the repetition penalty applies to
        if sampling.repetition_penalty != 1:
            shape = (batch_size, model.config.vocab_size)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        # of each row: its first token in the context, and its tokens there but the newest
        self.starts, self.filled = [0] * batch_size, [0] * batch_size
        self.forward: CachedForward | None = None
        if use_cache:
            self.forward = CachedForward(
                model, batch_size, capacity, per_row_lengths=static or graph, packed=packed
            )
        self.speculative = SpeculativeDecoding(model, sampling) if draft else None
        self.graph = None
        if graph:
            assert self.forward is not None  # a graph needs a cache
            self.graph = self.forward.record(self._recorded_step)

    def write(
        self, prompts: list[list[int]], max_new_tokens: int, seed: int | None = None
    ) -> Iterator[list[int]]:
        """Continues prompts; yields the new token of each, N times.

        Args:
            prompts: at least one token each; lengths may differ only with `static`.
            max_new_tokens: N.
            seed: row i uses seed + i; its tokens depend on its prompt, the settings and this number
                alone, up to rounding of matmuls with more or fewer rows.

        Raises:
            UserError: the network's first logits are not finite. A CUDA graph does not look.
        """
        steps = self._write(prompts, max_new_tokens, seed)
        # Not as a decorator: PyTorch's fails for a text that is still open when Python ends.
        while True:
            with torch.inference_mode():
                tokens = next(steps, None)
            if tokens is None:
                return
            yield tokens

    def _write(
        self, prompts: list[list[int]], max_new_tokens: int, seed: int | None
    ) -> Iterator[list[int]]:
        rows = [list(prompt) for prompt in prompts]
        self._check_room(rows, max_new_tokens)
        numbers = uniforms(seed, len(rows), max_new_tokens).to(self.device)
        self._begin(rows)
        sent: deque[HostCopy] = deque()
        to_read, done = list(range(len(rows))), 0
        while done < max_new_tokens:
            if to_read:
                while sent:  # the tokens to read again must have arrived
                    yield _receive(sent, rows)
                self._read(to_read, rows, begins=done == 0)
            limit = min(DRAFT_TOKENS, max_new_tokens - done, self.block_size - self.filled[0])
            if self.speculative and self.speculative.pays() and limit > 1:
                for token in self._speculate(numbers[done : done + limit]):
                    rows[0].append(token)
                    done += 1
                    yield [token]
            else:
                self._step(numbers[done], rows)
                sent.append(self._send())
                done += 1
                if len(sent) > (LAG if self.graph else 0):
                    yield _receive(sent, rows)
            to_read = [i for i, filled in enumerate(self.filled) if filled == self.block_size]
        while sent:
            yield _receive(sent, rows)

    def _check_room(self, rows: list[list[int]], max_new_tokens: int) -> None:
        if self.forward is None:
            return
        equal = len({len(row) for row in rows}) == 1
        assert equal or self.forward.cache.lengths is not None, "rows of different lengths"
        needed = min(self.block_size, max(map(len, rows)) + max_new_tokens - 1)
        assert needed <= self.forward.capacity, "the decoder's capacity is too small"

    def _begin(self, rows: list[list[int]]) -> None:
        if self.forward is not None:
            self.forward.copy_head()  # the weights may have changed since the last call
        self.tokens.copy_(torch.tensor([row[-1] for row in rows], device="cpu"))
        if self.seen is not None:
            self.seen.zero_()
            for i, row in enumerate(rows):
                self.seen[i, torch.tensor(row, device=self.device)] = True

    def _read(self, numbers: list[int], rows: list[list[int]], *, begins: bool) -> None:
        """Fills the cache of some rows with all tokens of their context but the newest."""
        half = max(1, self.block_size // 2)
        for i in numbers:
            length = len(rows[i]) if len(rows[i]) <= self.block_size else half
            self.starts[i], self.filled[i] = len(rows[i]) - length, length - 1
        if self.forward is not None:
            prompts = [rows[i][self.starts[i] : -1] for i in numbers]
            self.forward.prefill(numbers, prompts, may_record=begins)

    def _step(self, uniform: Tensor, rows: list[list[int]]) -> None:
        """Reads the newest token of every row and chooses the next; `uniform` is (B,)."""
        began = time.perf_counter()
        if self.sampling.temperature > 0:  # else it is not read
            self.uniform.copy_(uniform)
        if self.graph:
            self.graph.replay()
        elif self.forward is not None:
            self.forward.cache.length = max(self.filled)
            self._choose_checked(self.forward.next_logits(self.tokens))
        else:
            self._choose_checked(self._logits_without_cache(rows))
        self.filled = [filled + 1 for filled in self.filled]
        if self.speculative:
            self.speculative.single_step_seconds = time.perf_counter() - began

    def _send(self) -> HostCopy:
        """Starts to copy the newest tokens to the CPU."""
        if self.graph and self.kernel_chooses:
            assert self.forward is not None
            at = self.filled[0] - 1
            told = self.forward.one_kernel.told[at : at + 1]
            return HostCopy(told, wait=False, written_by=self.device)
        return HostCopy(self.tokens, wait=not self.graph)

    @property
    def kernel_chooses(self) -> bool:
        """Whether one kernel computes the logits and chooses the token."""
        return self.greedy and self.forward is not None and self.forward.one_kernel is not None

    def _recorded_step(self) -> None:
        assert self.forward is not None
        if self.kernel_chooses:
            self.forward.one_kernel.next_logits(self.tokens, choose=True)
        else:
            self._choose(self.forward.next_logits(self.tokens))

    def _logits_without_cache(self, rows: list[list[int]]) -> Tensor:
        """(B, V) after each row's context, computed from all of its tokens."""
        visible = [row[start:] for row, start in zip(rows, self.starts, strict=True)]
        lengths = [len(row) for row in visible]
        hidden = self.model.hidden(pad(visible, max(lengths)).to(self.device))
        return self.model.logits(hidden[range(len(rows)), [n - 1 for n in lengths]])

    def _choose_checked(self, logits: Tensor) -> None:
        if not self.checked:
            check_logits(logits)
            self.checked = True
        self._choose(logits)

    def _choose(self, logits: Tensor) -> None:
        self.tokens.copy_(choose(logits, self.uniform, self.sampling, self.seen))
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, None], True)

    def _speculate(self, uniform: Tensor) -> list[int]:
        """The tokens of one round of speculative decoding; `uniform` is (n, 1)."""
        assert self.forward is not None
        assert self.speculative is not None
        cache, start = self.forward.cache, self.filled[0]
        tokens = self.speculative.write(self.tokens, uniform, cache, start, self.seen)
        self.tokens.fill_(tokens[-1])
        self.filled[0] = start + len(tokens)
        return tokens


def _receive(sent: deque[HostCopy], rows: list[list[int]]) -> list[int]:
    """Waits for the oldest tokens on their way to the CPU and appends them to their rows."""
    tokens = sent.popleft().get()
    for row, token in zip(rows, tokens, strict=True):
        row.append(token)
    return tokens
