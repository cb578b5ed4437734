"""The linear layers of a block, in training on a GPU by cuBLASLt, elsewhere by plain PyTorch.

Taking part of the work around a product into it saves passes over the memory: the residual is
added and GELU applied by the product that makes its input, and GELU's derivative by the one that
makes its gradient. Weight gradients come out in float32, as they are needed.

Shapes: `C` channels, `K` in, `N` out; "..." is (B, T).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cublaslt
from .custom_op import custom_op
from .precision import matmuls_in_bf16

BF16 = torch.bfloat16
FEWEST_ROWS = 1024  # below, finding the fastest algorithm would not pay


def qkv(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of (..., C) by one product with (3C, C), each (..., C)."""
    if not _by_cublaslt(x, layer):
        return layer(x).split(x.shape[-1], dim=-1)
    parts = _QKV.apply(x.flatten(0, -2), layer.weight, layer.bias)
    return tuple(part.unflatten(0, x.shape[:-1]) for part in parts)


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


def add_mlp(
    residual: Tensor, x: Tensor, fc: nn.Linear, proj: nn.Linear, dropout: float = 0.0
) -> Tensor:
    """residual + dropout(proj(gelu(fc(x)))), all (..., C)."""
    if dropout or not (_by_cublaslt(x, fc, residual) and proj.weight.requires_grad):
        return residual + F.dropout(proj(gelu(fc(x))), dropout)
    parameters = fc.weight, fc.bias, proj.weight, proj.bias
    return _AddMLP.apply(residual.flatten(0, -2), x.flatten(0, -2), *parameters).view_as(residual)


def _by_cublaslt(x: Tensor, layer: nn.Linear, residual: Tensor | None = None) -> bool:
    """Whether this is training in bf16 on a GPU, of all weights (see `lora`), and large enough."""
    stream_too = residual is None or residual.dtype is BF16
    large = x.shape[:-1].numel() >= FEWEST_ROWS and x.shape[-1] % 64 == 0
    trains = torch.is_grad_enabled() and layer.weight.requires_grad
    return x.is_cuda and matmuls_in_bf16("cuda") and stream_too and large and trains


class _QKV(torch.autograd.Function):
    """Gradients of q, k and v stay apart: joining them costs more than three smaller products."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None):
        x, weight = x.to(BF16), weight.to(BF16)
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        y = _product(x, weight, transpose_b=True, bias=_cast(bias))
        return y.split(x.shape[1], dim=1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight = ctx.saved_tensors
        dx = None
        for dy, part in zip(grads, weight.split(x.shape[1]), strict=True):
            dx = _product(dy, part, add=dx)
        dw = _weight_gradient(list(grads), x)
        if not ctx.biased:
            return dx, dw, None
        # A bias of the keys adds the same to all scores of a query, which softmax does not see.
        dbq, dbv = (dy.sum(0, dtype=torch.float32) for dy in (grads[0], grads[2]))
        return dx, dw, torch.cat([dbq, torch.zeros_like(dbq), dbv])


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None):
        x, weight = x.to(BF16), weight.to(BF16)
        ctx.save_for_backward(x, weight)
        ctx.adds, ctx.biased = residual is not None, bias is not None
        return _product(x, weight, transpose_b=True, bias=_cast(bias), add=residual)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dx, dw = _product(dy, weight), _weight_gradient([dy], x)
        db = dy.sum(0, dtype=torch.float32) if ctx.biased else None
        return dy if ctx.adds else None, dx, dw, db


def _cast(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(BF16)


class _AddMLP(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd calls it by position
        ctx,
        residual: Tensor,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
    ):
        x, w1, w2 = x.to(BF16), w1.to(BF16), w2.to(BF16)
        before, after = _product_gelu(x, w1, _cast(b1))
        ctx.save_for_backward(x, w1, w2, before, after)
        ctx.biased = b1 is not None
        return _product(after, w2, transpose_b=True, bias=_cast(b2), add=residual)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, w1, w2, before, after = ctx.saved_tensors
        dh = _product_dgelu(dy, w2, before)
        dw1, dw2 = _weight_gradient([dh], x), _weight_gradient([dy], after)
        db1, db2 = (d.sum(0, dtype=torch.float32) if ctx.biased else None for d in (dh, dy))
        return dy, _product(dh, w1), dw1, db1, dw2, db2


# To the compiler each of these is one opaque operation. Without the library, as on a CPU, they do
# the same by plain PyTorch.


@custom_op
def _product(
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
def _(a, b, transpose_b=False, bias=None, add=None):
    return a.new_empty(a.shape[0], b.shape[0 if transpose_b else 1])


@custom_op
def _weight_gradient(dys: list[Tensor], x: Tensor) -> Tensor:
    """dyᵀ x in float32 of each dy, one above the other, (rows, N) and (rows, K) -> (Σ N, K)."""
    out = x.new_empty(sum(dy.shape[1] for dy in dys), x.shape[1], dtype=torch.float32)
    for dy, part in zip(dys, out.split([dy.shape[1] for dy in dys]), strict=True):
        if dy.is_cuda and cublaslt.library():
            cublaslt.matmul(dy, x, part, transpose_a=True)
        else:
            part.copy_(torch.mm(dy.t(), x))
    return out


@torch.library.register_fake("gpt2::weight_gradient")
def _(dys, x):
    return x.new_empty(sum(dy.shape[1] for dy in dys), x.shape[1], dtype=torch.float32)


@custom_op
def _product_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
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
def _(x, weight, bias):
    before = x.new_empty(x.shape[0], weight.shape[0])
    return before, torch.empty_like(before)


@custom_op
def _product_dgelu(dy: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    """The gradient of `before` in y = gelu(before) Wᵀ."""
    if dy.is_cuda and cublaslt.library():
        out = torch.empty_like(before)
        cublaslt.matmul(dy, weight, out, epilogue=cublaslt.DGELU, aux=before)
        return out
    return torch.ops.aten.gelu_backward(dy @ weight, before, approximate="tanh")


@torch.library.register_fake("gpt2::product_dgelu")
def _(dy, weight, before):
    return torch.empty_like(before)


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016), elementwise.

    Compiled, it is written by the identity ½ (1 + tanh u) = σ(2u): compilers turn tanh into some
    thirty instructions, and the sigmoid into a few.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    u = math.sqrt(2 / math.pi) * (exact + 0.044715 * exact * exact * exact)
    return (exact * torch.sigmoid(2 * u)).to(x.dtype)
