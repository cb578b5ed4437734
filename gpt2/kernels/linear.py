"""The linear layers of a block: fused cuBLASLt matmuls in training on a GPU, else plain PyTorch.

Fusing elementwise work into a matmul saves passes over memory. The matmul that computes a value
also adds the residual or applies GELU, and the matmul that computes GELU's gradient multiplies by
its derivative. Weight gradients are written in float32, the precision of the optimizer.

Shapes: `C` channels, `K` in, `N` out; "..." is (B, T).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import cublaslt
from .custom_op import custom_op, refuse_second_derivatives
from .precision import matmuls_in_bf16

BF16 = torch.bfloat16
FEWEST_ROWS = 1024  # with fewer, timing the algorithms of a shape takes longer than it saves


def qkv(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x (..., C), each (..., C); one matmul with (3C, C).

    The fused path gives a bias of the keys no gradient, which is right without RoPE only.
    """
    if not _by_cublaslt(x, layer):
        return layer(x).split(x.shape[-1], dim=-1)
    parts = _QKV.apply(x.flatten(0, -2), layer.weight, layer.bias, True)
    return tuple(part.unflatten(0, x.shape[:-1]) for part in parts)


def packed_qkv(x: Tensor, layer: nn.Linear) -> Tensor:
    """`qkv` as one matrix (..., 3C), for `packed_attention`; its gradient is one matrix too."""
    if not _by_cublaslt(x, layer):
        return layer(x)
    return _QKV.apply(x.flatten(0, -2), layer.weight, layer.bias, False).unflatten(0, x.shape[:-1])


def packs(x: Tensor, layer: nn.Linear, heads: int) -> bool:
    """Whether `packed_qkv` and cuDNN's attention take this layer and input, (B, T, C).

    cuDNN has no attention to a single key (PyTorch's `check_cudnn_tensor_shapes`).
    """
    if x.shape[-2] == 1 or not _by_cublaslt(x, layer):
        return False
    from .cudnn_choice import takes

    return takes(x.device, x.shape[-1] // heads, True)


def add_linear(residual: Tensor, x: Tensor, layer: nn.Linear, dropout: float = 0.0) -> Tensor:
    """residual + dropout(layer(x)), (..., N) and (..., K) -> (..., N)."""
    if dropout or not _by_cublaslt(x, layer, residual):
        return residual + F.dropout(layer(x), dropout)
    y = _AddLinear.apply(residual.flatten(0, -2), x.flatten(0, -2), layer.weight, layer.bias)
    return y.view_as(residual)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(x), (..., K) -> (..., N)."""
    if not _by_cublaslt(x, layer):
        return layer(x)
    y = _AddLinear.apply(None, x.flatten(0, -2), layer.weight, layer.bias)
    return y.unflatten(0, x.shape[:-1])


def add_mlp(  # noqa: PLR0917
    residual: Tensor,
    x: Tensor,
    fc: nn.Linear,
    proj: nn.Linear,
    dropout: float = 0.0,
    recompute: bool = False,
) -> Tensor:
    """residual + dropout(proj(gelu(fc(x)))), all (..., C).

    Args:
        residual: (..., C).
        x: (..., C).
        fc: the first layer, C to 4 C.
        proj: the second, 4 C to C.
        dropout: probability.
        recompute: keep x alone and compute fc and GELU again in backward, to equal bits.
    """
    if dropout or not (_by_cublaslt(x, fc, residual) and proj.weight.requires_grad):
        if recompute:  # nothing in it is random
            y = checkpoint(_mlp, x, fc, proj, use_reentrant=False, preserve_rng_state=False)
        else:
            y = _mlp(x, fc, proj)
        return residual + F.dropout(y, dropout)
    inputs = residual.flatten(0, -2), x.flatten(0, -2), fc.weight, fc.bias, proj.weight, proj.bias
    return _AddMLP.apply(*inputs, recompute).view_as(residual)


def _mlp(x: Tensor, fc: nn.Linear, proj: nn.Linear) -> Tensor:
    return proj(gelu(fc(x)))


def _by_cublaslt(x: Tensor, layer: nn.Linear, residual: Tensor | None = None) -> bool:
    """Whether the fused matmuls take this layer and input; see `_obstacle`."""
    return not _obstacle(
        on_gpu=x.is_cuda,
        in_bf16=matmuls_in_bf16("cuda") and (residual is None or residual.dtype is BF16),
        trains=torch.is_grad_enabled() and layer.weight.requires_grad,
        rows=x.shape[:-1].numel(),
        width=x.shape[-1],
    )


def _obstacle(on_gpu: bool, in_bf16: bool, trains: bool, rows: int, width: int) -> str:
    """Why the fused matmuls cannot take a layer; empty if they can."""
    if not on_gpu:
        return "no CUDA device"
    if not in_bf16:
        return "matmuls or the residual stream are not in bf16"
    if not trains:
        return "frozen weights or no gradients"
    if rows < FEWEST_ROWS:
        return "fewer than 1,024 tokens in a micro-batch"
    if width % 64:
        return "a width that is no multiple of 64"
    return ""


def obstacle_of(model: nn.Module, device: torch.device, dtype: torch.dtype, rows: int) -> str:
    """Why not all linear layers of the blocks are fused matmuls; empty if they are.

    Args:
        model: see `describe_path`; so are the others.
        device: of the run.
        dtype: of matmuls.
        rows: of a micro-batch.
    """
    layers = [m for m in model.transformer.h.modules() if isinstance(m, nn.Linear)]
    widths = {layer.in_features for layer in layers}
    obstacle = _obstacle(
        on_gpu=device.type == "cuda",
        in_bf16=dtype is BF16,
        trains=all(layer.weight.requires_grad for layer in layers),
        rows=rows,
        width=next((width for width in sorted(widths) if width % 64), 64),
    )
    return obstacle or ("" if cublaslt.library() else "no libcublasLt")


def describe_path(
    model: nn.Module, device: torch.device, dtype: torch.dtype, rows: int, dropout: float = 0.0
) -> str:
    """Which path the linear layers of the blocks take in training, in one sentence.

    Each layer decides by `_by_cublaslt`; this says what they will decide. One exception is left
    out: with RoPE and biases, the modern network computes queries, keys and values by PyTorch.

    Args:
        model: with `transformer.h`.
        device: of the run.
        dtype: of matmuls under autocast.
        rows: tokens of a micro-batch on one device, B · T.
        dropout: after the projections into the residual stream.
    """
    if obstacle := obstacle_of(model, device, dtype, rows):
        return f"linear layers: plain PyTorch ({obstacle})"
    if dropout:
        return "linear layers: cuBLASLt, but plain PyTorch where dropout follows"
    return "linear layers: cuBLASLt, with bias, GELU and the residual addition fused"


class _QKV(torch.autograd.Function):
    """Queries, keys and values as three or as one matrix, and so are their gradients.

    Three gradients stay separate: to concatenate them costs more than three small matmuls.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, split: bool):
        x, weight = x.to(BF16), weight.to(BF16)
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        y = _matmul(x, weight, transpose_b=True, bias=_cast(bias))
        return y.split(x.shape[1], dim=1) if split else y

    @staticmethod
    def backward(ctx, *grads: Tensor):
        refuse_second_derivatives()
        x, weight = ctx.saved_tensors
        width, dx = x.shape[1], None
        for dy, part in zip(grads, weight.chunk(len(grads)), strict=True):
            dx = _matmul(dy, part, add=dx)
        dw = _weight_gradient(list(grads), x)
        if not ctx.biased:
            return dx, dw, None, None
        # A bias of the keys shifts all scores of a query equally, which softmax ignores.
        of_q_and_v = grads[0][:, :width], grads[-1][:, -width:]
        dbq, dbv = (dy.sum(0, dtype=torch.float32) for dy in of_q_and_v)
        return dx, dw, torch.cat([dbq, torch.zeros_like(dbq), dbv]), None


