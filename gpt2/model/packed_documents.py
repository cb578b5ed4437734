"""Sequences that hold several documents, none of which sees another.

`Packed` follows `attention_cache.AttentionCache`: a network takes it in place of a KV cache. The
result is exact on every device: positions of a document start at 0 and its attention ends at its
first token, so its logits are those of the document alone.

Shapes: `B` batch, `T` positions of a sequence, `H` heads, `D` head width.
"""

import torch
from torch import Tensor

from ..kernels.attention import visible_attention


class Packed:
    """The documents of one batch.

    Args:
        begins: (B, T) int64, the position at which the document of each token begins; a token that
            pads a sequence is a document of its own.
        dropout: probability of dropping an attention weight.
    """

    def __init__(self, begins: Tensor, dropout: float = 0.0) -> None:
        self.begins, self.dropout = begins, dropout
        same_document = begins[:, :, None] == begins[:, None, :]
        self.visible = same_document.tril()[:, None]  # (B, 1, T, T): queries, keys

    def start(self) -> Tensor:
        """(B, T): offsets to add to 0 … T - 1 to get the positions within documents."""
        return -self.begins

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within each document; all (B, H, T, D)."""
        return visible_attention(q, k, v, self.visible, self.dropout)

    def advance(self, count: int) -> None:
        """Does nothing: no positions follow those of the batch."""


def packed(*begins: Tensor, dropout: float = 0.0) -> Packed | None:
    """`Packed` for a batch that has `begins`; None for a batch of plain text."""
    return Packed(begins[0], dropout) if begins else None


def packed_reference(begins: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `Packed` by the formula, for tests."""
    at = torch.arange(q.shape[2])
    hidden = (begins[:, :, None] != begins[:, None, :]) | (at[:, None] < at)
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1) @ v
