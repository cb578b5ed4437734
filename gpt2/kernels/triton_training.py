"""Triton kernels of the head in training: cross-entropy and fp8 quantization.

Imported on CUDA devices only, where PyTorch installs Triton. `pytest -m gpu` tests each kernel
against its plain form in `logits_loss` and `fp8`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import GRADIENT_SCALE, e4m3_scale

LOG2_E = tl.constexpr(1.4426950408889634)  # e^x = 2^(x · log2 e); GPUs have 2^x in hardware
BLOCK, WARPS = 2048, 4  # columns at a time, and warps per row: the fastest on an H200
TALL, WIDE, TILE_WARPS = 64, 64, 4  # of a tile of `_gradient_fp8`: the fastest on an H200
FOUR_TO_FP8 = (  # PTX: four float32 become one word of four fp8 numbers
    "{{ .reg .b16 a, b; cvt.rn.satfinite.{0}x2.f32 a, $2, $1;"
    " cvt.rn.satfinite.{0}x2.f32 b, $4, $3; mov.b32 $0, {{a, b}}; }}"
)
TO_E5M2 = tl.constexpr(FOUR_TO_FP8.format("e5m2"))
TO_E4M3 = tl.constexpr(FOUR_TO_FP8.format("e4m3"))


@triton.jit
def _floats(x, fast: tl.constexpr):
    """x in float32.

    fast: inline PTX, for two bf16 numbers at a time. After `x.to(tl.float32)` Triton would repeat
    the whole computation for each layout of the result.
    """
    if fast:
        x = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=f,=f,r",
            [x],
            tl.float32,
            is_pure=True,
            pack=2,
        )
    return x.to(tl.float32)


@triton.jit
def _fp8(x, dtype: tl.constexpr, conversion: tl.constexpr, nvidia: tl.constexpr):
    """x rounded to an fp8 format.

    Args:
        dtype: the format.
        conversion: inline PTX for it, `TO_E5M2` or `TO_E4M3`.
        nvidia: use the PTX, which puts four numbers into one word. ptxas 12.6 to 13.0.48 can
            miscompile Triton's own conversion where the result is stored twice
            (findings/ptxas_loses_a_pair_of_fp8.sh).
    """
    if nvidia:
        bits = tl.inline_asm_elementwise(
            conversion, "=r,f,f,f,f", [x], tl.uint8, is_pure=True, pack=4
        )
        x = bits.to(dtype, bitcast=True)
    return x.to(dtype)


@triton.jit
def _tanh(x, fast: tl.constexpr):
    """tanh x = 1 - 2 / (1 + e^(2x)).

    fast: NVIDIA's one instruction, 2^-11 off at most, where numbers in bf16 are 2^-9 off.
    """
    if fast:
        x = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        x = 1 - 2 / (1.0 + tl.exp2(x * (2 * LOG2_E)))
    return x


@triton.jit
def _capped(x, cap: tl.constexpr, fast: tl.constexpr):
    """cap · tanh(x / cap); x where cap is 0."""
    if cap > 0:
        x = cap * _tanh(x * (1.0 / cap), fast)
    return x


@triton.jit
def _weights(  # noqa: PLR0917
    logits,
    raised,
    at,
    vocab: tl.constexpr,
    padded: tl.constexpr,
    cap: tl.constexpr,
    fast: tl.constexpr,
    raises: tl.constexpr,
):
    """(capped logits of these columns, log2 of their weights in the softmax)."""
    # The mask ends at a multiple of 128, so that loads stay 16 bytes wide.
    y = _capped(tl.load(logits + at, mask=at < padded, other=0.0).to(tl.float32), cap, fast)
    x = y + tl.load(raised + at, mask=at < vocab, other=0.0) if raises else y
    return y, tl.where(at < vocab, x * LOG2_E, -float("inf"))


@triton.jit
def _minus_targets(p, at, target, after, shares, one, two: tl.constexpr):  # noqa: PLR0917
    """p - one-hot; with two: (1 + share) · p - one-hot - share · one-hot of the token after."""
    if two:
        share = tl.where(after >= 0, tl.load(shares), 0.0)
        p = p * (1.0 + share) - tl.where(at == after, share * one, 0.0)
    return p - tl.where(at == target, one, 0.0)


@triton.jit
def _log_sum(  # noqa: PLR0917
    logits,
    raised,
    vocab: tl.constexpr,
    padded: tl.constexpr,
    cap: tl.constexpr,
    fast: tl.constexpr,
    raises: tl.constexpr,
    block: tl.constexpr,
):
    """log2 Σ e^x of a row. A lane keeps its columns' maximum, and the sum of 2^(x - maximum)."""
    columns = tl.arange(0, block)
    # A small cap is maximum enough: 2^(-2 · 40 · log2 e) is still a float32.
    bounded: tl.constexpr = (cap > 0) and (cap <= 40)
    top = tl.full((block,), cap * LOG2_E if bounded else -1e30, tl.float32)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, padded, block):
        at = start + columns
        _, x = _weights(logits, raised, at, vocab, padded, cap, fast, raises)
        if bounded:
            total += tl.exp2(x - top)
        else:
            new_top = tl.maximum(top, x)
            total = total * tl.exp2(top - new_top) + tl.exp2(x - new_top)
            top = new_top
    peak = tl.max(top, 0)
    return peak + tl.log2(tl.sum(total * tl.exp2(top - peak), 0))


