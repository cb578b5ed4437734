"""Attention masks of attention windows and documents: a number, for FlexAttention, or dense.

cuDNN takes a window that never changes as a number (`kernels.window_attention`). Compiled on a GPU,
FlexAttention (Dong et al. 2024, arXiv:2412.05496) takes any window and documents, and skips blocks
of 128 by 128 positions that the mask hides entirely. Elsewhere PyTorch's attention takes the mask
as a dense tensor.

Shapes: `B` batch, `H` heads, `T` queries, `S` keys, `D` head width, `N` = T / 128 blocks.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..kernels.attention import causal_attention, visible_attention
from ..kernels.window_attention import window_attention
from .kv_cache import KVCache

BLOCK = 128  # positions; FlexAttention's default
MIN_HEAD_WIDTH = 16  # FlexAttention takes no narrower heads on a GPU
SHARED_MEMORY = {128: 99, 256: 160}  # KiB that its kernels take, for heads up to that width
Mask = Tensor | BlockMask | int | None  # int: a window; None: plain causal attention


def document_ids(begins: Tensor) -> Tensor:
    """(B, T) bool, True for the first token of a document -> (B, T) number of the document."""
    return begins.cumsum(1)


@torch.compiler.assume_constant_result
def takes_blocks(device: torch.device, head_width: int) -> bool:
    """Whether FlexAttention's kernels, compiled with PyTorch's sizes, surely fit a device.

    RTX cards have 99 KiB of shared memory, an A100 163. Heads wider than 128 need more than 99: the
    first step fails there ("No valid triton configs", PyTorch issues 180278 and 198224). A T4 has
    64; whether they fit it is not known. AMD's GPUs have 64 too, and sizes of their own in PyTorch.
    """
    if device.type != "cuda" or not MIN_HEAD_WIDTH <= head_width <= max(SHARED_MEMORY):
        return False
    needed = min(kib for width, kib in SHARED_MEMORY.items() if head_width <= width) << 10
    properties = torch.cuda.get_device_properties(device)
    has = getattr(properties, "shared_memory_per_block_optin", needed)
    return torch.version.hip is not None or has >= needed


def mask_for(T: int, window: Tensor | None, documents: Tensor | None, flex: bool) -> Mask:
    """The causal mask of T positions with an attention window and documents.

    Args:
        T: positions.
        window: () int64, positions that a query sees, itself included; None: all.
        documents: (B, T) numbers that never fall along a row; None: all is one document.
        flex: whether to build FlexAttention's mask, which does not recompile for another window
            or other documents. It needs T to be a multiple of 128; else the mask is dense.
    """
    given = window if documents is None else documents
    if given is None:
        return None
    device = given.device
    if flex and T % BLOCK == 0:
        return _block_mask(T, window, documents, device)
    at = torch.arange(T, device=device)
    return visible(at, at, window, documents, documents)


def visible(
    queries: Tensor,
    keys: Tensor,
    window: Tensor | None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> Tensor:
    """The dense mask: which keys a query sees, (B or 1, 1, T, S) bool.

    Args:
        queries: (T,) or (B, T) positions.
        keys: (S,) positions.
        window: see `mask_for`.
        query_documents: (B, T), or None.
        key_documents: (B, S), or None.
    """
    distance = queries[..., :, None] - keys
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    seen = seen if seen.ndim == 3 else seen[None]
    if query_documents is not None:
        assert key_documents is not None  # both, or neither
        seen = seen & (query_documents[:, :, None] == key_documents[:, None])
    return seen[:, None]


def _block_mask(
    T: int, window: Tensor | None, documents: Tensor | None, device: torch.device
) -> BlockMask:
    number = torch.arange(T // BLOCK, device=device)
    distance = (number[:, None] - number)[None]  # (1, N, N), in blocks
    some, whole = distance >= 0, distance > 0
    if window is not None:
        some = some & (distance * BLOCK - (BLOCK - 1) < window)  # the nearest pair of positions
        whole = whole & (distance * BLOCK + (BLOCK - 1) < window)  # the farthest pair
    if documents is not None:
        first, last = documents[:, ::BLOCK], documents[:, BLOCK - 1 :: BLOCK]  # (B, N)
        some = some & (last[:, None, :] >= first[:, :, None])
        whole = whole & (first[:, None, :] == last[:, :, None])

    # FlexAttention's signature: batch, head, query position, key position
    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = q >= k
        if window is not None:
            seen = seen & (q - k < window)
        if documents is not None:
            seen = seen & (documents[b, q] == documents[b, k])
        return seen

    lists = block_lists(some & ~whole, whole)
    return BlockMask((T, T), *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)  # type: ignore[misc]


@torch.library.custom_op("gpt2::block_lists", mutates_args=())
def block_lists(some: Tensor, whole: Tensor) -> list[Tensor]:
    """The eight tensors of a `BlockMask`, in the order of its constructor.

    Partly and wholly visible blocks, listed per row for the forward pass and per column for
    gradients. Each list is a count (B, 1, N) and block numbers (B, 1, N, N), int32; the first
    `count` numbers are valid.

    An operator, because Inductor may give the size-1 dimension of heads any stride. FlexAttention's
    kernels (PyTorch 2.11) use that stride to step over the batch, so all rows of the batch used the
    blocks of the first row. An operator's outputs keep their strides.

    Args:
        some: (B, N, N) bool, partly visible blocks; rows are queries, columns keys.
        whole: (B, N, N) bool, wholly visible blocks.
    """
    masks = some, whole, some.mT, whole.mT
    return [part for mask in masks for part in _ordered(mask)]


@block_lists.register_fake
def _block_lists_fake(some: Tensor, whole: Tensor) -> list[Tensor]:
    B, N, _ = some.shape
    shapes = [(B, 1, N), (B, 1, N, N)] * 4
    return [some.new_empty(shape, dtype=torch.int32) for shape in shapes]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, N) bool -> the count of True per row, and column numbers, those of True first."""
    numbers = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    counts = blocks.sum(-1, dtype=torch.int32)
    return counts[:, None].contiguous(), numbers.to(torch.int32)[:, None].contiguous()


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D) v over the visible keys; all (B, H, T, D).

    A window as a number and FlexAttention have no dropout of attention weights.
    """
    if mask is None:
        return causal_attention(q, k, v, dropout)
    if isinstance(mask, int):
        assert not dropout
        return window_attention(q, k, v, mask)
    if isinstance(mask, BlockMask):
        assert not dropout
        return flex_attention(q, k, v, block_mask=mask)
    return visible_attention(q, k, v, mask, dropout)


class MaskedKVCache(KVCache):
    """A KV cache that follows `attention_cache.MaskedAttentionCache`.

    `documents` is (B, S_max) int64, the document of each position seen.
    """

    PER_ROW: ClassVar = KVCache.PER_ROW | {"documents": 0}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shape = self.keys.shape[1], self.keys.shape[3]
        self.documents = torch.zeros(shape, dtype=torch.int64, device=self.keys.device)

    def add_documents(self, begins: Tensor, positions: Tensor) -> Tensor:
        """Stores and returns the document of each new token; (B, T) bool -> (B, T) int64."""
        rows, at = self._rows(), positions.expand(begins.shape)
        before = self.documents[rows, (at[:, :1] - 1).clamp(min=0)] * (at[:, :1] > 0)
        numbers = before + begins.cumsum(1)
        self.documents[rows, at] = numbers
        return numbers

    def _rows(self) -> Tensor:
        """(B, 1), the rows of the cache that the batch consists of."""
        every = torch.arange(len(self.documents), device=self.documents.device)
        return (every if self.rows is None else self.rows)[:, None]

    def attend_masked(  # noqa: PLR0917 - what attention has
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Tensor | None,
        positions: Tensor,
        documents: Tensor | None,
    ) -> Tensor:
        """Stores the new keys and values; attention over the visible positions."""
        T, keys, values = q.shape[2], self.keys[layer], self.values[layer]
        if self.rows is not None:
            keys[self.rows, :, :T], values[self.rows, :, :T] = k, v
            seen = visible(positions, positions, window, documents, documents)
            return masked_attention(q, k, v, seen)
        end = self.length + T
        rows, at = self._rows(), positions.expand(len(q), T)
        keys[rows, :, at], values[rows, :, at] = k.transpose(1, 2), v.transpose(1, 2)
        kept = None if documents is None else self.documents[:, :end]
        seen = visible(at, torch.arange(end, device=q.device), window, documents, kept)
        return masked_attention(q, keys[:, :, :end], values[:, :, :end], seen)
