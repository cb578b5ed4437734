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
        grads = torch.ops.aten.native_layer_norm_backward(
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
