"""Triton kernels. Imported on CUDA devices only, where PyTorch brings Triton along.

Each is tested against its plain form in `ops` (`pytest -m gpu`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)  # e^x = 2^(x · log2 e); GPUs have 2^x in hardware
# Sizes of blocks and numbers of warps are the fastest of those tried on an H200.


@triton.jit
def _cross_entropy(  # noqa: PLR0917 - Triton launches by position
    logits, targets, losses, vocab: tl.constexpr, padded: tl.constexpr, needs_grad: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """One program per row: its loss, and in place of its logits their gradient."""
    row = tl.program_id(0).to(tl.int64)  # row · padded does not fit into 32 bits
    logits += row * padded
    target = tl.load(targets + row)
    counts = target >= 0
    # First pass: every lane keeps the maximum of its columns, and the sum of 2^(x - maximum).
    columns = tl.arange(0, block)
    top = tl.full((block,), -1e30, tl.float32)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, padded, block):
        at = start + columns
        # The mask ends at a multiple of 128, so that loads stay 16 bytes wide.
        x = tl.load(logits + at, mask=at < padded, other=0.0).to(tl.float32)
        x = tl.where(at < vocab, x * LOG2_E, -float("inf"))
        new_top = tl.maximum(top, x)
        total = total * tl.exp2(top - new_top) + tl.exp2(x - new_top)
        top = new_top
    peak = tl.max(top, 0)
    log_sum = peak + tl.log2(tl.sum(total * tl.exp2(top - peak), 0))
    wanted = tl.load(logits + tl.maximum(target, 0)).to(tl.float32) * LOG2_E
    tl.store(losses + row, tl.where(counts, (log_sum - wanted) / LOG2_E, 0.0))
    # Second pass: softmax - one-hot. The row is still in the cache.
    if needs_grad:
        for start in range(0, padded, block):
            at = start + columns
            x = tl.load(logits + at, mask=at < padded, other=0.0).to(tl.float32)
            x = tl.where(at < vocab, x * LOG2_E, -float("inf"))
            gradient = tl.exp2(x - log_sum) - tl.where(at == target, 1.0, 0.0)
            gradient = tl.where(counts, gradient, 0.0).to(logits.dtype.element_ty)
            tl.store(logits + at, gradient, mask=at < padded)


def cross_entropy_(logits: Tensor, targets: Tensor, vocab: int, needs_grad: bool) -> Tensor:
    """Sum of the cross-entropies in nats; with needs_grad the logits become its gradient.

    The softmax is computed in two passes, the first with a running maximum (Milakov & Gimelshein
    2018, "Online normalizer calculation for softmax", algorithm 3).

    Args:
        logits: (N, P) contiguous, of which the first `vocab` columns count.
        targets: (N,) int64, negative where nothing is predicted.
    """
    rows, padded = logits.shape
    losses = torch.empty(rows, device=logits.device, dtype=torch.float32)
    _cross_entropy[(rows,)](logits, targets, losses, vocab, padded, needs_grad, 2048, num_warps=4)
    return losses.sum()


@triton.jit
def _sigmoid_of_gelu(x):
    """σ(2u) with u = √(2/π) (x + 0.044715 x³), so that gelu(x) = ½ x (1 + tanh u) = x σ(2u)."""
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _bias_gelu(  # noqa: PLR0917 - Triton launches by position
    h, bias, y, numel, width: tl.constexpr, block: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < numel
    x = tl.load(h + at, mask=inside).to(tl.float32) + tl.load(bias + at % width, mask=inside)
    tl.store(y + at, (x * _sigmoid_of_gelu(x)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_backward(  # noqa: PLR0917 - Triton launches by position
    h, bias, grad_y, grad_h, sums, rows, width: tl.constexpr, rows_each: tl.constexpr,
    block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    """One program per block of columns and `rows_each` rows; also sums them for the bias."""
    columns = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    first = tl.program_id(1).to(tl.int64) * rows_each
    b = tl.load(bias + columns, mask=columns < width)[None, :]
    total = tl.zeros((block_rows, block_columns), tl.float32)
    for start in range(0, rows_each, block_rows):
        row = (first + start + tl.arange(0, block_rows))[:, None]
        at = row * width + columns[None, :]
        inside = (row < rows) & (columns < width)[None, :]
        x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + b
        s = _sigmoid_of_gelu(x)
        slope = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)
        gradient = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(grad_h + at, gradient.to(grad_h.dtype.element_ty), mask=inside)
        total += gradient
    tl.store(sums + tl.program_id(1) * width + columns, tl.sum(total, 0), mask=columns < width)


def bias_gelu(h: Tensor, bias: Tensor) -> Tensor:
    """gelu(h + bias) in its tanh form; h (…, C) contiguous, bias (C,) float32."""
    y, numel = torch.empty_like(h), h.numel()
    _bias_gelu[(triton.cdiv(numel, 4096),)](h, bias, y, numel, len(bias), 4096, num_warps=8)
    return y


def bias_gelu_backward(h: Tensor, bias: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of h and bias, in one pass over h and grad_y."""
    width, rows = len(bias), h.numel() // len(bias)
    rows_each, block_columns = 1024, 128
    parts = triton.cdiv(rows, rows_each)
    grad_h, sums = torch.empty_like(h), torch.empty(parts, width, device=h.device)
    _bias_gelu_backward[(triton.cdiv(width, block_columns), parts)](
        h, bias, grad_y, grad_h, sums, rows, width, rows_each, 32, block_columns, num_warps=8
    )
    return grad_h, sums.sum(0)
