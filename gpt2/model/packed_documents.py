"""Rows of several documents that do not see one another.

Exact on every device: a document's positions begin at 0 and its attention ends at its first token,
so its logits are those that it has alone. Takes the place of a `KVCache` in the model's forward
pass, which so needs no branch of its own.

Shapes: `B` batch, `T` positions of a row, `H` heads, `D` head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Packed:
    """Where the documents of a batch begin.

    Args:
        begins: (B, T) int64, the position at which the document of each token begins; a token that
            fills up a row is a document of its own.
        dropout: probability of dropping an attention weight.
    """

    def __init__(self, begins: Tensor, dropout: float = 0.0):
        self.begins, self.dropout = begins, dropout
        same = begins[:, :, None] == begins[:, None, :]
        self.visible = same.tril()[:, None]  # (B, 1, T, T): queries, keys

    def start(self) -> Tensor:
        """(B, T): what to add to 0 … T - 1 for the positions within documents."""
        return -self.begins

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within the documents; all (B, H, T, D)."""
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.visible, dropout_p=self.dropout
        )

    def advance(self, count: int):
        """Nothing is kept for further positions."""


def packed(*begins: Tensor, dropout: float = 0.0) -> Packed | None:
    """For a batch that says where its documents begin; None for one that does not."""
    return Packed(*begins, dropout) if begins else None


def packed_reference(begins: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by the formula, for tests."""
    at = torch.arange(q.shape[2])
    hidden = (begins[:, :, None] != begins[:, None, :]) | (at[:, None] < at)
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1) @ v
