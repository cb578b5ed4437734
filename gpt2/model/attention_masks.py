"""Which positions a query sees: windows and documents, as a dense mask or in blocks.

On a GPU, compiled, FlexAttention (Dong et al. 2024, arXiv:2412.05496) skips the blocks that nothing
is seen of. Everywhere else the same mask goes into PyTorch's attention as a table.

Shapes: `B` batch, `H` heads, `T` time, `D` head width, `N` blocks of a row.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..kernels.attention import causal_attention
from .kv_cache import KVCache

BLOCK = 128  # positions, FlexAttention's default
NARROWEST = 16  # heads that FlexAttention takes on a GPU
Mask = Tensor | BlockMask | None  # None: all earlier positions


def documents_of(begins: Tensor) -> Tensor:
    """(B, T) bool, where documents begin -> (B, T) their numbers."""
    return begins.cumsum(1)


def mask_for(T: int, window: Tensor | None, documents: Tensor | None, blocks: bool) -> Mask:
    """The mask of T positions.

    Args:
        T: positions.
        window: () int64, positions that a query sees, itself included; None: all.
        documents: (B, T) numbers that never fall along a row; None: all is one document.
        blocks: for FlexAttention, whose window and documents may change without compiling anew.
    """
    if window is None and documents is None:
        return None
    device = (window if documents is None else documents).device
    if blocks and T % BLOCK == 0:
        return _in_blocks(T, window, documents, device)
    at = torch.arange(T, device=device)
    return visible(at, at, window, documents, documents)


def visible(
    queries: Tensor,
    keys: Tensor,
    window: Tensor | None,
    of_queries: Tensor | None = None,
    of_keys: Tensor | None = None,
) -> Tensor:
    """Which keys a query sees, (B or 1, 1, T, S) bool.

    Args:
        queries: (T,) or (B, T) positions.
        keys: (S,) positions.
        window: see `mask_for`.
        of_queries: (B, T) their documents, or None.
        of_keys: (B, S) their documents, or None.
    """
    distance = queries[..., :, None] - keys
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    seen = seen if seen.ndim == 3 else seen[None]
    if of_queries is not None:
        seen = seen & (of_queries[:, :, None] == of_keys[:, None])
    return seen[:, None]


def _in_blocks(
    T: int, window: Tensor | None, documents: Tensor | None, device: torch.device
) -> BlockMask:
    number = torch.arange(T // BLOCK, device=device)
    away = (number[:, None] - number)[None]  # (1, N, N), in blocks
    some, whole = away >= 0, away > 0
    if window is not None:
        some = some & (away * BLOCK - (BLOCK - 1) < window)  # the nearest pair of positions
        whole = whole & (away * BLOCK + (BLOCK - 1) < window)  # the farthest
    if documents is not None:
        first, last = documents[:, ::BLOCK], documents[:, BLOCK - 1 :: BLOCK]  # (B, N)
        some = some & (last[:, None, :] >= first[:, :, None])
        whole = whole & (first[:, None, :] == last[:, :, None])

    def seen(b, h, q, k):  # what FlexAttention calls it with
        answer = q >= k
        if window is not None:
            answer = answer & (q - k < window)
        if documents is not None:
            answer = answer & (documents[b, q] == documents[b, k])
        return answer

    lists = block_lists(some & ~whole, whole)
    return BlockMask((T, T), *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=seen)


@torch.library.custom_op("gpt2::block_lists", mutates_args=())
def block_lists(some: Tensor, whole: Tensor) -> list[Tensor]:
    """The lists that FlexAttention goes through, in the order in which `BlockMask` takes them.

    Of blocks seen in part and of whole ones, for queries and then, for gradients, for keys: how
    many (B, 1, N), and their numbers (B, 1, N, N), those that count in front; int32.

    The compiler does not look inside of an operator. Where it makes the lists itself, their
    dimension of heads, of size 1, has a stride of its own choice, by which FlexAttention's kernels
    (PyTorch 2.11) step from row to row of the batch: all rows then used the first one's blocks.

    Args:
        some: (B, N, N) bool, blocks of queries by blocks of keys, seen in part.
        whole: the same, all of whose positions are seen.
    """
    masks = some, whole, some.mT, whole.mT
    return [part for mask in masks for part in _ordered(mask)]


@block_lists.register_fake
def _(some: Tensor, whole: Tensor) -> list[Tensor]:
    B, N, _ = some.shape
    shapes = [(B, 1, N), (B, 1, N, N)] * 4
    return [some.new_empty(shape, dtype=torch.int32) for shape in shapes]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, N) bool -> how many blocks each row has, and their numbers first in its list."""
    numbers = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    counts = blocks.sum(-1, dtype=torch.int32)
    return counts[:, None].contiguous(), numbers.to(torch.int32)[:, None].contiguous()


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D) v over what the mask shows; all (B, H, T, D).

    Dropout of attention weights is for all but blocks.
    """
    if mask is None:
        return causal_attention(q, k, v, dropout)
    if isinstance(mask, BlockMask):
        assert not dropout
        return flex_attention(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class Cache(KVCache):
    """A cache for layers with windows, and of several documents."""

    PER_ROW: ClassVar = KVCache.PER_ROW | {"documents": 0}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        shape = self.keys.shape[1], self.keys.shape[3]
        self.documents = torch.zeros(shape, dtype=torch.int64, device=self.keys.device)

    def enter(self, begins: Tensor, positions: Tensor) -> Tensor:
        """Takes down where documents begin, (B, T) bool; (B, T) the documents' numbers."""
        rows, at = self._rows(), positions.expand(begins.shape)
        before = self.documents[rows, (at[:, :1] - 1).clamp(min=0)] * (at[:, :1] > 0)
        numbers = before + begins.cumsum(1)
        self.documents[rows, at] = numbers
        return numbers

    def _rows(self) -> Tensor:
        """(B, 1), of those that are being read."""
        every = torch.arange(len(self.documents), device=self.documents.device)
        return (every if self.rows is None else self.rows)[:, None]

    def attend_to(  # noqa: PLR0917 - what attention has
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: Tensor | None,
        positions: Tensor, documents: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As `attend`, over what window and documents show."""
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
