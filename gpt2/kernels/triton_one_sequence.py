"""Triton kernels that write one token of one sequence, and begin before their predecessors end.

With one sequence a token of GPT-2 waits for the beginnings of kernels, not for arithmetic: 73
kernels take 313 µs on an H200, which reads the weights in 60. Here a token takes five kernels a
layer and three more, by programmatic dependent launch (CUDA C++ Programming Guide): each loads its
weights into registers, lets its successor start (`gdc_launch_dependents`), waits until its
predecessor has ended (`gdc_wait`), and only then reads what that wrote.

Why no kernel reads or overwrites too early, though several run at a time:

- `gdc_wait` returns when the predecessor has ended and its writes are visible. Every program of
  every kernel calls it before it ends, so the end of a kernel implies the end of all before it.
- Before `gdc_wait` a kernel reads only what no running kernel writes: weights, the length, and
  positions of the cache before the new one. The head changes the length, after its `gdc_wait`, when
  all that read it have ended. All other reads and all writes come after `gdc_wait`.
- The first kernel, the embedding, is launched as usual: it begins when all earlier work has ended,
  which may have written the token, the length and the cache. It needs no `gdc_wait`.

Imported on CUDA devices only. `generate.few_token_pass.next_logits` is the plain form.

Shapes: `C` channels, `H` heads, `D` = C / H, `V` vocabulary.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .cuda_driver import driver_version

WIDEST = 1600  # channels; the rows of wider networks do not fit into registers
LONGEST = 1024  # positions; a longer context would need more programs for a head's attention
HOPPER, DRIVER = 9, 12030  # no later GPU was tried; CUDA graphs hold such launches since 12.3
SPAN = 128  # positions of the cache that a program of attention loads before it waits


class Tiles(NamedTuple):
    """Rows of a matrix per program, and warps of a program: the fastest of some tried on an H200.

    For up to 1,024 channels; wider networks take twice the warps.
    """

    qkv: tuple[int, int] = 2, 1
    proj: tuple[int, int] = 16, 8
    fc: tuple[int, int] = 4, 2
    out: tuple[int, int] = 2, 4
    head: tuple[int, int] = 2, 1
    head_programs: int = 16  # per multiprocessor
    shares: int = 4  # programs of attention per head, a power of two
    attention_warps: int = 4


@triton.jit
def _begin(early: tl.constexpr):
    if early == 1:
        gdc_launch_dependents()


@triton.jit
def _wait(early: tl.constexpr):
    if early == 3:
        gdc_launch_dependents()
    if early > 0:
        gdc_wait()
    if early == 2:
        gdc_launch_dependents()


@triton.jit
def _rows(weight, n, outputs, k, width: tl.constexpr):
    """Rows n of a matrix, (tile, block), zeros outside."""
    mask = (n < outputs)[:, None] & (k < width)[None, :]
    return tl.load(weight + n[:, None] * width + k[None, :], mask=mask, other=0.0)


@triton.jit
def _product(w, v):
    return tl.sum(w.to(tl.float32) * v[None, :], 1)


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _layer_norm(
    v, gain, shift, width: tl.constexpr, eps
):  # fmt: skip
    """LayerNorm of a vector; 0 where gain and shift are. Both moments are one reduction."""
    total, squares = tl.reduce((v, v * v), 0, _add_two)
    mean = total / width
    variance = tl.maximum(squares / width - mean * mean, 0.0)
    return (v - mean) * tl.rsqrt(variance + eps) * gain + shift


@triton.jit
def _embed(  # noqa: PLR0917 - Triton launches by position
    token, lengths, wte, wpe, x, width: tl.constexpr, block: tl.constexpr, early: tl.constexpr
):  # fmt: skip
    """x = wte[token] + wpe[length], in float32."""
    _begin(early)
    k = tl.program_id(0) * block + tl.arange(0, block)
    inside = k < width
    of_token = tl.load(wte + tl.load(token) * width + k, mask=inside, other=0.0)
    of_place = tl.load(wpe + tl.load(lengths) * width + k, mask=inside, other=0.0)
    tl.store(x + k, of_token.to(tl.float32) + of_place.to(tl.float32), mask=inside)


@triton.jit
def _linear(  # noqa: PLR0917 - Triton launches by position
    x, gain, shift, weight, bias, out, eps, outputs, width: tl.constexpr, normed: tl.constexpr,
    gelu: tl.constexpr, added: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """out = gelu(norm(x) weightᵀ + bias), or added to out; a program per `tile` outputs."""
    _begin(early)
    n, k = tl.program_id(0) * tile + tl.arange(0, tile), tl.arange(0, block)
    exists, inside = n < outputs, k < width
    w = _rows(weight, n, outputs, k, width)
    y = tl.load(bias + n, mask=exists, other=0.0).to(tl.float32)
    if normed:
        g = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(shift + k, mask=inside, other=0.0).to(tl.float32)
    _wait(early)
    if added:
        y += tl.load(out + n, mask=exists, other=0.0)
    v = tl.load(x + k, mask=inside, other=0.0)
    if normed:
        v = _layer_norm(v, g, s, width, eps)
    y += _product(w, v)
    if gelu:  # ½ (1 + tanh u) = σ(2u), see `linear.gelu`
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    tl.store(out + n, y, mask=exists)


@triton.jit
def _attend(  # noqa: PLR0917 - Triton launches by position
    qkv, keys, values, lengths, mixed, sums, capacity, scale, heads: tl.constexpr, D: tl.constexpr,
    lanes: tl.constexpr, shares: tl.constexpr, span: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Attention of a head over a share of its cache: the mixture of values, and log Σ e^score.

    Online softmax (Milakov & Gimelshein 2018), `span` positions at a time.
    """
    _begin(early)
    head, share, d = tl.program_id(0), tl.program_id(1), tl.arange(0, lanes)
    length = tl.load(lengths).to(tl.int32)
    size = (length + shares - 1) // shares
    start, end = share * size, tl.minimum(length, (share + 1) * size)
    keys += head * capacity * D
    values += head * capacity * D
    key, value = _positions(keys, values, start, end, d, D, span)
    _wait(early)
    real = d < D
    new = qkv + head * D + d
    q = tl.load(new, mask=real, other=0.0) * scale
    # rounded as the cache holds them
    new_k = tl.load(new + heads * D, mask=real, other=0.0).to(key.dtype)
    new_v = tl.load(new + 2 * heads * D, mask=real, other=0.0).to(key.dtype)
    first = share == 0  # it takes the new position too
    tl.store(keys + length * D + d, new_k, mask=real & first)
    tl.store(values + length * D + d, new_v, mask=real & first)
    of_new = tl.where(first, tl.sum(new_k.to(tl.float32) * q, 0), -float("inf"))
    top = tl.maximum(of_new, -1e30)  # finite without positions too: -inf - -inf would be NaN
    total = tl.exp(of_new - top)
    mix = total * new_v.to(tl.float32)
    top, total, mix = _add_positions(key, value, q, start, end, span, top, total, mix)
    start += span
    while start < end:
        key, value = _positions(keys, values, start, end, d, D, span)
        top, total, mix = _add_positions(key, value, q, start, end, span, top, total, mix)
        start += span
    tl.store(mixed + (share * heads + head) * D + d, mix / tl.maximum(total, 1e-30), mask=real)
    tl.store(sums + share * heads + head, tl.where(total > 0, top + tl.log(total), -1e30))


