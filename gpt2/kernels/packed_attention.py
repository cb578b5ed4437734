"""Causal attention of queries, keys and values that lie side by side, by cuDNN.

PyTorch's attention gives each of the three a gradient of its own. The layer that made them then
needs three matmuls for the gradient of its input and three for that of its weight, or one copy of
all gradients into one matrix. cuDNN can write them into that matrix, and one matmul each is enough.

Shapes: `B` batch, `H` heads, `T` positions, `D` head width, `C` = H · D.
"""

import torch
from torch import Tensor

from ..errors import install_command
from .cudnn_attention import backward, fits, forward, frontend
from .custom_op import custom_op, refuse_second_derivatives


def describe_packing(device: torch.device, head_width: int) -> str:
    """What a run in bf16 adds to the name of its attention kernel: whether gradients are packed.

    Args:
        device: of the run.
        head_width: D.
    """
    if not fits(device, head_width, in_bf16=True):
        return ""
    if frontend() is not None:
        return ", with the gradients of queries, keys and values in one matrix"
    return f"; with their gradients in one matrix it is faster: {install_command('cudnn')}"


def packed_attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √D) v, in which no query sees a later key; (B, T, 3 C) -> (B, T, C).

    Args:
        qkv: queries, keys and values of each position, one after the other; on a GPU in bf16.
        heads: H.
    """
    return _PackedAttention.apply(qkv, heads)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, heads: int):
        y, log_sums = _attention(qkv, heads)
        ctx.save_for_backward(qkv, y, log_sums)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        refuse_second_derivatives()
        return _attention_gradient(dy, *ctx.saved_tensors), None


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B, T, C) -> (B, H, T, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, T, 3 C) -> three of (B, H, T, D), views."""
    return tuple(_by_head(part, heads) for part in qkv.chunk(3, dim=-1))


@custom_op(name="packed_attention")
def _attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The result (B, T, C), and the logarithm of each softmax's sum, (B, H, T, 1) in float32."""
    y, log_sums = _attention_fake(qkv, heads)
    forward(0, *_split(qkv, heads), _by_head(y, heads), log_sums)
    return y, log_sums


@torch.library.register_fake("gpt2::packed_attention")
def _attention_fake(qkv, heads):
    B, T, three = qkv.shape
    return qkv.new_empty(B, T, three // 3), qkv.new_empty(B, heads, T, 1, dtype=torch.float32)


@custom_op(name="packed_attention_gradient")
def _attention_gradient(dy: Tensor, qkv: Tensor, y: Tensor, log_sums: Tensor) -> Tensor:
    """The gradient of qkv, (B, T, 3 C)."""
    heads, gradient = log_sums.shape[1], qkv.new_empty(qkv.shape)
    saved = *_split(qkv, heads), _by_head(y, heads), log_sums
    backward(0, _by_head(dy, heads), saved, _split(gradient, heads))
    return gradient


@torch.library.register_fake("gpt2::packed_attention_gradient")
def _attention_gradient_fake(dy, qkv, y, log_sums):
    return qkv.new_empty(qkv.shape)
