"""LayerNorm (Ba et al. 2016), with two Triton kernels to train in bf16.

- The forward kernel reads each row once. torch.compile does so for rows of up to 1,024 numbers; it
  reads a wider row twice, in twice the time.
- The backward kernel adds the gradient that reaches the residual stream past the norm, and sums the
  gradients of gain and bias while it has their terms. torch.compile (2.11) sums these terms in a
  second pass on 6 of 132 multiprocessors, which takes as long as the first at a batch of 8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .custom_op import custom_op, refuse_second_derivatives
from .precision import HAS_TRITON, matmuls_in_bf16

NARROW = 1024
PROGRAMS = 512  # of the backward kernel; a constant, so that other GPUs sum in the same order


def with_norm(x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(x, norm(x)): what goes on in the residual stream, and what a sub-layer reads.

    A norm with hooks, or with a forward of its own, is called. Hooks of all modules at once
    (`register_module_forward_hook`) are not looked at.

    Args:
        x: (..., C).
        norm: (..., C) -> (..., C), as `LayerNorm`.
    """
    if not (type(norm) is LayerNorm and norm.training and _in_bf16(x)) or _watched(norm):
        return x, norm(x)
    return _WithNorm.apply(x, norm.weight, norm.bias, norm.eps)


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm, (..., C) -> (..., C); the kernels' result is rounded to bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """Each row with mean 0 and deviation 1, times a gain, plus a bias."""
        if self.training and _wide_in_bf16(x):
            return _LayerNorm.apply(x, self.weight, self.bias, self.eps)
        weight, bias = self.weight, self.bias
        if x.dtype is torch.float32:  # FSDP's policy may have cast them; CPUs take no such mix
            weight, bias = weight.float(), bias.float()
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def layer_norm_backward(  # noqa: PLR0917 - the arguments of PyTorch's operator
    dy: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias); the plain form of `aten::native_layer_norm_backward`.

    Args:
        dy: (..., C) gradient of the result.
        x: (..., C).
        shape: (C,).
        mean: (..., 1).
        rstd: (..., 1), 1 / deviation.
        weight: (C,).
        bias: (C,).
        wanted: which gradients; None stands for the others.
    """
    normed, scaled = (x - mean) * rstd, dy * weight
    rows = tuple(range(dy.dim() - 1))
    along = (normed * scaled).mean(-1, keepdim=True)
    dx = (scaled - scaled.mean(-1, keepdim=True) - normed * along) * rstd
    dw, db = (dy * normed).sum(rows), dy.sum(rows)
    return tuple(d if asked else None for d, asked in zip((dx, dw, db), wanted, strict=True))


# The operator is not part of PyTorch's public interface.
_backward = getattr(torch.ops.aten, "native_layer_norm_backward", layer_norm_backward)


def _in_bf16(x: Tensor) -> bool:
    return x.is_cuda and HAS_TRITON and x.dtype is torch.bfloat16 and matmuls_in_bf16("cuda")


def _wide_in_bf16(x: Tensor) -> bool:
    return _in_bf16(x) and x.shape[-1] > NARROW


def _watched(norm: nn.Module) -> bool:
    """Whether somebody wants to see the module's calls, or has replaced them."""
    of_forward = norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__
    return bool(of_forward or norm._backward_hooks or norm._backward_pre_hooks)


class _WithNorm(torch.autograd.Function):
    """(x, norm(x)); backward gets the gradients of both."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        if _wide_in_bf16(x):
            y, mean, rstd = _layer_norm(x, weight, bias, eps)
        else:
            gain, shift = weight.float(), bias.float()
            y, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, gain, shift, eps)
            y = y.to(x.dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx, past: Tensor, dy: Tensor):
        refuse_second_derivatives()
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, shares = _add_layer_norm_backward(past, dy, x, weight, mean, rstd, PROGRAMS)
        dw, db = shares.sum(0)
        return dx, dw.to(weight.dtype), db.to(bias.dtype), None


@custom_op
def _add_layer_norm_backward(  # noqa: PLR0917
    past: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    programs: int,
) -> tuple[Tensor, Tensor]:
    """(gradient of x, shares (programs, 2, C) of the gradients of gain and bias in float32).

    Args:
        past: (..., C), the gradient that reaches x past the norm.
        dy: (..., C), the gradient of the norm's result.
        x: (..., C).
        weight: (C,).
        mean: (..., 1) in float32.
        rstd: (..., 1), 1 / deviation.
        programs: of the kernel; an argument, as the compiler's cache does not see the shape of a
            result.
    """
    if x.is_cuda:
        from .triton_layer_norm import add_layer_norm_backward

        given = (t.contiguous() for t in (past, dy, x))
        return add_layer_norm_backward(*given, weight, mean, rstd, programs)
    exact = dy.float(), x.float(), list(weight.shape), mean, rstd, weight.float(), weight.float()
    dx, *sums = layer_norm_backward(*exact, (True, True, True))
    shares = torch.zeros(programs, 2, x.shape[-1])
    for share, total in zip(shares[0], sums, strict=True):
        share.copy_(total)
    return (past + dx).to(x.dtype), shares


@torch.library.register_fake("gpt2::add_layer_norm_backward")
def _add_layer_norm_backward_fake(past, dy, x, weight, mean, rstd, programs):  # noqa: PLR0917
    return x.new_empty(x.shape), x.new_empty(programs, 2, x.shape[-1], dtype=torch.float32)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        y, mean, rstd = _layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        """PyTorch's own, which the compiler decomposes and fuses with its neighbours.

        It takes one dtype for all: under FSDP the gain and the bias are bf16, under DDP float32.
        """
        refuse_second_derivatives()
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        grads = _backward(
            dy.float(), x.float(), weight.shape, mean, rstd, weight.float(), bias.float(), wanted
        )
        dx, dw, db = (
            None if grad is None else grad.to(of.dtype)
            for grad, of in zip(grads, (x, weight, bias), strict=True)
        )
        return dx, dw, db, None


@custom_op
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, 1 / deviation), the last two (..., 1) in float32."""
    if x.is_cuda:
        from .triton_layer_norm import layer_norm

        return layer_norm(x.contiguous(), weight, bias, eps)
    y, mean, rstd = torch.native_layer_norm(
        x.float(), weight.shape, weight.float(), bias.float(), eps
    )
    return y.to(x.dtype), mean, rstd


@torch.library.register_fake("gpt2::layer_norm")
def _layer_norm_fake(x, weight, bias, eps):
    of_rows = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    return x.new_empty(x.shape), of_rows, torch.empty_like(of_rows)
