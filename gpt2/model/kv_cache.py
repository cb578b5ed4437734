"""Keys and values of the positions already seen, so that each is computed once.

Shapes: `B` batch, `T` new positions, `S` positions so far, `H` heads, `D` head width.
"""

import copy
from typing import ClassVar

import torch
from torch import Tensor

from ..config.model import GPT2Config
from ..kernels.attention import cached_attention, causal_attention


class KVCache:
    """Keys and values of the positions already seen, so that each is computed once.

    Holds (n_layer, B, H, S_max, D) for keys and for values, and how many positions are filled: as
    the number `length` where all rows are equally long, and also as the tensor `lengths` (B,)
    where they are not, or where a CUDA graph, which cannot hold numbers that change, reads it.
    `length` is then that of the longest row.
    """

    PER_ROW: ClassVar = {"keys": 1, "values": 1, "lengths": 0}  # tensor -> its dimension of rows

    def __init__(
        self,
        config: GPT2Config,
        batch_size: int,
        like: Tensor,
        dtype: torch.dtype,
        capacity: int | None = None,
    ):
        heads, width = config.n_head, config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, heads, capacity or config.block_size, width)
        # zeros, because what is masked is still multiplied, by 0
        self.keys = torch.zeros(shape, device=like.device, dtype=dtype)
        self.values = torch.zeros(shape, device=like.device, dtype=dtype)
        self.length = 0
        self.lengths: Tensor | None = None
        self.rows: Tensor | None = None  # while not None: these are read from their beginning

    def start(self) -> int | Tensor:
        """Position of the first new token: a number, or (B, 1) where rows differ."""
        if self.rows is not None:
            return 0
        return self.length if self.lengths is None else self.lengths[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends keys and values to a layer; attention of q over all of them; all (B, H, T, D)."""
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

    def advance(self, count: int):
        """Counts new positions, after the last layer has them."""
        if self.rows is not None:
            return
        self.length += count
        if self.lengths is not None:
            self.lengths += count

    def first(self, rows: int) -> "KVCache":
        """The first rows alone, in the same memory; needs `lengths`."""
        part = copy.copy(self)
        for name, dim in self.PER_ROW.items():
            setattr(part, name, getattr(self, name).narrow(dim, 0, rows))
        return part

    def take(self, row: int, other: "KVCache", source: int):
        """Makes a row a copy of a row of another cache, or of this one; needs `lengths`."""
        for name, dim in self.PER_ROW.items():
            kept = getattr(other, name).select(dim, source)
            getattr(self, name).select(dim, row).copy_(kept)
