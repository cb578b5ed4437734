"""`CachedForward`: prefill of prompts and one-token steps over a KV cache, also as a CUDA graph.

Shapes: `B` rows, `C` channels, `V` vocabulary.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.gpt import LanguageModel
from ..model.kv_cache import KVCache
from . import few_token_pass


class CachedForward:
    """A model's forward pass for generation: `prefill` reads prompts, `next_logits` one token each.

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
        self.few = (
            few_rows
            and per_row_lengths
            and not autocast
            and rows <= few_token_pass.FEW_ROWS
            and few_token_pass.supports(model)
        )
        self.early: Any = None
        if self.few and few_token_pass.begins_early(model, rows):
            self.early = few_token_pass.early_pass(model, self.cache)
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

    def prefill(self, numbers: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """Fills the cache of some rows from their beginning.

        Args:
            numbers: rows of the cache.
            prompts: the token ids of each of them; may be empty.

        Returns:
            (B, T, C) output of the last norm for the T tokens of the longest prompt; None if all
            prompts are empty.
        """
        lengths = [len(prompt) for prompt in prompts]
        cache, longest = self.cache, max(lengths)
        cache.length = 0
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
            if self.early and cache is self.cache:
                return self.early.next_logits(tokens)
            if self.few:
                return few_token_pass.next_logits(self.model, tokens[:, None], cache)
            hidden = self.model.hidden(tokens[:, None], cache)[:, -1]
        return self.logits(hidden)

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

        with self.on_device():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # warm-up: libraries allocate their workspaces
                for _ in range(2):
                    run(0)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run(self.capacity - 1)
        return graph

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Makes the model's GPU the current one."""
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return contextlib.nullcontext()


class HostCopy:
    """A copy of a tensor, such as the newest tokens (B,), for the CPU.

    Args:
        values: on any device.
        wait: False starts an asynchronous copy to pinned memory, for which `get` waits.
    """

    def __init__(self, values: Tensor, *, wait: bool):
        self._event: torch.cuda.Event | None = None
        if wait:
            self._values = values.clone()
            return
        with torch.cuda.device(values.device):
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
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])


def _dtype(weight: Tensor) -> torch.dtype:
    """The precision of keys and values."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
