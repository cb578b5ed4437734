"""The language-model head and its cross-entropy, computed in chunks of rows.

`head_loss_reference` is the plain form that `head_loss` must equal.

Shapes: `N` rows (batch × time), `C` channels, `V` vocabulary, `P` vocabulary padded to a multiple
of 128.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.model import IGNORE
from ..errors import UserError
from .custom_op import custom_op, refuse_second_derivatives
from .fp8 import quantize, scaled_matmul
from .logits_loss import Later, loss_and_gradient, loss_and_gradient_fp8, second_targets, soft_cap
from .precision import GRADIENT_SCALE
from .sampled_softmax import sample_ids

# Which gradients `head_loss` computes along with the loss.
NO_GRADIENT, OF_INPUT, OF_INPUT_AND_WEIGHT = 0, 1, 2


def head_logits(x: Tensor, weight: Tensor, padded_rows: int) -> Tensor:
    """Logits of the head, (..., C) and (V, C) -> (..., V).

    On a GPU the matmul has P = `padded_rows` rows: tensor cores want a multiple of 128. The logits
    of padded ids are cut off. On a CPU padding would copy the weight and win nothing.
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
    sampled: Tensor | None = None,
    second: Tensor | None = None,
    length: int = 0,
) -> Tensor:
    """Cross-entropy of the head in nats, in float32 over the V real ids.

    The rows are computed in chunks, because the N × V logits would be by far the largest tensor of
    a training step. Reduction "none" is for evaluation and stores them whole.

    Args:
        x: (N, C), output of the last LayerNorm.
        weight: (V, C), the token embedding.
        targets: (N,) int64; `IGNORE` where nothing is predicted.
        padded_rows: P, see `head_logits`.
        reduction: "sum", "mean" over the predicted targets, or "none" for (N,).
        fp8: three matmuls in fp8 (Micikevicius et al. 2022); on a GPU, if the weight is trained.
        softcap: see `soft_cap`.
        sampled: () int64 on the CPU, of how many ids the softmax is, see `sample_ids`; 0 or None:
            of all. A tensor, as compiled code would be compiled again for another number.
        second: () float32, the share of the token after the next in the gradient, see
            `head_loss_reference`; None: 0. The loss is of the next token alone.
        length: T, of the sequences that are one after another in x; needed with `second`.
    """
    check_reduction(reduction)
    assert second is None or length, "the second token needs the length of a sequence"
    if reduction == "none":
        return head_loss_reference(x, weight, targets, padded_rows, reduction, softcap)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    gradients = NO_GRADIENT
    if torch.is_grad_enabled() and weight.requires_grad:
        gradients = OF_INPUT_AND_WEIGHT
    elif torch.is_grad_enabled() and x.requires_grad:
        gradients = OF_INPUT
    fp8 = fp8 and gradients == OF_INPUT_AND_WEIGHT and x.is_cuda
    options = padded_rows, gradients, fp8, softcap, sampled, second, length
    loss = _HeadLoss.apply(x, weight, targets, *options)
    return loss / (targets != IGNORE).sum() if reduction == "mean" else loss


def check_reduction(reduction: str) -> None:
    """Raises UserError for another word than those of PyTorch's losses."""
    if reduction not in ("mean", "sum", "none"):
        raise UserError(f"reduction={reduction!r}: use mean, sum or none")


