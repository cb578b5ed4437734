"""Triton kernels that write one token of one sequence, and begin before their predecessors end.

With one sequence a token of GPT-2 waits for the beginnings of kernels, not for arithmetic: 73
kernels take 313 µs on an H200, which reads the weights in 60. Here a token takes five kernels a
layer and three more, and each uses programmatic dependent launch (CUDA C++ Programming Guide): it
lets its successor start at once (`gdc_launch_dependents`), loads its weights into registers, waits
until its predecessor has ended (`gdc_wait`), and only then reads what that wrote.

Why no kernel reads or overwrites too early, though several may run at a time:

- `gdc_wait` returns when the predecessor has ended and its writes are visible. Every program of
  every kernel calls it before it ends, so the end of a kernel implies the end of all before it.
- Before `gdc_wait` a kernel reads only what no kernel of the pass has written: weights, the length,
  and positions of the cache before the new one. The last kernel but one changes the length, when
  all readers have ended. After `gdc_wait` come all other reads and all writes.
- The first kernel of a pass, the embedding, is launched as usual: it begins when all earlier work
  has ended. It reads the token and the length, which earlier work may have written.

Imported on CUDA devices only. `generate.few_token_pass.next_logits` is the plain form.

Shapes: `C` channels, `H` heads, `D` = C / H, `V` vocabulary.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

WIDEST = 1600  # channels; the rows of wider networks do not fit into registers
CAPABILITY = 9, 0  # programmatic dependent launch came with Hopper
SPAN = 128  # positions of the cache that a program of attention loads before it waits


class Tiles(NamedTuple):
    """Rows of a matrix per program and warps of a program; shares of a head's cache."""

    qkv: tuple[int, int] = 4, 4
    proj: tuple[int, int] = 4, 4
    fc: tuple[int, int] = 8, 4
    out: tuple[int, int] = 2, 4
    head: tuple[int, int] = 8, 4
    shares: int = 4
    attention_warps: int = 8
    joined: bool = False


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_three(a, b, c, d, e, f):  # noqa: PLR0917 - Triton calls by position
    return a + d, b + e, c + f


@triton.jit
def _embed(  # noqa: PLR0917 - Triton launches by position
    token,
    lengths,
    wte,
    wpe,
    x,
    width: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
):
    """x = wte[token] + wpe[length], in float32."""
    if early:
        gdc_launch_dependents()
    k = tl.program_id(0) * block + tl.arange(0, block)
    inside = k < width
    of_token = tl.load(wte + tl.load(token) * width + k, mask=inside, other=0.0)
    of_place = tl.load(wpe + tl.load(lengths) * width + k, mask=inside, other=0.0)
    tl.store(x + k, of_token.to(tl.float32) + of_place.to(tl.float32), mask=inside)


@triton.jit
def _linear(  # noqa: PLR0917 - Triton launches by position
    x,
    gain,
    shift,
    weight,
    bias,
    out,
    best,
    lengths,
    eps,
    outputs,
    width: tl.constexpr,
    normed: tl.constexpr,
    gelu: tl.constexpr,
    added: tl.constexpr,
    head: tl.constexpr,
    joined: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
):
    """out = gelu(norm(x) weightᵀ + bias), or added to out; a program per `tile` outputs.

    With `joined`, a LayerNorm is ((Σ w g x) - mean Σ w g) / deviation + Σ w s, w of a row, g of the
    gain and s of the shift: two of the sums need no x, so they come early, and the others are one.

    The head has no bias; it notes the greatest of its logits for `_choose` and advances the length.
    """
    if early:
        gdc_launch_dependents()
    n, k = tl.program_id(0) * tile + tl.arange(0, tile), tl.arange(0, block)
    exists, inside = n < outputs, k < width
    w = tl.load(
        weight + n[:, None] * width + k[None, :],
        mask=exists[:, None] & inside[None, :],
        other=0.0,
    )
    y = tl.zeros((tile,), tl.float32)
    if not head:
        y += tl.load(bias + n, mask=exists, other=0.0).to(tl.float32)
    if normed:
        g = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(shift + k, mask=inside, other=0.0).to(tl.float32)
        if joined:
            of_gain = tl.sum(w.to(tl.float32) * g[None, :], 1)
            y += tl.sum(w.to(tl.float32) * s[None, :], 1)
    if early:
        gdc_wait()
    v = tl.load(x + k, mask=inside, other=0.0)
    if normed and joined:
        product = w.to(tl.float32) * (g * v)[None, :]
        v = tl.broadcast_to(v[None, :], (tile, block))
        product, total, squares = tl.reduce((product, v, v * v), 1, _add_three)
        mean = total / width
        scale = tl.rsqrt(tl.maximum(squares / width - mean * mean, 0.0) + eps)
        y += scale * (product - mean * of_gain)
    else:
        if normed:
            total, squares = tl.reduce((v, v * v), 0, _add_two)
            mean = total / width
            scale = tl.rsqrt(tl.maximum(squares / width - mean * mean, 0.0) + eps)
            v = (v - mean) * scale * g + s  # 0 outside, as g and s are
        y += tl.sum(w.to(tl.float32) * v[None, :], 1)
    if gelu:  # ½ (1 + tanh u) = σ(2u), see `linear.gelu`
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if added:
        y += tl.load(out + n, mask=exists, other=0.0)
    tl.store(out + n, y, mask=exists)
    if head:
        rounded = tl.where(exists, y.to(out.dtype.element_ty).to(tl.float32), -float("inf"))
        tl.store(best + tl.program_id(0), tl.max(rounded, 0))
        if tl.program_id(0) == 0:
            tl.store(lengths, tl.load(lengths) + 1)


