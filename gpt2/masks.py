"""Which positions a query sees: windows and documents, as a dense mask or in blocks.

On a GPU, compiled, FlexAttention (Dong et al. 2024, arXiv:2412.05496) skips the blocks that nothing
is seen of. Everywhere else the same mask goes into PyTorch's attention as a table.

Shapes: `B` batch, `H` heads, `T` time, `D` head width, `N` blocks of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # positions, FlexAttention's default
Mask = Tensor | BlockMask | None  # None: all earlier positions


def documents_of(idx: Tensor, separator: int) -> Tensor:
    """(B, T) ids -> (B, T) numbers of documents; a separator is the first token of its own."""
    return (idx == separator).cumsum(1)


def mask_for(T: int, window: Tensor | None, documents: Tensor | None, blocks: bool) -> Mask:
    """The mask of T positions.

    Args:
        T: positions.
        window: () int64, positions that a query sees, itself included; None: all.
        documents: (B, T) as `documents_of` gives them; None: all is one document.
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

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~whole), *_ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=seen
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, N) bool -> how many blocks each row has, and their numbers first in its list."""
    numbers = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    counts = blocks.sum(-1, dtype=torch.int32)
    return counts[:, None].contiguous(), numbers.to(torch.int32)[:, None].contiguous()


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q kᵀ / √D) v over what the mask shows; all (B, H, T, D)."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