def own_loss(function: Callable, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """A loss of a plugin over the targets that are not `IGNORE`.

    Args:
        function: (logits (N, V), targets (N,)) -> losses (N,).
        logits: (N, V), in any precision; the function gets float32.
        targets: (N,) ids or `IGNORE`.
        reduction: "mean" over the predicted tokens, "sum", or "none" for (N,).
    """
    check_reduction(reduction)
    predicted = targets != IGNORE
    losses = function(logits.float(), targets.clamp(min=0))
    if losses.shape != targets.shape:
        raise UserError(
            f"the loss of the plugin gave {tuple(losses.shape)} for {targets.shape[0]} targets; it "
            "must give one loss for each"
        )
    losses = losses.masked_fill(~predicted, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / predicted.sum() if reduction == "mean" else losses.sum()


def head_loss_reference(  # noqa: PLR0917
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    padded_rows: int,
    reduction: str,
    softcap: float = 0.0,
    second: Tensor | None = None,
    length: int = 0,
) -> Tensor:
    """`head_loss` by PyTorch's cross-entropy over the logits of all rows at once.

    With `second`, the gradient is that of loss + second · (loss of the token after the next), by
    the same logits (modded-nanogpt; after Gloeckle et al. 2024, arXiv:2404.19737, whose heads are
    several). "none" has no gradient of it.
    """
    logits = soft_cap(head_logits(x, weight, padded_rows), softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)
    if second is None or reduction == "none":
        return loss
    later = second_targets(targets, length).masked_fill(targets == IGNORE, IGNORE)
    extra = second * F.cross_entropy(logits, later, ignore_index=IGNORE, reduction="sum")
    if reduction == "mean":
        extra = extra / (targets != IGNORE).sum()
    return loss + (extra - extra.detach())


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies; forward computes the gradients too, while it has the logits.

    Backward multiplies them by the incoming gradient.
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
        sampled: Tensor | None,
        second: Tensor | None,
        length: int,
    ) -> Tensor:
        loss, grad_x, grad_weight = _head_loss_and_gradients(
            x, weight, targets, padded_rows, gradients, fp8, softcap, sampled, second, length
        )
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_derivatives()
        grad_x, grad_weight = ctx.saved_tensors
        of_weight = grad_weight * upstream if grad_weight.numel() else None
        return (grad_x * upstream).to(grad_x.dtype), of_weight, *[None] * 8


@custom_op
def _head_loss_and_gradients(  # noqa: PLR0917
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    padded_rows: int,
    gradients: int,
    fp8: bool,
    softcap: float,
    sampled: Tensor | None,
    second: Tensor | None,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of x, gradient of weight); gradients that are not wanted are empty.

    One opaque operator: the compiler would otherwise store all logits.

    Args:
        x: see `head_loss`; so are the others but `gradients`.
        weight: (V, C).
        targets: (N,).
        padded_rows: P.
        gradients: `NO_GRADIENT`, `OF_INPUT` or `OF_INPUT_AND_WEIGHT`.
        fp8: three matmuls in fp8; needs `OF_INPUT_AND_WEIGHT`.
        softcap: 0: none.
        length: T.
    """
    (n, width), rows, dtype = x.shape, weight.shape[0], x.dtype
    exact = torch.promote_types(dtype, torch.float32)
    ids = raised = None
    if size := int(sampled) if sampled is not None else 0:
        ids, targets, raised = sample_ids(targets, rows, size)
        head, rows = weight[ids].to(dtype), size
    else:
        head = _padded(weight, padded_rows, dtype)
    later = None if second is None else Later(second_targets(targets, length), second)
    if fp8:
        total, grad_x, grad_head = _head_in_fp8(x, head, targets, rows, softcap, raised, later)
        return total, grad_x, _of_weight(grad_head, weight, ids)
    needs_grad, trains_weight = gradients != NO_GRADIENT, gradients == OF_INPUT_AND_WEIGHT
    grad_x = torch.empty_like(x) if needs_grad else x.new_empty(0)
    unset = torch.empty_like if n else torch.zeros_like
    grad_head = unset(head, dtype=exact) if trains_weight else x.new_empty(0)
    total = torch.zeros((), dtype=exact, device=x.device)
    # On a CPU a chunk's logits are as large as the weight gradient that it adds to. A GPU needs
    # larger matmuls to be busy; it holds at most a quarter of a large batch's logits.
    chunk = _rows_at_once(n) if x.is_cuda else width
    for start in range(0, n, chunk):
        part, target = x[start : start + chunk], targets[start : start + chunk]
        logits = part @ head.t()
        after = later and later.part(slice(start, start + chunk))
        options = rows, needs_grad, softcap, raised, after
        loss, grad = loss_and_gradient(logits, target, *options)
        total += loss
        if needs_grad:
            grad_x[start : start + chunk] = grad @ head
        if trains_weight:
            _write_matmul(grad_head, grad.t(), part, adds=start > 0)
    return total, grad_x, _of_weight(grad_head, weight, ids) if trains_weight else grad_head


def _padded(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(V, C) with rows of zeros below, rounded; `F.pad` would copy it in float32 first."""
    padded = weight.new_empty(rows, weight.shape[1], dtype=dtype)
    padded[: len(weight)].copy_(weight)
    padded[len(weight) :].zero_()
    return padded


def _of_weight(grad_head: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
    """The gradient of all rows of the weight from that of the head, whose rows are `ids`."""
    if ids is None:
        return grad_head[: weight.shape[0]].to(weight.dtype)
    return torch.zeros_like(weight).index_copy_(0, ids, grad_head.to(weight.dtype))


def _rows_at_once(n: int) -> int:
    """Rows of a chunk on a GPU: 8,192, or a quarter of a large batch; a multiple of 128.

    Each chunk adds to the gradient of the weight, which moves it twice: 0.3 GB for GPT-2. Logits
    of 8,192 rows take 0.8 GB.
    """
    return max(8192, math.ceil(n / 512) * 128)


def _head_in_fp8(  # noqa: PLR0917
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    vocab: int,
    softcap: float,
    raised: Tensor | None = None,
    later: Later | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of x, gradient of the head) in fp8: e4m3 logits, e5m2 gradients.

    Matmuls of gradients sum many terms, so they do not use the fast accumulator, which is short.

    Without a cap, the mean row of the head is subtracted first. It shifts all logits of a token
    equally, so softmax ignores it, but rounded to fp8 it would shift each logit differently. The
    gradient of x ignores it too, because gradients of logits sum to zero over the vocabulary.
    """
    n = x.shape[0]
    fill = -n % 64  # the kernels' tiles have at most 64 rows
    x, targets = F.pad(x, (0, 0, 0, fill)), F.pad(targets, (0, fill), value=IGNORE)
    if later:
        later = Later(F.pad(later.targets, (0, fill), value=IGNORE), later.share)
    x8, x8_t, x_scale = quantize(x)
    if not softcap:  # tanh does not ignore a shift
        head = (head - head[:vocab].mean(0, dtype=torch.float32)).to(head.dtype)
    head8, head8_t, head_scale = quantize(head)
    grad_scale = torch.full((), 2.0**-GRADIENT_SCALE, device=x.device)
    grad_x, grad_head = torch.empty_like(x), None
    total = torch.zeros((), device=x.device)
    for start in range(0, n + fill, _rows_at_once(n)):
        rows = slice(start, start + _rows_at_once(n))
        logits = scaled_matmul(x8[rows], head8.t(), x_scale, head_scale, x.dtype, fast=True)
        options = vocab, softcap, raised, later and later.part(rows)
        loss, grad, grad_t = loss_and_gradient_fp8(logits, targets[rows], *options)
        total += loss
        grad_x[rows] = scaled_matmul(grad, head8_t.t(), grad_scale, head_scale, x.dtype)
        x8_rows = x8_t[:, rows].t()
        of_head = scaled_matmul(grad_t, x8_rows, grad_scale, x_scale, torch.float32)
        grad_head = of_head if grad_head is None else grad_head.add_(of_head)
    return total, grad_x[:n], grad_head


@torch.library.register_fake("gpt2::head_loss_and_gradients")
def _head_loss_and_gradients_fake(  # noqa: PLR0917
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    padded_rows: int,
    gradients: int,
    fp8: bool,
    softcap: float,
    sampled: Tensor | None,
    second: Tensor | None,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty_like(x) if gradients != NO_GRADIENT else x.new_empty(0)
    trains_weight = gradients == OF_INPUT_AND_WEIGHT
    grad_weight = torch.empty_like(weight) if trains_weight else weight.new_empty(0)
    return x.new_empty((), dtype=exact), grad_x, grad_weight


def _write_matmul(out: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """out = a @ b, or out += a @ b, accumulated in the dtype of out."""
    if a.dtype == out.dtype or not out.is_cuda:
        product = a @ b
        _ = out.add_(product) if adds else out.copy_(product)
    elif adds:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
