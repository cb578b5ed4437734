"""The language-model head and its cross-entropy, beside the plain form that it must equal.

Shapes: `N` rows (batch × time), `C` channels, `V` vocabulary, `P` vocabulary padded to a multiple
of 128.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.model import IGNORE
from .custom_op import custom_op
from .precision import HAS_TRITON


def head_logits(x: Tensor, weight: Tensor, padded_rows: int) -> Tensor:
    """Logits of the tied head, (..., C) and (V, C) -> (..., V).

    On a GPU the product is computed with P = `padded_rows` rows, a multiple of 128 for the sake of
    matrix units; the padding is cut off again, so that no padded id is ever seen outside. On a CPU
    it would only copy the weight.
    """
    rows = weight.shape[0]
    if x.device.type == "cpu":
        return F.linear(x, weight)
    padded = F.pad(weight, (0, 0, 0, padded_rows - rows))
    return F.linear(x, padded)[..., :rows]


def head_loss(  # noqa: PLR0917
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    padded_rows: int,
    reduction: str,
    fp8: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """Cross-entropy of the tied head in nats, computed in float32 over the V real ids.

    Goes through the rows in chunks: the N × V logits, by far the largest tensor of a step, are
    never stored whole.

    Args:
        x: (N, C), output of the last LayerNorm.
        weight: (V, C), the token embedding.
        targets: (N,) int64; `IGNORE` where nothing is predicted.
        padded_rows: P, see `head_logits`.
        reduction: "sum", "mean" over the targets that count, or "none" for (N,).
        fp8: three products in fp8 (Micikevicius et al. 2022) where gradients are wanted, on a GPU.
        softcap: see `soft_cap`.
    """
    if reduction == "none":
        return head_loss_reference(x, weight, targets, padded_rows, reduction, softcap)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    gradients = torch.is_grad_enabled() * (2 if weight.requires_grad else int(x.requires_grad))
    fp8 = fp8 and gradients == 2 and x.is_cuda
    loss = _HeadLoss.apply(x, weight, targets, padded_rows, gradients, fp8, softcap)
    return loss / (targets != IGNORE).sum() if reduction == "mean" else loss


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap) in float32 (Gemma team 2024, arXiv:2408.00118); cap 0: logits."""
    if not cap:
        return logits
    return cap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap)


def head_loss_reference(  # noqa: PLR0917
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    padded_rows: int,
    reduction: str,
    softcap: float = 0.0,
) -> Tensor:
    """The same, all rows at once."""
    logits = soft_cap(head_logits(x, weight, padded_rows), softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies whose gradients are computed along with it.

    They are those of a gradient of 1; backward multiplies by what comes in.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd calls it by position
        ctx,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        padded_rows: int,
        gradients: int,
        fp8: bool,
        softcap: float,
    ) -> Tensor:
        loss, grad_x, grad_weight = _head_loss_and_gradients(
            x, weight, targets, padded_rows, gradients, fp8, softcap
        )
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        of_weight = grad_weight * upstream if grad_weight.numel() else None
        return (grad_x * upstream).to(grad_x.dtype), of_weight, None, None, None, None, None