class _AddLinear(torch.autograd.Function):
    """residual + linear(x), or linear(x) without a residual."""

    @staticmethod
    def forward(ctx, residual: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None):
        x, weight = x.to(BF16), weight.to(BF16)
        ctx.save_for_backward(x, weight)
        ctx.adds, ctx.biased = residual is not None, bias is not None
        return _matmul(x, weight, transpose_b=True, bias=_cast(bias), add=residual)

    @staticmethod
    def backward(ctx, dy: Tensor):
        refuse_second_derivatives()
        x, weight = ctx.saved_tensors
        dx, dw = _matmul(dy, weight), _weight_gradient([dy], x)
        db = dy.sum(0, dtype=torch.float32) if ctx.biased else None
        return dy if ctx.adds else None, dx, dw, db


def _cast(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(BF16)


class _AddMLP(torch.autograd.Function):
    """residual + proj(gelu(fc(x)))."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd calls it by position
        ctx,
        residual: Tensor,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        recompute: bool,
    ):
        x, w1, w2 = x.to(BF16), w1.to(BF16), w2.to(BF16)
        before, after = _matmul_gelu(x, w1, _cast(b1))
        ctx.save_for_backward(x, w1, w2, *([b1] if recompute else [before, after]))
        ctx.biased, ctx.recompute = b1 is not None, recompute
        return _matmul(after, w2, transpose_b=True, bias=_cast(b2), add=residual)

    @staticmethod
    def backward(ctx, dy: Tensor):
        refuse_second_derivatives()
        x, w1, w2, *kept = ctx.saved_tensors
        before, after = _matmul_gelu_again(x, w1, _cast(kept[0]), dy) if ctx.recompute else kept
        dh = _matmul_dgelu(dy, w2, before)
        dw1, dw2 = _weight_gradient([dh], x), _weight_gradient([dy], after)
        db1, db2 = (d.sum(0, dtype=torch.float32) if ctx.biased else None for d in (dh, dy))
        return dy, _matmul(dh, w1), dw1, db1, dw2, db2, None


# Each function below is one opaque operator to the compiler. Without libcublasLt, as on a CPU, it
# computes its result by plain PyTorch.


@custom_op(name="product")
def _matmul(
    a: Tensor,
    b: Tensor,
    transpose_b: bool = False,
    bias: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """a b + bias + add."""
    out = a.new_empty(a.shape[0], b.shape[0 if transpose_b else 1])
    if a.is_cuda and cublaslt.library():
        epilogue = cublaslt.DEFAULT if bias is None else cublaslt.BIAS
        cublaslt.matmul(a, b, out, transpose_b=transpose_b, epilogue=epilogue, bias=bias, add=add)
        return out
    torch.mm(a, b.t() if transpose_b else b, out=out)
    for extra in (bias, add):
        out = out if extra is None else out + extra
    return out


@torch.library.register_fake("gpt2::product")
def _matmul_fake(a, b, transpose_b=False, bias=None, add=None):
    return a.new_empty(a.shape[0], b.shape[0 if transpose_b else 1])


@custom_op
def _weight_gradient(dys: list[Tensor], x: Tensor) -> Tensor:
    """dyᵀ x of each dy, stacked, in float32; (rows, N) each and (rows, K) -> (Σ N, K)."""
    out = x.new_empty(sum(dy.shape[1] for dy in dys), x.shape[1], dtype=torch.float32)
    for dy, part in zip(dys, out.split([dy.shape[1] for dy in dys]), strict=True):
        if dy.is_cuda and cublaslt.library():
            cublaslt.matmul(dy, x, part, transpose_a=True)
        else:
            part.copy_(torch.mm(dy.t(), x))
    return out


@torch.library.register_fake("gpt2::weight_gradient")
def _weight_gradient_fake(dys, x):
    return x.new_empty(sum(dy.shape[1] for dy in dys), x.shape[1], dtype=torch.float32)


@custom_op(name="product_gelu")
def _matmul_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, gelu(h)) with h = x Wᵀ + b."""
    before = x.new_empty(x.shape[0], weight.shape[0])
    if x.is_cuda and cublaslt.library():
        after = torch.empty_like(before)
        epilogue = cublaslt.GELU_AUX if bias is None else cublaslt.GELU_AUX_BIAS
        cublaslt.matmul(
            x, weight, after, transpose_b=True, epilogue=epilogue, bias=bias, aux=before
        )
        return before, after
    torch.mm(x, weight.t(), out=before)
    if bias is not None:
        before += bias
    return before, gelu(before)


@torch.library.register_fake("gpt2::product_gelu")
def _matmul_gelu_fake(x, weight, bias):
    before = x.new_empty(x.shape[0], weight.shape[0])
    return before, torch.empty_like(before)


@custom_op(name="product_gelu_again")
def _matmul_gelu_again(
    x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """`_matmul_gelu`, in backward.

    The compiler must not move it into forward, whose results it would keep. So it takes a gradient,
    which it does not use.
    """
    return _matmul_gelu(x, weight, bias)


@torch.library.register_fake("gpt2::product_gelu_again")
def _matmul_gelu_again_fake(x, weight, bias, dy):
    return _matmul_gelu_fake(x, weight, bias)


@custom_op(name="product_dgelu")
def _matmul_dgelu(dy: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    """The gradient with respect to `before` of y = gelu(before) Wᵀ."""
    if dy.is_cuda and cublaslt.library():
        out = torch.empty_like(before)
        cublaslt.matmul(dy, weight, out, epilogue=cublaslt.DGELU, aux=before)
        return out
    return gelu_backward(dy @ weight, before)


@torch.library.register_fake("gpt2::product_dgelu")
def _matmul_dgelu_fake(dy, weight, before):
    return torch.empty_like(before)


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016), elementwise.

    Under torch.compile it uses the identity ½ (1 + tanh u) = σ(2u): a compiled tanh takes some
    thirty instructions, a compiled sigmoid a few.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    u = math.sqrt(2 / math.pi) * (exact + 0.044715 * exact * exact * exact)
    return (exact * torch.sigmoid(2 * u)).to(x.dtype)


def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient with respect to x of `gelu`, whose result has the gradient dy; elementwise."""
    if hasattr(torch.ops.aten, "gelu_backward"):
        return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.gelu(x, approximate="tanh"), x, dy)[0]