@triton.jit
def _attend(  # noqa: PLR0917 - Triton launches by position
    qkv,
    keys,
    values,
    lengths,
    mixed,
    sums,
    capacity,
    scale,
    heads: tl.constexpr,
    D: tl.constexpr,
    lanes: tl.constexpr,
    shares: tl.constexpr,
    span: tl.constexpr,
    early: tl.constexpr,
):
    """Attention of a head over a share of its cache: the mixture of values, and log Σ e^score.

    Online softmax (Milakov & Gimelshein 2018), `span` positions at a time.
    """
    if early:
        gdc_launch_dependents()
    head, share, d = tl.program_id(0), tl.program_id(1), tl.arange(0, lanes)
    length = tl.load(lengths).to(tl.int32)
    size = (length + shares - 1) // shares
    begin, end = share * size, tl.minimum(length, (share + 1) * size)
    real, s = d < D, begin + tl.arange(0, span)
    cache = head * capacity * D
    at = cache + s[:, None] * D + d[None, :]
    mask = (s < end)[:, None] & real[None, :]
    key = tl.load(keys + at, mask=mask, other=0.0)
    value = tl.load(values + at, mask=mask, other=0.0)
    if early:
        gdc_wait()
    new = qkv + head * D + d
    q = tl.load(new, mask=real, other=0.0) * scale
    # rounded as the cache holds them
    new_k = tl.load(new + heads * D, mask=real, other=0.0).to(key.dtype)
    new_v = tl.load(new + 2 * heads * D, mask=real, other=0.0).to(key.dtype)
    first = share == 0  # it takes the new position too
    tl.store(keys + cache + length * D + d, new_k, mask=real & first)
    tl.store(values + cache + length * D + d, new_v, mask=real & first)
    score = tl.where(s < end, tl.sum(key.to(tl.float32) * q[None, :], 1), -float("inf"))
    of_new = tl.where(first, tl.sum(new_k.to(tl.float32) * q, 0), -float("inf"))
    # an empty share has a finite maximum too: -inf - -inf would be NaN
    top = tl.maximum(tl.maximum(tl.max(score, 0), of_new), -1e30)
    p, p_new = tl.exp(score - top), tl.exp(of_new - top)
    total = tl.sum(p, 0) + p_new
    mix = tl.sum(p[:, None] * value.to(tl.float32), 0) + p_new * new_v.to(tl.float32)
    begin += span
    while begin < end:
        s = begin + tl.arange(0, span)
        at = cache + s[:, None] * D + d[None, :]
        mask = (s < end)[:, None] & real[None, :]
        key = tl.load(keys + at, mask=mask, other=0.0)
        value = tl.load(values + at, mask=mask, other=0.0)
        score = tl.where(s < end, tl.sum(key.to(tl.float32) * q[None, :], 1), -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        shrink, p = tl.exp(top - new_top), tl.exp(score - new_top)
        total = total * shrink + tl.sum(p, 0)
        mix = mix * shrink + tl.sum(p[:, None] * value.to(tl.float32), 0)
        top = new_top
        begin += span
    tl.store(mixed + (share * heads + head) * D + d, mix / tl.maximum(total, 1e-30), mask=real)
    tl.store(sums + share * heads + head, tl.where(total > 0, top + tl.log(total), -1e30))


@triton.jit
def _project(  # noqa: PLR0917 - Triton launches by position
    mixed,
    sums,
    weight,
    bias,
    x,
    width: tl.constexpr,
    heads: tl.constexpr,
    shares: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
):
    """x += attention weightᵀ + bias; first joins the shares of attention."""
    if early:
        gdc_launch_dependents()
    n, k = tl.program_id(0) * tile + tl.arange(0, tile), tl.arange(0, block)
    exists, inside = n < width, k < width
    w = tl.load(
        weight + n[:, None] * width + k[None, :],
        mask=exists[:, None] & inside[None, :],
        other=0.0,
    )
    y = tl.load(bias + n, mask=exists, other=0.0).to(tl.float32)
    if early:
        gdc_wait()
    y += tl.load(x + n, mask=exists, other=0.0)
    share = tl.arange(0, shares)[:, None]
    parts = tl.load(mixed + share * width + k[None, :], mask=inside[None, :], other=0.0)
    of_head = tl.minimum(k // (width // heads), heads - 1)
    weights = tl.load(sums + share * heads + of_head[None, :])
    weights = tl.exp(weights - tl.max(weights, 0)[None, :])  # 0 for an empty share
    v = tl.sum(weights * parts, 0) / tl.sum(weights, 0)
    y += tl.sum(w.to(tl.float32) * v[None, :], 1)
    tl.store(x + n, y, mask=exists)


@triton.jit
def _choose(  # noqa: PLR0917 - Triton launches by position
    logits,
    best,
    token,
    outputs,
    tile: tl.constexpr,
    tiles: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
):
    """token = the first of the greatest logits; `best` holds the greatest of each `tile`."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.arange(0, block)
    greatest = tl.load(best + i, mask=i < tiles, other=-float("inf"))
    top = tl.max(greatest, 0)
    # NaN equals nothing: then the last tile
    of_tile = tl.minimum(tl.min(tl.where(greatest == top, i, block), 0), tiles - 1)
    n = of_tile * tile + tl.arange(0, tile)
    y = tl.load(logits + n, mask=n < outputs, other=-float("inf")).to(tl.float32)
    tl.store(token, tl.min(tl.where(y == top, n, outputs - 1), 0).to(tl.int64))


def fits(model: Any, rows: int) -> bool:
    """Whether the kernels are made for a network of GPT-2, its precision, its GPU and so many rows.

    Args:
        model: one that `few_token_pass.supports` accepts.
        rows: sequences.
    """
    weight = model.transformer.wte.weight
    if rows > 1 or not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    return (
        model.config.n_embd <= WIDEST
        and torch.cuda.get_device_capability(weight.device) >= CAPABILITY
    )


def next_logits_(
    model: Any,
    token: Tensor,
    cache: Any,
    *,
    greedy: bool = False,
    early: bool = True,
    tiles: Tiles = Tiles(),  # noqa: B008 - a constant
) -> Tensor:
    """Appends a token to a cache of one row; the logits that follow.

    Args:
        model: one that `few_token_pass.supports` accepts.
        token: (1,) int64.
        cache: a `KVCache` of one row with `lengths`; holds one more position afterwards.
        greedy: replace the token by the likeliest next one.
        early: begin kernels before their predecessors end; False for Triton's interpreter, or to
            measure what it is worth.
        tiles: sizes of programs.

    Returns:
        (1, V) logits.
    """
    assert cache.lengths is not None
    parts, config, keys, values = model.transformer, model.config, cache.keys, cache.values
    wte, C, H, V = parts.wte.weight, config.n_embd, config.n_head, len(parts.wte.weight)
    assert keys.is_contiguous()
    D, shares = C // H, tiles.shares
    pieces = triton.cdiv(V, tiles.head[0])
    sizes = C, 3 * C, shares * C, shares * H, 4 * C, pieces
    x, qkv, mixed, sums, hidden, best = wte.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    logits = wte.new_empty(1, V)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}

    def linear(  # noqa: PLR0917 - as many things meet here
        v: Tensor, norm: Any, layer: Any, out: Tensor, size: tuple[int, int], kind: str = ""
    ) -> None:
        weight, (tile, warps) = layer.weight, size
        gain, shift, eps = (norm.weight, norm.bias, norm.eps) if norm else (v, v, 0.0)
        outputs, width = weight.shape
        _linear[(triton.cdiv(outputs, tile),)](
            v,
            gain,
            shift,
            weight,
            getattr(layer, "bias", v),
            out,
            best,
            cache.lengths,
            eps,
            outputs,
            width,
            norm is not None,
            kind == "gelu",
            kind == "added",
            kind == "head",
            tiles.joined,
            tile,
            triton.next_power_of_2(width),
            early,
            num_warps=warps,
            **options,
        )

    # without `options`: it begins when all earlier work has ended
    _embed[(triton.cdiv(C, 256),)](
        token, cache.lengths, wte, parts.wpe.weight, x, C, 256, early, num_warps=4
    )
    for i, block in enumerate(parts.h):
        attn, mlp = block.attn, block.mlp
        linear(x, block.ln_1, attn.c_attn, qkv, tiles.qkv)
        _attend[(H, shares)](
            qkv,
            keys[i],
            values[i],
            cache.lengths,
            mixed,
            sums,
            keys.shape[3],
            D**-0.5,
            H,
            D,
            triton.next_power_of_2(D),
            shares,
            SPAN,
            early,
            num_warps=tiles.attention_warps,
            enable_fp_fusion=False,  # see `triton_decoding.cached_attention_`
            **options,
        )
        tile, warps = tiles.proj
        _project[(triton.cdiv(C, tile),)](
            mixed,
            sums,
            attn.c_proj.weight,
            attn.c_proj.bias,
            x,
            C,
            H,
            shares,
            tile,
            triton.next_power_of_2(C),
            early,
            num_warps=warps,
            **options,
        )
        linear(x, block.ln_2, mlp.c_fc, hidden, tiles.fc, "gelu")
        linear(hidden, None, mlp.c_proj, x, tiles.out, "added")
    linear(x, parts.ln_f, parts.wte, logits, tiles.head, "head")
    cache.length += 1  # the head has advanced `lengths`
    if greedy:
        tile, size = tiles.head[0], triton.next_power_of_2(pieces)
        _choose[(1,)](logits, best, token, V, tile, pieces, size, early, num_warps=8, **options)
    return logits
