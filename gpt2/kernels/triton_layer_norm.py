"""Triton kernels of LayerNorm in training.

Imported on CUDA devices only, where PyTorch installs Triton. `pytest -m gpu` tests each kernel
against its plain form in `layer_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
AT_ONCE = 2048  # numbers that a program of the backward kernel holds: the fastest on an H200


@triton.jit
def _layer_norm(  # noqa: PLR0917 - Triton launches by position
    x, weight, bias, y, means, rstds, width: tl.constexpr, eps: tl.constexpr, block: tl.constexpr
):
    """One program per row, which it reads once."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / width
    values = tl.where(inside, values - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0)
    offset = tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(y + row * width + columns, values * rstd * gain + offset, mask=inside)
    tl.store(means + row, mean)
    tl.store(rstds + row, rstd)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    """LayerNorm of contiguous (..., C), and mean and 1 / deviation, (..., 1) in float32."""
    y, width = torch.empty_like(x), x.shape[-1]
    mean = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    rstd = torch.empty_like(mean)  # a view of a shared tensor might start at an unaligned address
    grid, block = (x.numel() // width,), triton.next_power_of_2(width)
    _layer_norm[grid](x, weight, bias, y, mean, rstd, width, eps, block, num_warps=WARPS)
    return y, mean, rstd


@triton.jit
def _add_layer_norm_backward(  # noqa: PLR0917 - Triton launches by position
    past,
    dys,
    x,
    weight,
    means,
    rstds,
    dx,
    shares,
    rows,
    width: tl.constexpr,
    tall: tl.constexpr,
    block: tl.constexpr,
):
    """Each program takes every so many rows, `tall` at a time, and sums what they give."""
    columns = tl.arange(0, block)[None, :]
    gain = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    of_gain, of_bias = tl.zeros((tall, block), tl.float32), tl.zeros((tall, block), tl.float32)
    for start in range(tl.program_id(0) * tall, rows, tl.num_programs(0) * tall):
        row = start + tl.arange(0, tall)[:, None]
        inside = (row < rows) & (columns < width)
        at = row.to(tl.int64) * width + columns
        dy = tl.load(dys + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(means + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstds + row, mask=row < rows, other=0.0)
        normed = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        of_gain += dy * normed
        of_bias += dy
        scaled = dy * gain
        along = tl.sum(scaled * normed, 1)[:, None] / width
        gradient = (scaled - tl.sum(scaled, 1)[:, None] / width - normed * along) * rstd
        gradient += tl.load(past + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, gradient, mask=inside)
    at = shares + tl.program_id(0) * 2 * width + tl.arange(0, block)
    tl.store(at, tl.sum(of_gain, 0), mask=tl.arange(0, block) < width)
    tl.store(at + width, tl.sum(of_bias, 0), mask=tl.arange(0, block) < width)


def add_layer_norm_backward(  # noqa: PLR0917
    past: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    programs: int,
) -> tuple[Tensor, Tensor]:
    """`layer_norm._add_layer_norm_backward` of contiguous tensors; shares of so many programs."""
    width = x.shape[-1]
    rows, block = x.numel() // width, triton.next_power_of_2(width)
    dx, shares = torch.empty_like(x), x.new_empty(programs, 2, width, dtype=torch.float32)
    tall = max(1, AT_ONCE // block)
    given = past, dy, x, weight, mean, rstd, dx, shares, rows, width, tall, block
    _add_layer_norm_backward[programs,](*given, num_warps=WARPS)
    return dx, shares
