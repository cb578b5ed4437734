"""A whole token of one sequence in one persistent Triton kernel: all layers of GPT-2.

With one sequence a token waits for launches and for the first bytes of each kernel, not for the
arithmetic: 73 kernels take 340 µs on an H200, which reads the weights in 56. Here one program per
multiprocessor stays for all layers. A layer has five phases, each a matrix-vector product or
attention, and every program computes some rows of each.

Programs pass vectors through `work`, without a barrier: a word that is not written yet has all bits
set, a NaN that no arithmetic results in, and a reader loads until none is left (the idea of NCCL's
protocol LL). Each layer has words of its own, so no program can be overtaken. There are two sets of
words, used in turn: a token restores the set of the token before.

A program requests its rows of the next layer for the L2 cache before it works on this one, and
loads those of a phase before it waits for the phase before, since weights depend on nothing.

Imported on CUDA devices only. `few_token_pass.next_logits` is the plain form. Triton's interpreter
runs programs one after the other, so tests there launch phase by phase.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

PHASES = 5  # of a layer
SHARES = 4  # programs that share the cache of a head, a power of two
MOST_POLLS = 1 << 17  # then a program goes on with NaN: a mistake must not hang the GPU
PROGRAMS = 128  # one per multiprocessor at most: others would not start while these wait for them
FEWEST_PROGRAMS = 64  # with fewer, the rows of a program fill its registers
WIDEST = 1024  # channels; wider networks wait less for launches, and their rows fill the registers
WARPS = 8
EMPTY = tl.constexpr(-1)


@triton.jit
def _await(at, mask, polls: tl.constexpr):
    """The float32 numbers at some addresses, as soon as other programs have written all."""
    bits = tl.load(at, mask=mask, other=0, volatile=True)
    tries = 0
    while (tl.max((bits == EMPTY).to(tl.int32), axis=None) > 0) & (tries < polls):
        bits = tl.load(at, mask=mask, other=0, volatile=True)
        tries += 1
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _send(at, value, mask):
    tl.store(at, value.to(tl.float32).to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def _weights(weight, n, rows, k, width: tl.constexpr):
    """Rows n of a matrix, (tile, block), zeros outside."""
    mask = rows[:, None] & (k < width)[None, :]
    return tl.load(weight + n[:, None] * width + k[None, :], mask=mask, other=0.0)


@triton.jit
def _normed(  # noqa: PLR0917 - Triton calls by position
    x, inside, gain, shift, width: tl.constexpr, eps: tl.constexpr
):
    """LayerNorm of a vector."""
    x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * gain + shift


@triton.jit
def _linear_of_norm(  # noqa: PLR0917 - Triton calls by position
    source, weight, bias, gain, shift, to, program,
    width: tl.constexpr, outputs: tl.constexpr, programs: tl.constexpr, tile: tl.constexpr,
    block: tl.constexpr, eps: tl.constexpr, gelu: tl.constexpr, polls: tl.constexpr,
):  # fmt: skip
    """to = gelu(norm(source) weightᵀ + bias), the rows of this program."""
    each: tl.constexpr = (outputs + programs - 1) // programs
    n, k = program * each + tl.arange(0, tile), tl.arange(0, block)
    rows = (tl.arange(0, tile) < each) & (n < outputs)
    inside = k < width
    w = _weights(weight, n, rows, k, width)
    b = tl.load(bias + n, mask=rows, other=0.0).to(tl.float32)
    g = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(shift + k, mask=inside, other=0.0).to(tl.float32)
    x = _normed(_await(source + k, inside, polls), inside, g, s, width, eps)
    y = tl.sum(w.to(tl.float32) * x[None, :], 1) + b
    if gelu:  # ½ (1 + tanh u) = σ(2u), see `linear.gelu`
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    _send(to + n, y, rows)


@triton.jit
def _add_linear(  # noqa: PLR0917 - Triton calls by position
    source, weight, bias, residual, to, out, program,
    width: tl.constexpr, outputs: tl.constexpr, programs: tl.constexpr, tile: tl.constexpr,
    block: tl.constexpr, polls: tl.constexpr,
):  # fmt: skip
    """to = out = residual + source weightᵀ + bias, the rows of this program."""
    each: tl.constexpr = (outputs + programs - 1) // programs
    n, k = program * each + tl.arange(0, tile), tl.arange(0, block)
    rows = (tl.arange(0, tile) < each) & (n < outputs)
    w = _weights(weight, n, rows, k, width)
    b = tl.load(bias + n, mask=rows, other=0.0).to(tl.float32)
    before = _await(residual + n, rows, polls)
    x = _await(source + k, k < width, polls)
    y = before + tl.sum(w.to(tl.float32) * x[None, :], 1) + b
    _send(to + n, y, rows)
    tl.store(out + n, y, mask=rows)


@triton.jit
def _add_projection(  # noqa: PLR0917 - Triton calls by position
    mixed, lse, weight, bias, residual, to, program,
    width: tl.constexpr, heads: tl.constexpr, shares: tl.constexpr, programs: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr, polls: tl.constexpr,
):  # fmt: skip
    """to = residual + attention weightᵀ + bias; joins the shares of attention."""
    each: tl.constexpr = (width + programs - 1) // programs
    n, k = program * each + tl.arange(0, tile), tl.arange(0, block)
    rows = (tl.arange(0, tile) < each) & (n < width)
    inside = k < width
    w = _weights(weight, n, rows, k, width)
    b = tl.load(bias + n, mask=rows, other=0.0).to(tl.float32)
    before = _await(residual + n, rows, polls)
    share = tl.arange(0, shares)[:, None]
    both = tl.broadcast_to(inside[None, :], (shares, block))
    parts = _await(mixed + share * width + k[None, :], both, polls)
    sums = _await(lse + share * heads + (k // (width // heads))[None, :], both, polls)
    p = tl.exp(sums - tl.max(sums, 0)[None, :])  # 0 for a share that is empty
    x = tl.sum(p * parts, 0) / tl.sum(p, 0)
    y = before + tl.sum(w.to(tl.float32) * x[None, :], 1) + b
    _send(to + n, y, rows)


@triton.jit
def _attend(  # noqa: PLR0917 - Triton calls by position
    qkv, keys, values, length, mixed, lse, program,
    width: tl.constexpr, heads: tl.constexpr, capacity: tl.constexpr, shares: tl.constexpr,
    programs: tl.constexpr, lanes: tl.constexpr, span: tl.constexpr, polls: tl.constexpr,
):  # fmt: skip
    """Attention of a head over a share of its cache: mixture of values, and log Σ e^score."""
    D: tl.constexpr = width // heads
    d, part = tl.arange(0, lanes), tl.arange(0, 4)[:, None]
    size = (length + shares - 1) // shares
    for task in range(program, heads * shares, programs):
        head, share = task % heads, task // heads
        s = share * size + tl.arange(0, span)
        seen = s < tl.minimum(length, (share + 1) * size)
        cache = head * capacity * D
        at = cache + s[:, None] * D + d[None, :]
        mask = seen[:, None] & (d < D)[None, :]
        key = tl.load(keys + at, mask=mask, other=0.0)
        value = tl.load(values + at, mask=mask, other=0.0)
        own = _await(
            qkv + part * width + head * D + d[None, :], (part < 3) & (d < D)[None, :], polls
        )
        q = tl.sum(tl.where(part == 0, own, 0.0), 0) * (D**-0.5)
        # rounded as the cache will hold them
        new_k = tl.sum(tl.where(part == 1, own, 0.0), 0).to(key.dtype)
        new_v = tl.sum(tl.where(part == 2, own, 0.0), 0).to(key.dtype)
        first = share == 0  # it takes the new position too
        kept = (d < D) & first
        tl.store(keys + cache + length * D + d, new_k, mask=kept)
        tl.store(values + cache + length * D + d, new_v, mask=kept)
        score = tl.where(seen, tl.sum(key.to(tl.float32) * q[None, :], 1), -float("inf"))
        of_new = tl.where(first, tl.sum(new_k.to(tl.float32) * q, 0), -float("inf"))
        top = tl.maximum(tl.maximum(tl.max(score, 0), of_new), -1e30)
        p, p_new = tl.exp(score - top), tl.exp(of_new - top)
        total = tl.sum(p, 0) + p_new
        mix = tl.sum(p[:, None] * value.to(tl.float32), 0) + p_new * new_v.to(tl.float32)
        _send(mixed + share * width + head * D + d, mix / tl.maximum(total, 1e-30), d < D)
        one = tl.arange(0, 1)
        _send(lse + share * heads + head + one, top + tl.log(total) + one, one == 0)


@triton.jit
def _begin(  # noqa: PLR0917 - Triton calls by position
    token, wte, wpe, length, x, other, program,
    words: tl.constexpr, width: tl.constexpr, programs: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Writes the embedding, and empties the words of the token before."""
    each: tl.constexpr = (width + programs - 1) // programs
    n = program * each + tl.arange(0, tile)
    rows = (tl.arange(0, tile) < each) & (n < width)
    of_token = tl.load(wte + tl.load(token) * width + n, mask=rows, other=0.0).to(tl.float32)
    of_place = tl.load(wpe + length * width + n, mask=rows, other=0.0).to(tl.float32)
    _send(x + n, of_token + of_place, rows)
    empty = tl.full((1024,), EMPTY, tl.int32)
    for start in range(program * 1024, words, programs * 1024):
        at = start + tl.arange(0, 1024)
        tl.store(other + at, empty, mask=at < words)


