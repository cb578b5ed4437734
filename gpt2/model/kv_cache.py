"""Key-value cache: generation computes the keys and values of each position once.

Shapes: `B` batch, `T` new positions, `S` positions so far, `H` heads, `D` head width.
"""

import copy
from typing import ClassVar

import torch
from torch import Tensor

from ..config.model import GPT2Config
from ..kernels.attention import cached_attention, causal_attention


class KVCache:
    """Keys and values of the positions already seen; follows `attention_cache.AttentionCache`.

    `keys` and `values` are (n_layer, B, H, S_max, D). The int `length` counts filled positions.
    If rows differ in length, the tensor `lengths` (B,) on the device counts them per row, and
    `length` is the longest. A CUDA graph needs `lengths` too: it would freeze an int.

    Args:
        config: shape of the network.
        batch_size: B.
        like: any tensor on the device of the network.
        dtype: of keys and values.
        capacity: S_max; None: block_size.
    """

    # Name of each tensor that has a batch dimension -> this dimension, for `first` and `take`.
    PER_ROW: ClassVar = {"keys": 1, "values": 1, "lengths": 0}

    def __init__(
        self,
        config: GPT2Config,
        batch_size: int,
        like: Tensor,
        dtype: torch.dtype,
        capacity: int | None = None,
    ) -> None:
        heads, width = config.n_head, config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, heads, capacity or config.block_size, width)
        # Zeros, not `empty`: attention multiplies masked values by 0, and 0 · NaN is NaN.
        self.keys = torch.zeros(shape, device=like.device, dtype=dtype)
        self.values = torch.zeros(shape, device=like.device, dtype=dtype)
        self.length = 0
        self.lengths: Tensor | None = None
        # Set while prompts are read: the batch consists of these rows, from their position 0.
        self.rows: Tensor | None = None

    def start(self) -> int | Tensor:
        """Position of the first new token: an int, or (B, 1) if rows differ in length."""
        if self.rows is not None:
            return 0
        return self.length if self.lengths is None else self.lengths[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores the new keys and values; attention over all S positions; all (B, H, T, D)."""
        T = k.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        if self.rows is not None:
            keys[self.rows, :, :T], values[self.rows, :, :T] = k, v
            return causal_attention(q, k, v)
        end = self.length + T
        if self.lengths is not None:
            return cached_attention(q, k, v, keys, values, self.lengths, end)
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return causal_attention(q, keys[:, :, :end], values[:, :, :end])

    def advance(self, count: int) -> None:
        """Adds `count` positions to the lengths, after the last layer has stored them."""
        if self.rows is not None:
            return  # `CachedForward.prefill` has set the lengths, which differ between rows
        self.length += count
        if self.lengths is not None:
            self.lengths += count

    def first(self, rows: int) -> "KVCache":
        """The first `rows` rows as a view of the same memory; needs `lengths`."""
        part = copy.copy(self)
        for name, dim in self.PER_ROW.items():
            setattr(part, name, getattr(self, name).narrow(dim, 0, rows))
        return part

    def take(self, row: int, other: "KVCache", source: int) -> None:
        """Copies row `source` of `other`, which may be this cache, to `row`; needs `lengths`."""
        for name, dim in self.PER_ROW.items():
            kept = getattr(other, name).select(dim, source)
            getattr(self, name).select(dim, row).copy_(kept)
