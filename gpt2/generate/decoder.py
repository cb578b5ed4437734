"""`Decoder`: tokens one after the other from a model, with memory and programs that are reused.

Three ways to the same tokens:

- in turn: one forward pass per token, over a cache with static shapes;
- CUDA graph (a GPU): that pass, with the choice of the token in it, is recorded once and replayed,
  since launching its kernels one by one takes ten times as long as running them; with few
  sequences it is the pass of `one_token`, which has half as many kernels;
- draft and check (one sequence in float32 on a CPU): a pass is bound by reading the weights, so a
  copy of them with half the bytes drafts tokens and one in float32, in the order in which products
  of a dozen rows read it, checks so many at a time (Leviathan et al. 2023, with the same random
  number for both choices). What is kept are the choices of the float32 weights alone.

When the context is full, a row forgets the older half of it: its newest block_size // 2 tokens are
read again and it goes on.

Shapes: `B` sequences, `N` new tokens, `V` vocabulary.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.model import ModernConfig
from ..model.gpt import GPT
from ..model.kv_cache import KVCache
from . import few_token_pass
from .sampling import Sampling, choose, uniforms

DRAFT_TOKENS = 12  # checked in one pass
DRAFT_MIN_PARAMETERS = 30_000_000  # smaller models are not bound by reading weights
GRAPH_MIN_TOKENS = 12  # recording takes as long as about as many passes
LAG = 2  # passes that the GPU is ahead of what has been read from it


class Decoder:
    """Continues `batch_size` sequences; `write` may be called again and again.

    Args:
        model: on any device; switched to evaluation mode.
        batch_size: sequences at a time.
        capacity: positions to keep room for, prompt and new tokens; at most block_size are used.
        sampling: how tokens are drawn.
        use_cache: False computes everything anew for every token, for comparison.
        static: lengths as a tensor even where all rows are equally long; graphs need it.
        graph: record the pass as a CUDA graph.
        draft: draft and check; for one sequence, and for weights that stay as they are.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: GPT,
        batch_size: int,
        capacity: int,
        sampling: Sampling,
        *,
        use_cache: bool = True,
        static: bool = False,
        graph: bool = False,
        draft: bool = False,
    ):
        assert not draft or (batch_size == 1 and use_cache and not static and not graph)
        self.model, self.sampling, self.use_cache = model.eval(), sampling, use_cache
        weight = model.transformer.wte.weight
        self.device, self.block_size = weight.device, model.config.block_size
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=self.device)  # the newest
        self.uniform = torch.zeros(batch_size, device=self.device)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            shape = (batch_size, model.config.vocab_size)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.starts, self.filled = [0] * batch_size, [0] * batch_size
        self.cache = None
        if use_cache:
            capacity = min(self.block_size, -(-capacity // 64) * 64)  # whole blocks of the kernel
            self.cache = model.new_cache(batch_size, _dtype(weight), capacity)
            if static or graph:
                self.cache.lengths = torch.zeros_like(self.tokens)
        self.head = None
        static, autocast = static or graph, torch.is_autocast_enabled(self.device.type)
        few = use_cache and static and not autocast and batch_size <= few_token_pass.FEW_ROWS
        self.few = few and few_token_pass.knows(model)
        plain = not isinstance(model.config, ModernConfig)
        if self.device.type == "cuda" and use_cache and plain and not self.few:
            # padded once, not for every token
            self.head = weight.new_zeros(model.config.padded_vocab_size, weight.shape[1])
        self.draft = _Draft(model) if draft else None
        self.graph = self._record() if graph else None

    @torch.inference_mode()
    def write(
        self, prompts: list[list[int]], max_new_tokens: int, seed: int | None = None
    ) -> Iterator[list[int]]:
        """Continues prompts of at least one token; yields N times a new token for each of them.

        Rows differ in length only with `static`. Row i depends on its prompt, the settings and
        seed + i alone, up to the rounding of products with more or fewer rows.
        """
        rows = [list(prompt) for prompt in prompts]
        even = len({len(row) for row in rows}) == 1
        assert even or self.cache is None or self.cache.lengths is not None
        if self.cache is not None:
            needed = min(self.block_size, max(map(len, rows)) + max_new_tokens - 1)
            assert needed <= self.cache.keys.shape[3], "the decoder's capacity is too small"
        numbers = uniforms(seed, len(rows), max_new_tokens).to(self.device)
        self._begin(rows)
        sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        to_read, done = list(range(len(rows))), 0
        while done < max_new_tokens:
            if to_read:
                while sent:  # what is read again must have arrived
                    yield _receive(sent, rows)
                self._read(to_read, rows)
            limit = min(DRAFT_TOKENS, max_new_tokens - done, self.block_size - self.filled[0])
            if self.draft and self.draft.pays() and limit > 1:
                for token in self._draft_and_check(numbers[done : done + limit]):
                    rows[0].append(token)
                    done += 1
                    yield [token]
            else:
                self._pass(numbers[done], rows)
                sent.append(self._send())
                done += 1
                if len(sent) > (LAG if self.graph else 0):
                    yield _receive(sent, rows)
            to_read = [i for i, filled in enumerate(self.filled) if filled == self.block_size]
        while sent:
            yield _receive(sent, rows)

    def _begin(self, rows: list[list[int]]):
        if self.head is not None:  # the weights may have changed since the last call
            self.head[: self.model.config.vocab_size] = self.model.transformer.wte.weight
        self.tokens.copy_(torch.tensor([row[-1] for row in rows]))
        if self.seen is not None:
            self.seen.zero_()
            for i, row in enumerate(rows):
                self.seen[i, torch.tensor(row, device=self.device)] = True

    def _read(self, numbers: list[int], rows: list[list[int]]):
        """Fills the cache of some rows with all tokens they may see but the newest."""
        half = max(1, self.block_size // 2)
        for i in numbers:
            length = len(rows[i]) if len(rows[i]) <= self.block_size else half
            self.starts[i], self.filled[i] = len(rows[i]) - length, length - 1
        if self.cache is None:
            return
        windows = [rows[i][self.starts[i] : -1] for i in numbers]
        lengths = [len(window) for window in windows]
        cache, self.cache.length = self.cache, 0
        if cache.lengths is not None:
            cache.rows = torch.tensor(numbers, device=self.device)
            cache.lengths[cache.rows] = torch.tensor(lengths, device=self.device)
        try:
            if max(lengths):  # causal, so what is appended to short rows is not seen by them
                padded = [window + [0] * (max(lengths) - len(window)) for window in windows]
                self.model.hidden(torch.tensor(padded, device=self.device), cache)
        finally:
            cache.rows = None

    def _pass(self, uniform: Tensor, rows: list[list[int]]):
        """Reads the newest token of every row and chooses the next."""
        began = time.perf_counter()
        self.uniform.copy_(uniform)
        if self.graph:
            self.graph.replay()
        else:
            if self.cache is not None:
                self.cache.length = max(self.filled)
            self._choose(self._logits(rows))
        self.filled = [filled + 1 for filled in self.filled]
        if self.draft:
            self.draft.plain_seconds = time.perf_counter() - began

    def _logits(self, rows: list[list[int]]) -> Tensor:
        if self.cache is None:
            windows = [row[start:] for row, start in zip(rows, self.starts, strict=True)]
            longest = max(map(len, windows))
            padded = [window + [0] * (longest - len(window)) for window in windows]
            hidden = self.model.hidden(torch.tensor(padded, device=self.device))
            return self.model.logits(hidden[range(len(rows)), [len(w) - 1 for w in windows]])
        return self._logits_after(self.tokens, self.cache)

    def _logits_after(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """(B, V) after one more token (B,) of every row of a cache."""
        with _on(self.device):  # where Triton launches
            if self.few:
                return few_token_pass.next_logits(self.model, tokens[:, None], cache)
            hidden = self.model.hidden(tokens[:, None], cache)[:, -1]
        if self.head is None:
            return self.model.logits(hidden)
        return F.linear(hidden, self.head)[:, : self.model.config.vocab_size]

    def _choose(self, logits: Tensor):
        self.tokens.copy_(choose(logits, self.uniform, self.sampling, self.seen))
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, None], True)

    def _record(self) -> torch.cuda.CUDAGraph:
        with _on(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries make their workspaces in the first pass
                for length in (0, 0):
                    self._trial(length)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._trial(self.cache.keys.shape[3] - 1)
        return graph

    def _trial(self, length: int):
        """One pass for its effects on the device; `length` counts where no kernel reads lengths."""
        self.cache.length = length
        self._choose(self._logits([]))

    def _send(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The newest tokens on their way to the CPU, and the event of their arrival."""
        if not self.graph:
            return self.tokens.clone(), None
        with _on(self.device):
            target = torch.empty(self.tokens.shape, dtype=torch.int64, pin_memory=True)
            target.copy_(self.tokens, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return target, event

    def _draft_and_check(self, uniform: Tensor) -> list[int]:
        """At least one token, and one for each row of (n, 1) numbers if all guesses are right."""
        began = time.perf_counter()
        cache, start = self.cache, self.filled[0]
        cache.length = start
        seen = None if self.seen is None else self.seen.clone()
        guesses = [self.tokens]
        for u in uniform[:-1]:
            token = choose(self.draft.logits(guesses[-1], cache), u, self.sampling, seen)
            if seen is not None:
                seen[0, token] = True
            guesses.append(token)
        cache.length = start  # the check writes its own keys and values over those of the draft
        tokens: list[int] = []
        for i, logits in enumerate(self.draft.check(torch.stack(guesses, dim=1), cache)):
            self.uniform.copy_(uniform[i])
            self._choose(logits[None])
            tokens.append(self.tokens.item())
            if i + 1 < len(guesses) and tokens[-1] != guesses[i + 1].item():
                break
        self.filled[0] = start + len(tokens)
        self.draft.count(len(tokens), time.perf_counter() - began)
        return tokens


class _Draft:
    """Copies of the matrices: in float16 to guess a token, in float32 to check a dozen."""

    def __init__(self, model: GPT):
        self.model = model
        layers = [model.transformer.wte]
        for block in model.transformer.h:
            layers += block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
        self.halves = {layer: few_token_pass.half_linear(layer) for layer in layers}
        self.packed = {layer: few_token_pass.packed_linear(layer, DRAFT_TOKENS) for layer in layers}
        self.plain_seconds = 0.0
        self.rounds, self.tokens, self.seconds = 0, 0, 0.0

    def logits(self, token: Tensor, cache: KVCache) -> Tensor:
        """A guess, (1,) -> (1, V)."""
        return few_token_pass.next_logits(self.model, token[:, None], cache, _by(self.halves))

    def check(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """What the model says, (1, T) -> (T, V)."""
        return few_token_pass.next_logits(self.model, tokens, cache, _by(self.packed))

    def count(self, tokens: int, seconds: float):
        """Takes note of a round."""
        self.rounds, self.tokens = self.rounds + 1, self.tokens + tokens
        self.seconds += seconds

    def pays(self) -> bool:
        """Whether drafting is faster than the pass in turn, which is measured first."""
        if not self.plain_seconds or self.rounds < 3:
            return bool(self.plain_seconds)
        return self.seconds < self.plain_seconds * self.tokens


def _by(copies: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Callable[..., Tensor]:
    """`one_token.product` by copies of the layers."""

    return lambda x, layer, **given: few_token_pass.around(copies[layer], x, **given)


def _receive(sent: deque[tuple[Tensor, torch.cuda.Event | None]], rows: list[list[int]]):
    """The oldest tokens on their way, (B,) as a list; appends them to their rows."""
    tokens, event = sent.popleft()
    if event:
        event.synchronize()
    new = tokens.tolist()
    for row, token in zip(rows, new, strict=True):
        row.append(token)
    return new


def _dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