@triton.jit
def _cross_entropy(  # noqa: PLR0917 - Triton launches by position
    logits,
    targets,
    losses,
    log_sums,
    raised,
    later,
    shares,
    vocab: tl.constexpr,
    padded: tl.constexpr,
    needs_grad: tl.constexpr,
    cap: tl.constexpr,
    fast: tl.constexpr,
    raises: tl.constexpr,
    two: tl.constexpr,
    block: tl.constexpr,
):
    """One program per row: its loss, log2 Σ e^x, and in place of its logits their gradient."""
    row = tl.program_id(0).to(tl.int64)  # row · padded does not fit into 32 bits
    logits += row * padded
    target = tl.load(targets + row)
    counts = target >= 0
    log_sum = _log_sum(logits, raised, vocab, padded, cap, fast, raises, block)
    wanted = _capped(tl.load(logits + tl.maximum(target, 0)).to(tl.float32), cap, fast)
    if raises:
        wanted += tl.load(raised + tl.maximum(target, 0))
    tl.store(losses + row, tl.where(counts, (log_sum - wanted * LOG2_E) / LOG2_E, 0.0))
    tl.store(log_sums + row, log_sum)
    if needs_grad:
        after = tl.load(later + row) if two else -1
        for start in range(0, padded, block):
            at = start + tl.arange(0, block)
            y, x = _weights(logits, raised, at, vocab, padded, cap, fast, raises)
            gradient = tl.exp2(x - log_sum)
            gradient = _minus_targets(gradient, at, target, after, shares, 1.0, two)
            if cap > 0:
                gradient *= 1.0 - (y / cap) * (y / cap)
            gradient = tl.where(counts, gradient, 0.0).to(logits.dtype.element_ty)
            tl.store(logits + at, gradient, mask=at < padded)


