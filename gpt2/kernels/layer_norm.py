"""LayerNorm (Ba et al. 2016), with a Triton kernel to train wide rows in bf16.

The kernel reads each row once. torch.compile does so for rows of up to 1,024 numbers; it reads a
wider row twice, in twice the time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .custom_op import custom_op
from .precision import HAS_TRITON, matmuls_in_bf16

NARROW = 1024


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm, (..., C) -> (..., C); the kernel's result is rounded to bf16."""

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


def _wide_in_bf16(x: Tensor) -> bool:
    in_bf16 = x.dtype is torch.bfloat16 and matmuls_in_bf16("cuda")
    return x.is_cuda and HAS_TRITON and in_bf16 and x.shape[-1] > NARROW


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
        from .triton_training import layer_norm

        return layer_norm(x.contiguous(), weight, bias, eps)
    y, mean, rstd = torch.native_layer_norm(
        x.float(), weight.shape, weight.float(), bias.float(), eps
    )
    return y.to(x.dtype), mean, rstd


@torch.library.register_fake("gpt2::layer_norm")
def _layer_norm_fake(x, weight, bias, eps):
    of_rows = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    return x.new_empty(x.shape), of_rows, torch.empty_like(of_rows)