@custom_op
def _head_loss_and_gradients(  # noqa: PLR0917
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    padded_rows: int,
    gradients: int,
    fp8: bool,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of x, gradient of weight); `gradients` 1: only of x, 0: none, both empty.

    One operation to the compiler, which would otherwise store all logits.
    """
    (n, width), rows, dtype = x.shape, weight.shape[0], x.dtype
    exact = torch.promote_types(dtype, torch.float32)
    head = F.pad(weight, (0, 0, 0, padded_rows - rows)).to(dtype)
    if fp8:
        total, grad_x, grad_head = _head_in_fp8(x, head, targets, rows, softcap)
        return total, grad_x, grad_head[:rows].to(weight.dtype)
    grad_x = torch.empty_like(x) if gradients else x.new_empty(0)
    grad_head = torch.zeros_like(head, dtype=exact) if gradients == 2 else x.new_empty(0)
    total = torch.zeros((), dtype=exact, device=x.device)
    # On a CPU a chunk's logits are as large as the gradient that it adds to; a GPU needs larger
    # products to be busy, and never holds more than a quarter of a large batch's logits.
    chunk = _rows_at_once(n) if x.is_cuda else width
    for start in range(0, n, chunk):
        part, target = x[start : start + chunk], targets[start : start + chunk]
        logits = part @ head.t()
        loss, grad = _loss_and_gradient_of_logits(logits, target, rows, gradients > 0, softcap)
        total += loss
        if gradients:
            grad_x[start : start + chunk] = grad @ head
        if gradients == 2:
            _add_product(grad_head, grad.t(), part)
    return total, grad_x, grad_head[:rows].to(weight.dtype)


def _rows_at_once(n: int) -> int:
    """A quarter of a large batch, a multiple of 128."""
    return max(2048, math.ceil(n / 512) * 128)


def _head_in_fp8(
    x: Tensor, head: Tensor, targets: Tensor, vocab: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with products of e4m3 by e4m3 and, for the gradients, e5m2 by e4m3.

    Sums of gradients are long, so that their products do without the fast, short accumulator. What
    the rows of the head have in common adds the same to all logits of a token, which softmax does
    not see, and which would be rounded differently for each: it is subtracted before. Gradients sum
    up to zero over the vocabulary, so that those of x do not see it either.
    """
    from .triton_training import GRADIENT_SCALE, cross_entropy_fp8, quantize

    n = x.shape[0]
    fill = -n % 64  # no tile of the kernels is taller
    x, targets = F.pad(x, (0, 0, 0, fill)), F.pad(targets, (0, fill), value=IGNORE)
    x8, x8_t, x_scale = quantize(x)
    if not softcap:  # which does see it
        head = (head - head[:vocab].mean(0, dtype=torch.float32)).to(head.dtype)
    head8, head8_t, head_scale = quantize(head)
    grad_scale = torch.full((), 2.0**-GRADIENT_SCALE, device=x.device)
    grad_x, grad_head = torch.empty_like(x), torch.zeros_like(head, dtype=torch.float32)
    total = torch.zeros((), device=x.device)
    for start in range(0, n + fill, _rows_at_once(n)):
        rows = slice(start, start + _rows_at_once(n))
        logits = torch._scaled_mm(
            x8[rows], head8.t(), x_scale, head_scale, out_dtype=x.dtype, use_fast_accum=True
        )
        loss, grad, grad_t = cross_entropy_fp8(logits, targets[rows], vocab, softcap)
        total += loss
        grad_x[rows] = torch._scaled_mm(
            grad, head8_t.t(), grad_scale, head_scale, out_dtype=x.dtype
        )
        grad_head += torch._scaled_mm(
            grad_t, x8_t[:, rows].t(), grad_scale, x_scale, out_dtype=torch.float32
        )
    return total, grad_x[:n], grad_head


@torch.library.register_fake("gpt2::head_loss_and_gradients")
def _(  # noqa: PLR0917
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    padded_rows: int,
    gradients: int,
    fp8: bool,
    softcap: float,
):
    exact = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty_like(x) if gradients else x.new_empty(0)
    grad_weight = torch.empty_like(weight) if gradients == 2 else weight.new_empty(0)
    return x.new_empty((), dtype=exact), grad_x, grad_weight


def _loss_and_gradient_of_logits(
    logits: Tensor, target: Tensor, vocab: int, needs_grad: bool, softcap: float
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of (n, P) logits, and its gradient, softmax - one-hot.

    With a cap the softmax is that of y = cap · tanh(x / cap), and dy/dx = 1 - (y / cap)².
    """
    if logits.is_cuda and logits.dtype != torch.float64 and HAS_TRITON:
        from .triton_training import cross_entropy_

        return cross_entropy_(logits, target, vocab, needs_grad, softcap), logits
    dtype, target = logits.dtype, target[:, None]
    counts = target != IGNORE
    target = target.clamp(min=0)
    logits = soft_cap(logits.to(torch.promote_types(dtype, torch.float32)), softcap)
    factor = counts * (1 - (logits / softcap).square()) if softcap and needs_grad else counts
    logits[:, vocab:] = float("-inf")
    log_sum = logits.logsumexp(-1, keepdim=True)
    loss = ((log_sum - logits.gather(1, target)) * counts).sum()
    if needs_grad:
        logits = logits.sub_(log_sum).exp_()
        logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=logits.dtype))
        logits = logits.mul_(factor).to(dtype)
    return loss, logits


def _add_product(total: Tensor, a: Tensor, b: Tensor):
    """total += a @ b, in the precision of total."""
    if a.dtype == total.dtype or not total.is_cuda:
        total += a @ b
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
