"""Cross-entropy of logits and its gradient, in one go; the head computes them chunk by chunk.

Shapes: `n` rows, `P` columns, of which the first `vocab` are real ids.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.model import IGNORE
from .fp8 import gradient_to_fp8
from .precision import HAS_TRITON


class Later(NamedTuple):
    """The tokens after the next ones, which the gradient heeds too; the loss does not."""

    targets: Tensor  # (n,) int64, `IGNORE` where there is none
    share: Tensor  # () float32

    def part(self, rows: slice) -> "Later":
        """Of these rows."""
        return Later(self.targets[rows], self.share)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap) in float32 (Gemma team 2024, arXiv:2408.00118); cap 0: logits."""
    if not cap:
        return logits
    return cap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap)


def second_targets(targets: Tensor, length: int) -> Tensor:
    """The target after each target of its sequence, `IGNORE` after the last; (N,) -> (N,)."""
    return F.pad(targets.view(-1, length)[:, 1:], (0, 1), value=IGNORE).flatten()


def loss_and_gradient(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    vocab: int,
    needs_grad: bool,
    softcap: float,
    raised: Tensor | None = None,
    later: Later | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of (n, P) logits, and its gradient: softmax - one-hot.

    With a cap, softmax takes y = cap · tanh(x / cap), and dy/dx = 1 - (y / cap)². With `later`
    the gradient is (1 + share) · softmax - one-hot - share · one-hot of the later targets.
    """
    if logits.is_cuda and logits.dtype != torch.float64 and HAS_TRITON:
        from .triton_training import cross_entropy_

        options = vocab, needs_grad, softcap, raised, *(later or (None, None))
        return cross_entropy_(logits, target, *options), logits
    dtype, target = logits.dtype, target[:, None]
    counts = target != IGNORE
    target = target.clamp(min=0)
    logits = soft_cap(logits.to(torch.promote_types(dtype, torch.float32)), softcap)
    factor = counts * (1 - (logits / softcap).square()) if softcap and needs_grad else counts
    logits[:, vocab:] = float("-inf")
    if raised is not None:
        logits = logits + raised
    log_sum = logits.logsumexp(-1, keepdim=True)
    loss = ((log_sum - logits.gather(1, target)) * counts).sum()
    if needs_grad:
        logits = logits.sub_(log_sum).exp_()
        if later is not None:
            after = later.targets[:, None]
            share = later.share * (after != IGNORE).to(logits.dtype)
            logits.mul_(1 + share).scatter_add_(1, after.clamp(min=0), -share)
        logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=logits.dtype))
        logits = logits.mul_(factor).to(dtype)
    return loss, logits


def loss_and_gradient_fp8(  # noqa: PLR0917
    logits: Tensor,
    targets: Tensor,
    vocab: int,
    softcap: float,
    raised: Tensor | None,
    later: Later | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the cross-entropies, its gradient as `gradient_to_fp8` gives it, the transpose."""
    if logits.is_cuda and HAS_TRITON:
        from .triton_training import cross_entropy_fp8

        options = vocab, softcap, raised, *(later or (None, None))
        return cross_entropy_fp8(logits, targets, *options)
    loss, gradient = loss_and_gradient(logits.float(), targets, vocab, True, softcap, raised, later)
    return loss, *gradient_to_fp8(gradient)
