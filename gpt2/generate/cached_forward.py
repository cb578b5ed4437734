"""`CachedForward`: prefill of prompts and one-token steps over a KV cache, also as a CUDA graph.

Shapes: `B` rows, `C` channels, `V` vocabulary.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.gpt import LanguageModel
from ..model.kv_cache import KVCache
from . import few_token_pass, many_row_pass

# Tokens: prompts are padded to multiples of the one, and recorded up to the other. Longer ones keep
# a GPU busy while their kernels are launched.
PROMPT_STEP, PROMPT_LONGEST = 64, 512


class CachedForward:
    """A model's forward pass for generation: `prefill` reads prompts, `next_logits` one token each.

    Where steps are recorded as a CUDA graph, reading a prompt of GPT-2 is recorded too, once a
    prompt of about its length came before. Launching its kernels one by one takes 6 ms for 124M,
    running them 1 ms. A graph for each of eight lengths keeps its activations.

    Args:
        model: in evaluation mode, on its device.
        rows: rows of the KV cache.
        capacity: positions of the KV cache.
        per_row_lengths: keep a length for each row, as a tensor. Rows of different lengths and
            CUDA graphs need it.
        packed: multiply by a packed copy of the weights, see `few_token_pass.packed_linear`; for
            several rows on a CPU, of a model that `few_token_pass.supports`, whose weights no
            longer change.
        few_rows: use the few-kernel pass of `few_token_pass` if the rows are few enough; False if
            rows may be added later.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: int,
        capacity: int,
        *,
        per_row_lengths: bool = False,
        packed: bool = False,
        few_rows: bool = True,
    ):
        self.model = model
        weight = model.transformer.wte.weight
        self.device = weight.device
        capacity = min(model.config.block_size, -(-capacity // 64) * 64)  # whole kernel blocks
        self.cache: KVCache = model.new_cache(rows, _dtype(weight), capacity)
        if per_row_lengths:
            self.cache.lengths = torch.zeros(rows, dtype=torch.int64, device=self.device)
        autocast = torch.is_autocast_enabled(self.device.type)
        own = per_row_lengths and not autocast and few_token_pass.supports(model)
        self.few = own and few_rows and rows <= few_token_pass.FEW_ROWS
        self.records_prompts = False  # `record` decides
        self._may_record = own and self.device.type == "cuda"
        self._many = self._may_record and weight.dtype != torch.float64
        self._prompts: dict[int, _Prompt] = {}  # by padded length
        self.one_kernel: Any = None
        if self.few and few_token_pass.fits_one_kernel(model, rows):
            with self.on_device():
                self.one_kernel = few_token_pass.one_kernel(model, self.cache)
        self.packed: Callable[..., Tensor] | None = None
        if packed:
            layers = few_token_pass.linear_layers(model)
            copies = {layer: few_token_pass.packed_linear(layer, rows) for layer in layers}
            self.packed = few_token_pass.using(copies)
        self.head: Tensor | None = None
        if self.device.type == "cuda" and model.head_is_embedding and not self.few:
            # padded once; `model.logits` would pad the matrix for every token
            self.head = weight.new_zeros(model.config.padded_vocab_size, weight.shape[1])

    @property
    def capacity(self) -> int:
        """Positions that the cache has room for."""
        return self.cache.keys.shape[3]

    @property
    def rows(self) -> int:
        """Rows of the cache."""
        return self.cache.keys.shape[1]

    def copy_head(self) -> None:
        """Copies the output weights into the padded matrix; needed when the weights change."""
        if self.head is not None:
            self.head[: self.model.config.vocab_size] = self.model.transformer.wte.weight

    def prefill(
        self, numbers: Sequence[int], prompts: Sequence[Sequence[int]], *, may_record: bool = True
    ) -> Tensor | None:
        """Fills the cache of some rows from their beginning.

        Args:
            numbers: rows of the cache.
            prompts: the token ids of each of them; may be empty.
            may_record: False for a length that is not expected again.

        Returns:
            (B, T, C) output of the last norm for the T tokens of the longest prompt; None if all
            prompts are empty.
        """
        lengths = [len(prompt) for prompt in prompts]
        cache, longest = self.cache, max(lengths)
        cache.length = 0
        one = len(prompts) == 1 and 0 < longest <= PROMPT_LONGEST
        if one and self.records_prompts and not _watched(self.model):
            return self._read_prompt(numbers[0], prompts[0], may_record)
        if cache.lengths is not None:
            cache.rows = torch.tensor(numbers, device=self.device)
            cache.lengths[cache.rows] = torch.tensor(lengths, device=self.device)
        try:
            if not longest:
                return None
            # attention is causal: padding after a short row has no effect on it
            return self.model.hidden(pad(prompts, longest).to(self.device), cache)
        finally:
            cache.rows = None

    def next_logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Appends one token (B,) to every row; returns the logits (B, V) that follow.

        `cache` is a part of the cache, None for all rows. Its `length` must be that of the longest
        row.
        """
        cache = self.cache if cache is None else cache
        if self.packed:
            return few_token_pass.next_logits(self.model, tokens[:, None], cache, self.packed)
        with self.on_device():  # where Triton launches its kernels
            if self.one_kernel and cache is self.cache:
                return self.one_kernel.next_logits(tokens)
            if self.few:
                return few_token_pass.next_logits(self.model, tokens[:, None], cache)
            if self._many and not _watched(self.model):
                return self.logits(many_row_pass.hidden(self.model, tokens, cache))
            hidden = self.model.hidden(tokens[:, None], cache)[:, -1]
        return self.logits(hidden)

    def _read_prompt(self, row: int, prompt: Sequence[int], may_record: bool) -> Tensor:
        """`prefill` of one prompt, padded to a length that other prompts have too.

        By a CUDA graph from the second of a length on. The first is padded too: a text must not
        depend on how many were written before.
        """
        length = min(-(-len(prompt) // PROMPT_STEP) * PROMPT_STEP, self.capacity)
        known = self._prompts.setdefault(length, _Prompt(length, self.device))
        assert self.cache.lengths is not None
        self.cache.lengths[row].fill_(len(prompt))
        known.ids.copy_(pad([prompt], length))
        known.row.fill_(row)
        if known.graph is None and known.came_before and may_record:
            self._record_prompt(known)
        if known.graph is None:
            known.came_before |= may_record
            return self._hidden(known)[:, : len(prompt)]
        known.graph.replay()
        assert known.hidden is not None
        return known.hidden[:, : len(prompt)]

    def _hidden(self, prompt: "_Prompt") -> Tensor:
        self.cache.rows, self.cache.length = prompt.row, 0
        try:
            # attention is causal: padding after the prompt has no effect on it
            return self.model.hidden(prompt.ids, self.cache)
        finally:
            self.cache.rows = None

    def _record_prompt(self, prompt: "_Prompt") -> None:
        def keep() -> None:
            prompt.hidden = self._hidden(prompt)

        try:
            prompt.graph = self.graph_of(lambda: self._hidden(prompt), keep)
        except RuntimeError:  # no memory left for it, for example
            self.records_prompts = False

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, C) output of the last norm -> (B, V)."""
        if self.head is None:
            return self.model.logits(hidden)
        return F.linear(hidden, self.head)[:, : self.model.config.vocab_size]

    def record(self, steps: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Records work that calls `next_logits` as a CUDA graph, to be replayed."""

        def run(length: int) -> None:
            # `length` matters only to attention without a kernel that reads `cache.lengths`
            self.cache.length = length
            steps()

        self.records_prompts = self._may_record
        return self.graph_of(lambda: run(0), lambda: run(self.capacity - 1))

    def graph_of(
        self, warm_up: Callable[[], object], work: Callable[[], object]
    ) -> torch.cuda.CUDAGraph:
        """`work` as a CUDA graph, after `warm_up`, in which libraries allocate their workspaces."""
        with self.on_device():
            side = _side_stream(torch.cuda.current_device())
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    warm_up()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # another thread may allocate meanwhile
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                work()
        return graph

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Makes the model's GPU the current one."""
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return contextlib.nullcontext()


class _Prompt:
    """What reads prompts of one padded length; it does not refer to the cache, which would live on.

    Args:
        length: T.
        device: of the network.
    """

    def __init__(self, length: int, device: torch.device):
        self.ids = torch.zeros(1, length, dtype=torch.int64, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.came_before = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden: Tensor | None = None  # (1, T, C), written by the graph


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all recordings on a GPU: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


def _watched(model: nn.Module) -> bool:
    """Whether somebody wants to see the calls of a module, which a graph would not make."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class HostCopy:
    """A copy of a tensor, such as the newest tokens (B,), for the CPU.

    Args:
        values: on any device.
        wait: False starts an asynchronous copy to pinned memory, for which `get` waits.
        written_by: a GPU that writes `values`, which are in pinned memory already; nothing is
            copied then.
    """

    def __init__(self, values: Tensor, *, wait: bool, written_by: torch.device | None = None):
        self._event: torch.cuda.Event | None = None
        if wait:
            self._values = values.clone()
            return
        with torch.cuda.device(written_by or values.device):
            self._values = values
            if written_by is None:
                self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> list:
        """The values as nested lists, once they have arrived."""
        if self._event:
            self._event.synchronize()
        return self._values.tolist()


def pad(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """Rows of token ids as one tensor (B, length) on the CPU, padded with zeros at the end."""
    padded = np.zeros((len(rows), length), np.int64)  # from lists eight times as fast as a tensor
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(padded)


def _dtype(weight: Tensor) -> torch.dtype:
    """The precision of keys and values."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
