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


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, padded_rows: int, reduction: str
) -> Tensor:
    """Cross-entropy of the tied head in nats, computed in float32 over the V real ids.

    Under torch.compile this is the plain form, whose softmax the compiler fuses into few passes.
    Uncompiled it goes through the rows in chunks: the N × V logits, by far the largest tensor of a
    step, are never stored whole, and each chunk stays near the processor.

    Args:
        x: (N, C), output of the last LayerNorm.
        weight: (V, C), the token embedding.
        targets: (N,) int64; `IGNORE` where nothing is predicted.
        padded_rows: P, see `head_logits`.
        reduction: "sum", "mean" over the targets that count, or "none" for (N,).
    """
    if torch.compiler.is_compiling() or reduction == "none":
        return head_loss_reference(x, weight, targets, padded_rows, reduction)
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()  # else their gradients would be prepared
    loss = _ChunkedHeadLoss.apply(x, weight, targets, padded_rows)
    return loss / (targets != IGNORE).sum() if reduction == "mean" else loss


def head_loss_reference(
    x: Tensor, weight: Tensor, targets: Tensor, padded_rows: int, reduction: str
) -> Tensor:
    """The same, all rows at once."""
    logits = head_logits(x, weight, padded_rows)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)


class _ChunkedHeadLoss(torch.autograd.Function):
    """Sum of cross-entropies whose gradient, softmax - one-hot, is used up as soon as it is there.

    Forward computes both gradients along with the loss (scaled by 1; backward multiplies by what
    comes in), so backward needs no logits.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, padded_rows: int) -> Tensor:
        kind, rows = x.device.type, weight.shape[0]
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        exact = torch.promote_types(dtype, torch.float32)
        inputs = x.to(dtype)
        head = F.pad(weight, (0, 0, 0, padded_rows - rows)).to(dtype)
        needs_grad = any(ctx.needs_input_grad)
        if needs_grad:
            grad_x = torch.empty_like(inputs)
            grad_head = torch.zeros_like(head, dtype=exact)
        total = torch.zeros((), dtype=exact, device=x.device)
        chunk = x.shape[1]  # then a chunk's logits are as large as the gradient that it adds to
        for start in range(0, len(x), chunk):
            part, target = inputs[start : start + chunk], targets[start : start + chunk, None]
            counts = target != IGNORE
            target = target.clamp(min=0)
            logits = (part @ head.t()).to(exact)
            logits[:, rows:] = float("-inf")
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += ((log_sum - logits.gather(1, target)) * counts).sum()
            if needs_grad:
                grad = logits.sub_(log_sum).exp_()  # softmax, in place
                grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=exact))
                grad = grad.mul_(counts).to(dtype)
                grad_x[start : start + chunk] = grad @ head
                grad_head += grad.t() @ part
        if needs_grad:
            ctx.save_for_backward(grad_x.to(x.dtype), grad_head[:rows].to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * upstream, grad_weight * upstream, None, None


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