def cross_entropy_(  # noqa: PLR0917
    logits: Tensor,
    targets: Tensor,
    vocab: int,
    needs_grad: bool,
    softcap: float = 0.0,
    raised: Tensor | None = None,
    later: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies in nats; with needs_grad the logits become its gradient.

    The softmax is computed in two passes, the first with a running maximum (Milakov & Gimelshein
    2018, "Online normalizer calculation for softmax", algorithm 3).

    Args:
        logits: (N, P) contiguous, of which the first `vocab` columns count.
        targets: (N,) int64, negative where nothing is predicted.
        softcap: see `logits_loss.soft_cap`.
        raised: (vocab,) float32, added to the logits after the cap; None: nothing.
        later: (N,) int64, see `logits_loss.Later`.
        share: () float32 of `later`.
    """
    options = needs_grad, softcap, raised, later, share
    return _launch_cross_entropy(logits, targets, vocab, *options)[0]


def _launch_cross_entropy(  # noqa: PLR0917
    logits: Tensor,
    targets: Tensor,
    vocab: int,
    needs_grad: bool,
    softcap: float,
    raised: Tensor | None,
    later: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, padded = logits.shape
    losses, log_sums = torch.empty(2, rows, device=logits.device, dtype=torch.float32)
    _cross_entropy[(rows,)](
        logits,
        targets,
        losses,
        log_sums,
        losses if raised is None else raised,
        targets if later is None else later,
        losses if share is None else share,
        vocab,
        padded,
        needs_grad,
        float(softcap),
        _fast(logits),
        raised is not None,
        later is not None,
        BLOCK,
        num_warps=WARPS,
    )
    return losses.sum(), log_sums


def _nvidia(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None


def _fast(logits: Tensor) -> bool:
    return logits.dtype == torch.bfloat16 and _nvidia(logits)


def cross_entropy_fp8(  # noqa: PLR0917
    logits: Tensor,
    targets: Tensor,
    vocab: int,
    softcap: float = 0.0,
    raised: Tensor | None = None,
    later: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the cross-entropies, and its gradient times 2^`GRADIENT_SCALE` in e5m2.

    The gradient comes plain and transposed: tensor cores take fp8 only with the summed dimension
    contiguous. One of the two matmuls that follow sums over columns, the other over rows.

    Args:
        logits: (N, P) contiguous, N a multiple of 64 and P of 128.
        targets: (N,) int64, negative where nothing is predicted.
        vocab: the columns that count.
        softcap: see `logits_loss.soft_cap`.
        raised: (vocab,) float32, added to the logits after the cap; None: nothing.
        later: (N,) int64, see `logits_loss.Later`.
        share: () float32 of `later`.

    Returns:
        (), (N, P), (P, N).
    """
    rows, padded = logits.shape
    assert rows % TALL == 0
    assert padded % WIDE == 0
    loss, log_sums = _launch_cross_entropy(logits, targets, vocab, False, softcap, raised)
    gradient = logits.new_empty(rows, padded, dtype=torch.float8_e5m2)
    transposed = logits.new_empty(padded, rows, dtype=torch.float8_e5m2)
    grid = (rows // TALL * (padded // WIDE),)
    _gradient_fp8[grid](
        logits,
        targets,
        log_sums,
        log_sums if raised is None else raised,
        targets if later is None else later,
        log_sums if share is None else share,
        gradient,
        transposed,
        rows,
        vocab,
        padded,
        GRADIENT_SCALE,
        float(softcap),
        _fast(logits),
        _nvidia(logits),
        raised is not None,
        later is not None,
        TALL,
        WIDE,
        num_warps=TILE_WARPS,
    )
    return loss, gradient, transposed


@triton.jit
def _gradient_fp8(  # noqa: PLR0917 - Triton launches by position
    logits, targets, log_sums, raised, later, shares, gradient, transposed, rows,
    vocab: tl.constexpr, padded: tl.constexpr, scale: tl.constexpr, cap: tl.constexpr,
    fast: tl.constexpr, nvidia: tl.constexpr, raises: tl.constexpr, two: tl.constexpr,
    tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """One program per tile of (tall, wide).

    What depends on the row or the column alone is added to the logit: -inf where nothing is
    predicted or no id is, which makes 0 of finite logits. The targets are only looked for in tiles
    that have some: most have none.
    """
    tiles = rows // tall
    top, left = tl.program_id(0) % tiles * tall, tl.program_id(0) // tiles * wide
    row, column = tl.arange(0, tall)[:, None], tl.arange(0, wide)[None, :]
    # row · padded does not fit into 32 bits, but within the tile, where 32 bits are faster
    at, corner = row * padded + column, top.to(tl.int64) * padded + left
    logit = _floats(tl.load(logits + corner + at), fast)
    target = tl.load(targets + top + row).to(tl.int32)
    here = (target >= left) & (target < left + wide)
    of_row = scale - tl.load(log_sums + top + row)
    if two:
        after = tl.load(later + top + row).to(tl.int32)
        share = tl.where(after >= 0, tl.load(shares), 0.0)
        of_row += tl.log2(1.0 + share)
        here |= (target >= 0) & (after >= left) & (after < left + wide)
    of_row = tl.where(target >= 0, of_row, -float("inf"))
    real = left + column < vocab
    of_column = tl.where(real, 0.0, -float("inf"))
    if raises:
        of_column = tl.load(raised + left + column, mask=real, other=-float("inf")) * LOG2_E
    if cap > 0:
        u = _tanh(logit * (1.0 / cap), fast)
        logit = u * cap
    value = tl.exp2(logit * LOG2_E + (of_row + of_column))
    if tl.max(here.to(tl.int32)) > 0:
        one: tl.constexpr = 2.0**scale
        value -= tl.where(left + column == target, one, 0.0)
        if two:
            value -= tl.where((left + column == after) & (target >= 0), share * one, 0.0)
    if cap > 0:
        value *= 1.0 - u * u
    value = _fp8(value, tl.float8e5, TO_E5M2, nvidia)
    tl.store(gradient + corner + at, value)
    corner = left.to(tl.int64) * rows + top
    tl.store(transposed + corner + tl.trans(column) * rows + tl.trans(row), tl.trans(value))


def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`fp8.quantize` by one kernel: (N, C) contiguous to (N, C), (C, N), () float32."""
    rows, columns = x.shape
    scale = e4m3_scale(x)
    out = x.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    transposed = x.new_empty(columns, rows, dtype=torch.float8_e4m3fn)
    grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 64))
    given = rows, columns, 64, _nvidia(x)
    _quantize[grid](x, scale, out, transposed, *given, num_warps=4)
    return out, transposed, scale


@triton.jit
def _quantize(  # noqa: PLR0917
    x, scale, out, transposed, rows, columns, side: tl.constexpr, nvidia: tl.constexpr
):
    """One program per square of (side, side)."""
    row = tl.program_id(0) * side + tl.arange(0, side)
    column = tl.program_id(1) * side + tl.arange(0, side)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) / tl.load(scale)
    value = tl.clamp(value, -448.0, 448.0)  # the quotient may round upwards
    value = _fp8(value, tl.float8e4nv, TO_E4M3, nvidia)
    tl.store(out + at, value, mask=inside)
    at = column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(transposed + at, tl.trans(value), mask=tl.trans(inside))