@triton.jit
def _one_token(  # noqa: PLR0917 - Triton launches by position
    token, lengths, turn, wte, wpe, qkv_w, qkv_b, proj_w, proj_b, fc_w, fc_b, out_w, out_b,
    norms, keys, values, work, out, first, last,
    layers: tl.constexpr, width: tl.constexpr, heads: tl.constexpr, capacity: tl.constexpr,
    shares: tl.constexpr, programs: tl.constexpr, lanes: tl.constexpr, span: tl.constexpr,
    qkv_tile: tl.constexpr, tile: tl.constexpr, fc_tile: tl.constexpr, block: tl.constexpr,
    fc_block: tl.constexpr, eps: tl.constexpr, polls: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    """Phases from `first` to before `last` of a token; phase 0 is the embedding."""
    hidden: tl.constexpr = 4 * width
    stride: tl.constexpr = 9 * width + shares * (width + heads)  # words of a layer
    words: tl.constexpr = layers * stride + width
    program, odd = tl.program_id(0), tl.load(turn) & 1
    length = tl.load(lengths).to(tl.int32)
    x, other = work + odd * words, work + (1 - odd) * words
    if first == 0:
        _begin(token, wte, wpe, length, x, other, program, words, width, programs, tile)
    for layer in range(layers):
        qkv, mixed = x + width, x + 4 * width
        lse, after = mixed + shares * width, mixed + shares * (width + heads)
        phase, norm = 1 + layer * 5, norms + layer * 4 * width
        if ahead and (layer + 1 < layers):
            _next_layer(qkv_w, proj_w, fc_w, out_w, layer + 1, program, width, programs)
        if (first <= phase) & (phase < last):
            _linear_of_norm(
                x, qkv_w + layer * 3 * width * width, qkv_b + layer * 3 * width, norm, norm + width,
                qkv, program, width, 3 * width, programs, qkv_tile, block, eps, False, polls,
            )  # fmt: skip
        if (first <= phase + 1) & (phase + 1 < last):
            cache = layer * heads * capacity * (width // heads)
            _attend(
                qkv, keys + cache, values + cache, length, mixed, lse, program, width, heads,
                capacity, shares, programs, lanes, span, polls,
            )  # fmt: skip
        if (first <= phase + 2) & (phase + 2 < last):
            _add_projection(
                mixed, lse, proj_w + layer * width * width, proj_b + layer * width, x, after,
                program, width, heads, shares, programs, tile, block, polls,
            )  # fmt: skip
        if (first <= phase + 3) & (phase + 3 < last):
            _linear_of_norm(
                after, fc_w + layer * hidden * width, fc_b + layer * hidden, norm + 2 * width,
                norm + 3 * width, after + width, program, width, hidden, programs, fc_tile, block,
                eps, True, polls,
            )  # fmt: skip
        x += stride
        if (first <= phase + 4) & (phase + 4 < last):
            _add_linear(
                after + width, out_w + layer * hidden * width, out_b + layer * width, after, x, out,
                program, hidden, width, programs, tile, fc_block, polls,
            )  # fmt: skip


@triton.jit
def _next_layer(  # noqa: PLR0917 - Triton calls by position
    qkv_w, proj_w, fc_w, out_w, layer, program,
    width: tl.constexpr, programs: tl.constexpr,
):  # fmt: skip
    """Asks for what this program will read of a layer's weights."""
    _rows_of(qkv_w, layer, program, 3 * width, width, programs)
    _rows_of(proj_w, layer, program, width, width, programs)
    _rows_of(fc_w, layer, program, 4 * width, width, programs)
    _rows_of(out_w, layer, program, width, 4 * width, programs)


@triton.jit
def _rows_of(  # noqa: PLR0917 - Triton calls by position
    weight, layer, program, outputs: tl.constexpr, width: tl.constexpr, programs: tl.constexpr
):  # fmt: skip
    """Asks for the rows of this program, in lines of 128 bytes, in the L2 cache."""
    each: tl.constexpr = (outputs + programs - 1) // programs
    per_line: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    rows = tl.minimum(each, outputs - program * each)
    lines = (rows * width + per_line - 1) // per_line
    weight += layer * outputs * width + program * each * width
    for start in range(0, lines, 256):
        line = tl.minimum(start + tl.arange(0, 256), lines - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [(weight + line * per_line).to(tl.int64)],
            tl.int32,
            is_pure=False,
            pack=1,
        )


def fits(model: Any, rows: int) -> bool:
    """Whether the kernel is made for this network, its precision, its GPU and so many rows."""
    weight = model.transformer.wte.weight
    if rows > 1 or not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    count = torch.cuda.get_device_properties(weight.device).multi_processor_count
    return model.config.n_embd <= WIDEST and count >= FEWEST_PROGRAMS


class OneToken:
    """`few_token_pass.next_logits` up to the last norm, for one sequence, by one kernel.

    Holds a copy of the blocks' weights, one tensor per kind: a kernel that loops over layers
    cannot take each layer's tensors by name.

    Args:
        model: one that `supports` accepts.
        programs: of the kernel; None: one for each multiprocessor, `PROGRAMS` at most.
        phases_apart: a launch for each phase, for Triton's interpreter.
    """

    def __init__(self, model: Any, programs: int | None = None, phases_apart: bool = False) -> None:
        self.model, self.config, self.phases_apart = model, model.config, phases_apart
        wte = model.transformer.wte.weight
        if programs is None:
            count = torch.cuda.get_device_properties(wte.device).multi_processor_count
            programs = min(PROGRAMS, count)
        self.programs = programs
        width, layers, heads = self.config.n_embd, self.config.n_layer, self.config.n_head
        words = layers * (9 * width + SHARES * (width + heads)) + width
        self.work = torch.full((2, words), -1, dtype=torch.int32, device=wte.device)
        self.turn = torch.zeros(1, dtype=torch.int32, device=wte.device)
        self.out = torch.zeros(1, width, device=wte.device)
        self.weights: list[Tensor] = []
        self.copy_weights()

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Copies the blocks' weights; needed when they change. Their addresses stay."""
        blocks, packed = self.model.transformer.h, []
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            layers = [block.get_submodule(name) for block in blocks]
            packed.append(torch.stack([layer.weight for layer in layers]))
            packed.append(torch.stack([_or_zeros(layer.bias, layer.weight) for layer in layers]))
        packed.append(torch.stack([_norms(block.ln_1, block.ln_2) for block in blocks]))
        if not self.weights:
            self.weights = packed
        for kept, new in zip(self.weights, packed, strict=True):
            kept.copy_(new)

    def __call__(self, token: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """(1, C) float32 input of the last norm after one more token.

        Args:
            token: (1,) int64.
            keys: (L, 1, H, S_max, D) contiguous, changed in place.
            values: (L, 1, H, S_max, D) contiguous, changed in place.
            lengths: (1,) int64, positions before the new one.
        """
        of_cache = keys, values, lengths
        phases = 1 + PHASES * self.config.n_layer
        if self.phases_apart:
            for phase in range(phases):
                self._launch(token, *of_cache, phase, phase + 1)
        else:
            self._launch(token, *of_cache, 0, phases)
        self.turn += 1
        return self.out

    def _launch(  # noqa: PLR0917 - as above, and phases
        self, token: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, first: int, last: int
    ) -> None:
        config, parts, P = self.config, self.model.transformer, self.programs
        width, capacity = config.n_embd, keys.shape[3]
        assert all(t.is_contiguous() for t in (keys, values))
        tiles = [_tile(outputs, P) for outputs in (3 * width, width, 4 * width)]
        _one_token[(P,)](
            token, lengths, self.turn, parts.wte.weight, parts.wpe.weight, *self.weights,
            keys, values, self.work, self.out, first, last,
            config.n_layer, width, config.n_head, capacity, SHARES, P,
            triton.next_power_of_2(width // config.n_head),
            triton.next_power_of_2(triton.cdiv(capacity, SHARES)),
            *tiles, triton.next_power_of_2(width), triton.next_power_of_2(4 * width),
            parts.ln_f.eps, MOST_POLLS, not self.phases_apart, num_warps=WARPS,
        )  # fmt: skip


def _tile(outputs: int, programs: int) -> int:
    """Rows of a matrix that a program computes, as a power of two."""
    return triton.next_power_of_2(triton.cdiv(outputs, programs))


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias


def _norms(*norms: nn.LayerNorm) -> Tensor:
    """(4, C): gain and shift of both LayerNorms of a block."""
    return torch.stack([t for n in norms for t in (n.weight, _or_zeros(n.bias, n.weight))])
