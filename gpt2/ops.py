"""The operations that decide speed, each beside the plain PyTorch form that it must equal.

Shapes: `N` rows (batch × time), `C` channels, `V` vocabulary, `P` vocabulary padded to a multiple
of 128.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1  # a target that is not predicted


def head_logits(x: Tensor, weight: Tensor, padded_rows: int) -> Tensor:
    """Logits of the tied head, (..., C) and (V, C) -> (..., V).

    The product is computed with P = `padded_rows` rows, a multiple of 128 for the sake of matrix
    units; the padding is cut off again, so that no padded id is ever seen outside.
    """
    rows = weight.shape[0]
    padded = F.pad(weight, (0, 0, 0, padded_rows - rows))
    return F.linear(x, padded)[..., :rows]


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, padded_rows: int, reduction: str):
    """Cross-entropy of the tied head in nats, computed in float32 over the V real ids.

    Args:
        x: (N, C), output of the last LayerNorm.
        weight: (V, C), the token embedding.
        targets: (N,) int64; `IGNORE` where nothing is predicted.
        padded_rows: P, see `head_logits`.
        reduction: "sum", "mean" over the targets that count, or "none" for (N,).
    """
    logits = head_logits(x, weight, padded_rows)
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction=reduction)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D) v where no query sees a later key (Vaswani et al. 2017, eq. 1).

    Args:
        q: (B, H, T, D), the last T of S positions.
        k: (B, H, S, D) with S ≥ T; S > T when the first S - T positions come from a cache.
        v: (B, H, S, D).
        dropout: probability of dropping an attention weight.
    """
    new, total = q.shape[-2], k.shape[-2]
    if new == total:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if new == 1:  # the last position sees everything
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    visible = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by the formula, for tests."""
    new, total = q.shape[-2], k.shape[-2]
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    visible = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v