@triton.jit
def _positions(  # noqa: PLR0917 - Triton calls by position
    keys, values, start, end, d, D: tl.constexpr, span: tl.constexpr
):  # fmt: skip
    """Keys and values of `span` positions of a head, zeros from `end` on."""
    s = start + tl.arange(0, span)
    mask, at = (s < end)[:, None] & (d < D)[None, :], s[:, None] * D + d[None, :]
    key = tl.load(keys + at, mask=mask, other=0.0)
    return key, tl.load(values + at, mask=mask, other=0.0)


@triton.jit
def _add_positions(  # noqa: PLR0917 - Triton calls by position
    key, value, q, start, end, span: tl.constexpr, top, total, mix
):  # fmt: skip
    """A step of the online softmax: maximum, sum and mixture with more positions."""
    score = tl.sum(key.to(tl.float32) * q[None, :], 1)
    score = tl.where(start + tl.arange(0, span) < end, score, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, 0))
    shrink, p = tl.exp(top - new_top), tl.exp(score - new_top)
    mix = mix * shrink + tl.sum(p[:, None] * value.to(tl.float32), 0)
    return new_top, total * shrink + tl.sum(p, 0), mix


@triton.jit
def _project(  # noqa: PLR0917 - Triton launches by position
    mixed, sums, weight, bias, x, width: tl.constexpr, heads: tl.constexpr, shares: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """x += attention weightᵀ + bias; first joins the shares of attention."""
    _begin(early)
    n, k = tl.program_id(0) * tile + tl.arange(0, tile), tl.arange(0, block)
    exists, inside = n < width, k < width
    w = _rows(weight, n, width, k, width)
    y = tl.load(bias + n, mask=exists, other=0.0).to(tl.float32)
    _wait(early)
    y += tl.load(x + n, mask=exists, other=0.0)
    share = tl.arange(0, shares)[:, None]
    parts = tl.load(mixed + share * width + k[None, :], mask=inside[None, :], other=0.0)
    of_head = tl.minimum(k // (width // heads), heads - 1)
    weights = tl.load(sums + share * heads + of_head[None, :])
    weights = tl.exp(weights - tl.max(weights, 0)[None, :])  # 0 for an empty share
    y += _product(w, tl.sum(weights * parts, 0) / tl.sum(weights, 0))
    tl.store(x + n, y, mask=exists)


@triton.jit
def _head(  # noqa: PLR0917 - Triton launches by position
    x, gain, shift, weight, logits, best, places, lengths, eps, outputs, programs,
    width: tl.constexpr, tile: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """logits = norm(x) weightᵀ; of each program's logits the greatest, and its place.

    A program takes every `programs`-th tile of rows, and loads one while it multiplies another.
    """
    _begin(early)
    program, k, lane = tl.program_id(0), tl.arange(0, block), tl.arange(0, tile)
    inside = k < width
    n = program * tile + lane
    w = _rows(weight, n, outputs, k, width)
    g = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(shift + k, mask=inside, other=0.0).to(tl.float32)
    _wait(early)
    v = _layer_norm(tl.load(x + k, mask=inside, other=0.0), g, s, width, eps)
    # of each lane, compared as they are stored; the places of a lane come in order
    top, place = tl.full((tile,), -float("inf"), tl.float32), tl.full((tile,), 0, tl.int32)
    start = program * tile
    while start < outputs:
        next_w = _rows(weight, n + programs * tile, outputs, k, width)
        y = _product(w, v).to(logits.dtype.element_ty)
        tl.store(logits + n, y, mask=n < outputs)
        y = tl.where(n < outputs, y.to(tl.float32), -float("inf"))
        place = tl.where(y > top, n, place)
        top = tl.maximum(top, y)
        w, n, start = next_w, n + programs * tile, start + programs * tile
    greatest = tl.max(top, 0)
    tl.store(best + program, greatest)
    tl.store(places + program, tl.min(tl.where(top == greatest, place, outputs - 1), 0))
    if program == 0:
        tl.store(lengths, tl.load(lengths) + 1)


@triton.jit
def _choose(  # noqa: PLR0917 - Triton launches by position
    best, places, token, outputs, programs, block: tl.constexpr, early: tl.constexpr
):  # fmt: skip
    """token = the first place of the greatest logit."""
    _begin(early)
    _wait(early)
    i = tl.arange(0, block)
    top = tl.load(best + i, mask=i < programs, other=-float("inf"))
    place = tl.load(places + i, mask=i < programs, other=0)
    # NaN equals nothing: then the last token
    place = tl.where((top == tl.max(top, 0)) & (i < programs), place, outputs - 1)
    tl.store(token, tl.min(place, 0).to(tl.int64))


def fits(model: Any, rows: int) -> bool:
    """Whether the kernels are made for a network of GPT-2, its precision, its GPU and so many rows.

    Args:
        model: one that `few_token_pass.supports` accepts.
        rows: sequences.
    """
    weight, config = model.transformer.wte.weight, model.config
    if rows > 1 or not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    if config.n_embd > WIDEST or config.block_size > LONGEST or torch.version.hip is not None:
        return False
    major, _ = torch.cuda.get_device_capability(weight.device)
    return major == HOPPER and driver_version() >= DRIVER


class OneSequence:
    """The launches of a pass: appends a token to a cache of one row, computes the logits after it.

    Args:
        model: one that `few_token_pass.supports` accepts.
        cache: a `KVCache` of one row with `lengths`.
        early: when a kernel lets its successor start: 1 at once, 3 before it waits, 2 after;
            0: none starts early, for Triton's interpreter.
        tiles: sizes of programs.
    """

    def __init__(
        self, model: Any, cache: Any, *, early: int = 3, tiles: Tiles | None = None
    ) -> None:
        assert cache.lengths is not None
        assert cache.keys.is_contiguous()
        self.model, self.config, self.cache = model, model.config, cache
        self.early, self.tiles = early, tiles or Tiles()
        self.wide = 2 if model.config.n_embd > 1024 else 1
        self.options: dict[str, Any] = {"launch_pdl": True} if early else {}
        wte = model.transformer.wte.weight
        count = 1
        if wte.is_cuda:
            count = torch.cuda.get_device_properties(wte.device).multi_processor_count
        self.programs = count * self.tiles.head_programs  # of the head
        C, shares = self.config.n_embd, self.tiles.shares
        sizes = C, 3 * C, shares * C, shares * self.config.n_head, 4 * C, self.programs
        buffers = wte.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
        self.x, self.qkv, self.mixed, self.sums, self.hidden, self.best = buffers
        self.places = wte.new_empty(self.programs, dtype=torch.int32)
        self.logits = wte.new_empty(1, len(wte))  # (1, V)

    def next_logits(self, token: Tensor, *, choose: bool = False) -> Tensor:
        """Appends a token; the logits that follow.

        Args:
            token: (1,) int64.
            choose: write the likeliest next token to `token`.

        Returns:
            (1, V) logits, overwritten by the next call.
        """
        parts, C, lengths = self.model.transformer, self.config.n_embd, self.cache.lengths
        # without `options`: it begins when all earlier work has ended
        _embed[(triton.cdiv(C, 256),)](
            token, lengths, parts.wte.weight, parts.wpe.weight, self.x, C, 256, self.early
        )
        for layer, block in enumerate(parts.h):
            attn, mlp = block.attn, block.mlp
            self._linear(self.x, attn.c_attn, self.qkv, self.tiles.qkv, norm=block.ln_1)
            self._attention(layer, attn.c_proj)
            self._linear(self.x, mlp.c_fc, self.hidden, self.tiles.fc, norm=block.ln_2, gelu=True)
            self._linear(self.hidden, mlp.c_proj, self.x, self.tiles.out, added=True)
        self._logits(parts.wte.weight, parts.ln_f)
        self.cache.length += 1  # the head has advanced `lengths`
        if choose:
            size = triton.next_power_of_2(self.programs)
            given = self.best, self.places, token, self.logits.shape[1], self.programs
            _choose[(1,)](*given, size, self.early, num_warps=4, **self.options)
        return self.logits

    def _linear(
        self,
        x: Tensor,
        layer: Any,
        out: Tensor,
        size: tuple[int, int],
        *,
        norm: Any = None,
        gelu: bool = False,
        added: bool = False,
    ) -> None:
        """out = gelu(layer(norm(x))), or added to out."""
        (outputs, width), (tile, warps) = layer.weight.shape, size
        gain, shift, eps = (norm.weight, norm.bias, norm.eps) if norm else (x, x, 0.0)
        given = x, gain, shift, layer.weight, layer.bias, out, eps, outputs, width
        kind = norm is not None, gelu, added, tile, triton.next_power_of_2(width), self.early
        grid = (triton.cdiv(outputs, tile),)
        _linear[grid](*given, *kind, num_warps=warps * self.wide, **self.options)

    def _attention(self, layer: int, proj: Any) -> None:
        """x += proj(attention), whose shares are joined by the second kernel."""
        C, H, cache, shares = self.config.n_embd, self.config.n_head, self.cache, self.tiles.shares
        D, capacity = C // H, cache.keys.shape[3]
        of_layer = self.qkv, cache.keys[layer], cache.values[layer], cache.lengths
        sizes = capacity, D**-0.5, H, D, triton.next_power_of_2(D), shares, SPAN, self.early
        _attend[(H, shares)](
            *of_layer,
            self.mixed,
            self.sums,
            *sizes,
            num_warps=self.tiles.attention_warps,
            enable_fp_fusion=False,  # see `triton_decoding.cached_attention_`
            **self.options,
        )
        tile, warps = self.tiles.proj
        given = self.mixed, self.sums, proj.weight, proj.bias, self.x, C, H, shares, tile
        block, grid = triton.next_power_of_2(C), (triton.cdiv(C, tile),)
        _project[grid](*given, block, self.early, num_warps=warps * self.wide, **self.options)

    def _logits(self, weight: Tensor, norm: Any) -> None:
        """logits = norm(x) weightᵀ."""
        (outputs, width), (tile, warps) = weight.shape, self.tiles.head
        given = self.x, norm.weight, norm.bias, weight, self.logits, self.best, self.places
        sizes = self.cache.lengths, norm.eps, outputs, self.programs, width, tile
        block, grid = triton.next_power_of_2(width), (self.programs,)
        _head[grid](*given, *sizes, block, self.early, num_warps=warps * self.wide, **self.options)
