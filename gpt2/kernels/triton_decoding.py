"""Triton kernels of generation: one new token of each sequence.

Such a pass is bound by reading the weights and the KV cache, and with few sequences by the number
of kernels. Imported on CUDA devices only. `pytest -m gpu` tests each kernel against its plain form
in `attention`, `generate.few_token_pass` or `generate.many_row_pass`; so does Triton's interpreter,
if Triton is installed without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# Positions of the cache that a program reads, by the most pairs of rows and heads: with few pairs,
# one program for each does not fill a GPU.
SHARES = {256: 64, 1024: 128}


@triton.jit
def _layer_norm(v, gain, shift, k, inside, width, eps):  # noqa: PLR0917 - as below
    """LayerNorm of a row v in float32, 0 where it is not `inside`; gain and shift at k."""
    v = tl.where(inside, v - tl.sum(v, 0) / width, 0.0)
    v *= tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    v *= tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    return v + tl.load(shift + k, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _small_linear(  # noqa: PLR0917 - Triton launches by position
    x,
    gain,
    shift,
    weight,
    bias,
    residual,
    out,
    outputs,
    eps,
    width: tl.constexpr,
    normed: tl.constexpr,
    biased: tl.constexpr,
    gelu: tl.constexpr,
    added: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
):
    """One program per row and `tile` outputs. With a norm, `block` holds the whole row."""
    n = tl.program_id(0) * tile + tl.arange(0, tile)
    exists = n < outputs
    x += tl.program_id(1) * width
    at = tl.program_id(1) * outputs + n
    y = tl.zeros((tile,), tl.float32)
    for start in tl.static_range(0, width, block):
        k = start + tl.arange(0, block)
        inside = k < width
        # loaded first, because it takes longest
        w = tl.load(
            weight + n[:, None] * width + k[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        )
        v = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        if normed:
            v = _layer_norm(v, gain, shift, k, inside, width, eps)
        y += tl.sum(w.to(tl.float32) * v[None, :], 1)
    if biased:
        y += tl.load(bias + n, mask=exists, other=0.0).to(tl.float32)
    if gelu:  # ½ (1 + tanh u) = σ(2u), see `linear.gelu`
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if added:
        y += tl.load(residual + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + at, y, mask=exists)


def small_linear_(  # noqa: PLR0917 - what is fused with a matmul
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: nn.LayerNorm | None,
    gelu: bool,
    residual: Tensor | None,
) -> Tensor:
    """`few_token_pass.small_linear` in one kernel, which reads the weight once for each row.

    Args:
        x: (B, K) contiguous.
        weight: (N, K) contiguous, fewer than 2^31 numbers.
        bias: (N,).
        norm: LayerNorm of width K, or None.
        gelu: whether to apply GELU.
        residual: (B, N) contiguous.
    """
    (rows, width), outputs = x.shape, len(weight)
    assert all(t is None or t.is_contiguous() for t in (x, weight, residual))
    out = x.new_empty(rows, outputs)
    tile = 2 if outputs <= 1024 else 4 if outputs <= 16384 else 8
    whole = triton.next_power_of_2(width)
    gain, shift, eps = (norm.weight, norm.bias, norm.eps) if norm else (x, x, 0.0)
    _small_linear[(triton.cdiv(outputs, tile), rows)](
        x,
        gain,
        shift,
        weight,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        outputs,
        eps,
        width,
        norm is not None,
        bias is not None,
        gelu,
        residual is not None,
        tile,
        whole if norm else min(1024, whole),
        num_warps=4,
    )
    return out


@triton.jit
def _add_layer_norm(  # noqa: PLR0917 - Triton launches by position
    x, y, gain, shift, total, normed, eps, width: tl.constexpr, block: tl.constexpr
):
    """One program per row."""
    k = tl.arange(0, block)
    inside = k < width
    at = tl.program_id(0) * width + k
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    v = v.to(total.dtype.element_ty)  # the norm sees what is stored
    tl.store(total + at, v, mask=inside)
    v = _layer_norm(v.to(tl.float32), gain, shift, k, inside, width, eps)
    tl.store(normed + at, v, mask=inside)


def add_layer_norm_(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """`many_row_pass.add_layer_norm` in one kernel; x and y are contiguous (B, C)."""
    assert x.is_contiguous()
    assert y.is_contiguous()
    (rows, width), total, normed = x.shape, torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    values = x, y, norm.weight, norm.bias, total, normed
    _add_layer_norm[(rows,)](*values, norm.eps, width, block, num_warps=4)
    return total, normed


@triton.jit
def _cached_attention(  # noqa: PLR0917 - Triton launches by position
    q,
    k,
    v,
    keys,
    values,
    lengths,
    out,
    parts,
    q_row,
    k_row,
    v_row,
    capacity,
    scale,
    heads: tl.constexpr,
    width: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    share: tl.constexpr,
    shares: tl.constexpr,
):
    """Online softmax (Milakov & Gimelshein 2018) of a row and head over a share of its cache.

    With one share the result goes to `out`; else maximum, sum and mixture go to `parts`.
    """
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    d = tl.arange(0, lanes)
    real = d < width
    length = tl.load(lengths + row)
    cache = (row * heads + head) * capacity * width
    first = tl.program_id(1) * share
    query = tl.load(q + row * q_row + head * width + d, mask=real, other=0.0).to(tl.float32) * scale
    begins = first == 0  # the first share takes the new position too, which sees itself
    new_k = tl.load(k + row * k_row + head * width + d, mask=real, other=0.0)
    new_v = tl.load(v + row * v_row + head * width + d, mask=real, other=0.0)
    kept = d < tl.where(begins, width, 0)
    tl.store(keys + cache + length * width + d, new_k, mask=kept)
    tl.store(values + cache + length * width + d, new_v, mask=kept)
    top = tl.where(begins, tl.sum(query * new_k.to(tl.float32), 0), float("-inf"))
    total = tl.where(begins, 1.0, 0.0)
    mixed = tl.where(begins, new_v.to(tl.float32), 0.0)
    for start in range(first, tl.minimum(length, first + share), block):
        s = start + tl.arange(0, block)
        at = cache + s[:, None] * width + d[None, :]
        mask = (s < length)[:, None] & real[None, :]
        key = tl.load(keys + at, mask=mask, other=0.0)
        value = tl.load(values + at, mask=mask, other=0.0)  # on its way while scores are computed
        score = tl.where(s < length, tl.sum(key.to(tl.float32) * query[None, :], 1), -float("inf"))
        top, total, mixed = _add_positions(score, value, top, total, mixed)
    if shares == 1:
        tl.store(out + (row * heads + head) * width + d, mixed / total, mask=real)
    else:
        _store_share(parts, shares, lanes, top, total, mixed)


@triton.jit
def _add_positions(score, value, top, total, mixed):
    """A step of the online softmax: (maximum, sum, mixture) with the scores of more positions."""
    new_top = tl.maximum(top, tl.max(score, 0))
    shrink, p = tl.exp(top - new_top), tl.exp(score - new_top)
    mixed = mixed * shrink + tl.sum(p[:, None] * value.to(tl.float32), 0)
    return new_top, total * shrink + tl.sum(p, 0), mixed


@triton.jit
def _store_share(  # noqa: PLR0917 - as above
    parts, shares: tl.constexpr, lanes: tl.constexpr, top, total, mixed
):
    """What a program found in its share, for `_join_shares`."""
    part = parts + (tl.program_id(0) * shares + tl.program_id(1)) * (lanes + 2)
    tl.store(part, top)
    tl.store(part + 1, total)
    tl.store(part + 2 + tl.arange(0, lanes), mixed)


@triton.jit
def _join_shares(  # noqa: PLR0917 - Triton launches by position
    parts,
    out,
    width: tl.constexpr,
    lanes: tl.constexpr,
    shares: tl.constexpr,
    padded: tl.constexpr,
):
    """One program per row and head: the softmax over all shares from what each found."""
    d, s = tl.arange(0, lanes), tl.arange(0, padded)
    part = parts + (tl.program_id(0) * shares + s) * (lanes + 2)
    top = tl.load(part, mask=s < shares, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, 0))  # 0 for a share that is not filled
    total = tl.sum(weight * tl.load(part + 1, mask=s < shares, other=0.0), 0)
    mixed = tl.load(part[:, None] + 2 + d[None, :], mask=(s < shares)[:, None], other=0.0)
    mixed = tl.sum(mixed * weight[:, None], 0)
    tl.store(out + tl.program_id(0) * width + d, mixed / total, mask=d < width)


def cached_attention_(  # noqa: PLR0917 - what attention has
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor
) -> Tensor:
    """`attention.cached_attention` of one new position; reads only the filled part of the cache.

    Args:
        q: (B, H, 1, D) with the heads of a row contiguous in memory; so k and v.
        k: (B, H, 1, D).
        v: (B, H, 1, D).
        keys: (B, H, S_max, D), contiguous, changed in place.
        values: (B, H, S_max, D), contiguous, changed in place.
        lengths: (B,) int64, positions of each row before the new one.
    """
    B, heads, _, width = q.shape
    for t in (q, k, v):
        assert t.stride()[1::2] == (width, 1)
    assert all(t.is_contiguous() for t in (keys, values))
    out = torch.empty(B, 1, heads, width, device=q.device, dtype=q.dtype)
    capacity, lanes = keys.shape[2], triton.next_power_of_2(width)
    share = next((share for pairs, share in SHARES.items() if B * heads <= pairs), capacity)
    shares = triton.cdiv(capacity, share)
    # bytes of keys that a program holds; fewer let more programs run at once, if all have one share
    held = 8192 if shares > 1 else 4096
    block = min(64, held // (lanes * keys.element_size()))  # positions
    parts = q.new_empty(B * heads * shares * (lanes + 2) if shares > 1 else 0, dtype=torch.float32)
    _cached_attention[(B * heads, shares)](
        q,
        k,
        v,
        keys,
        values,
        lengths,
        out,
        parts,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        capacity,
        width**-0.5,
        heads,
        width,
        lanes,
        block,
        share,
        shares,
        num_warps=1,  # a warp alone needs no barriers
        # Several threads compute each number and store it at one address of shared memory. With
        # fused multiply-adds their values would differ: of a·b + c·d, each rounds its own product.
        enable_fp_fusion=False,
    )
    if shares > 1:
        padded = triton.next_power_of_2(shares)
        _join_shares[(B * heads,)](parts, out, width, lanes, shares, padded, num_warps=2)
    return out.transpose(1, 2)
