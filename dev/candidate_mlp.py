"""A candidate: the MLP of `triton_one_sequence` as one kernel, whose programs add to one vector."""
# ruff: noqa: D102, PLR0917, E501

from typing import Any

import torch
import triton
import triton.language as tl

from gpt2.kernels import triton_one_sequence as one
from gpt2.kernels.triton_one_sequence import _begin, _layer_norm, _product, _rows, _wait


@triton.jit
def _project2(
    mixed, sums, weight, bias, x, total, width: tl.constexpr, heads: tl.constexpr, shares: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """x = total += attention weightᵀ + bias."""
    _begin(early)
    n, k = tl.program_id(0) * tile + tl.arange(0, tile), tl.arange(0, block)
    exists, inside = n < width, k < width
    w = _rows(weight, n, width, k, width)
    y = tl.load(bias + n, mask=exists, other=0.0).to(tl.float32)
    _wait(early)
    y += tl.load(total + n, mask=exists, other=0.0)
    share = tl.arange(0, shares)[:, None]
    parts = tl.load(mixed + share * width + k[None, :], mask=inside[None, :], other=0.0)
    of_head = tl.minimum(k // (width // heads), heads - 1)
    weights = tl.load(sums + share * heads + of_head[None, :])
    weights = tl.exp(weights - tl.max(weights, 0)[None, :])
    y += _product(w, tl.sum(weights * parts, 0) / tl.sum(weights, 0))
    tl.store(x + n, y, mask=exists)
    tl.store(total + n, y, mask=exists)


@triton.jit
def _mlp(
    x, gain, shift, weight1, bias1, weight2, bias2, total, eps, width: tl.constexpr, hidden: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """total += MLP of norm(x), the part of `tile` hidden numbers."""
    _begin(early)
    n, k = tl.program_id(0) * tile + tl.arange(0, tile), tl.arange(0, block)
    inside = k < width
    w1 = _rows(weight1, n, hidden, k, width)
    w2 = tl.load(weight2 + k[:, None] * hidden + n[None, :], mask=inside[:, None], other=0.0)
    b1 = tl.load(bias1 + n).to(tl.float32)
    b2 = tl.load(bias2 + k, mask=inside & (tl.program_id(0) == 0), other=0.0).to(tl.float32)
    g = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(shift + k, mask=inside, other=0.0).to(tl.float32)
    _wait(early)
    v = _layer_norm(tl.load(x + k, mask=inside, other=0.0), g, s, width, eps)
    h = _product(w1, v) + b1
    h *= tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    y = tl.sum(w2.to(tl.float32) * h[None, :], 1) + b2
    tl.atomic_add(total + k, y, mask=inside, sem="relaxed")


class FusedMLP(one.OneSequence):
    """Four kernels a layer."""

    def __init__(self, model: Any, cache: Any, *, size: tuple[int, int] = (16, 8), **given: Any):
        super().__init__(model, cache, **given)
        self.size, self.total = size, torch.empty_like(self.x)

    def next_logits(self, token, written=None):
        parts, C, lengths, H = (
            self.model.transformer,
            self.config.n_embd,
            self.cache.lengths,
            self.config.n_head,
        )
        shares, D, block = self.tiles.shares, C // H, triton.next_power_of_2(C)
        one._embed[(triton.cdiv(C, 256),)](
            token, lengths, parts.wte.weight, parts.wpe.weight, self.total, C, 256, self.early
        )
        for i, b in enumerate(parts.h):
            attn, mlp = b.attn, b.mlp
            self._linear(self.total, attn.c_attn, self.qkv, self.tiles.qkv, norm=b.ln_1)
            one._attend[(H, shares)](
                self.qkv, self.cache.keys[i], self.cache.values[i], lengths, self.mixed, self.sums,
                self.cache.keys.shape[3], D**-0.5, H, D, triton.next_power_of_2(D), shares, one.SPAN, self.early,
                num_warps=self.tiles.attention_warps, enable_fp_fusion=False, **self.options,
            )  # fmt: skip
            tile, warps = self.tiles.proj
            _project2[(triton.cdiv(C, tile),)](
                self.mixed, self.sums, attn.c_proj.weight, attn.c_proj.bias, self.x, self.total, C, H, shares,
                tile, block, self.early, num_warps=warps, **self.options,
            )  # fmt: skip
            tile, warps = self.size
            _mlp[(4 * C // tile,)](
                self.x, b.ln_2.weight, b.ln_2.bias, mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight,
                mlp.c_proj.bias, self.total, b.ln_2.eps, C, 4 * C, tile, block, self.early,
                num_warps=warps, **self.options,
            )  # fmt: skip
        self.x, kept = self.total, self.x
        self._logits(parts.wte.weight, parts.ln_f)
        self.x = kept
        self.cache.length += 1
        if written is not None:
            given = self.best, self.places, token, written, self.logits.shape[1], self.programs
            size = triton.next_power_of_2(self.programs)
            one._choose[(1,)](*given, size, self.early, num_warps=4, **self.options)
        return self.logits
