"""Causal attention within a window, by cuDNN.

FlexAttention computes two blocks of 128 by 128 scores for a window of 128, and evaluates the mask
for each score. cuDNN's kernels know what a window is.

Shapes: `B` batch, `H` heads, `T` positions, `D` head width.
"""

import torch
from torch import Tensor

from ..errors import install_command
from .cudnn_attention import backward, fits, forward, frontend
from .custom_op import custom_op, refuse_second_derivatives


def describe_windows(
    device: torch.device, head_width: int, dtype: torch.dtype, alone: bool = True
) -> str:
    """Which kernel computes attention windows in training, in one sentence.

    Args:
        device: of the run.
        head_width: channels.
        dtype: of queries, keys and values.
        alone: whether windows stay as they are, and no documents limit attention as well.
    """
    could = alone and fits(device, head_width, dtype is torch.bfloat16)
    if could and frontend() is not None:
        return "attention windows: cuDNN"
    hint = f"; cuDNN's are faster: {install_command('cudnn')}" if could else ""
    return f"attention windows: FlexAttention where it is compiled{hint}"


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """softmax(q kᵀ / √D) v over the last `window` positions, a query's own included.

    Args:
        q: (B, H, T, D); on a GPU in bf16. So k and v.
        k: (B, H, T, D).
        v: (B, H, T, D).
        window: at least 1.
    """
    return _WindowAttention.apply(q, k, v, window)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int):
        y, log_sums = _attention(q, k, v, window)
        ctx.save_for_backward(q, k, v, y, log_sums)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        refuse_second_derivatives()
        return *_attention_gradients(dy, *ctx.saved_tensors, ctx.window), None


def _like_heads(x: Tensor) -> Tensor:
    """(B, H, T, D), uninitialised, in memory (B, T, H, D) as the network wants it."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


@custom_op(name="window_attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each softmax's sum, (B, H, T, 1) in float32."""
    y, log_sums = _like_heads(q), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)
    forward(window, q, k, v, y, log_sums)
    return y, log_sums


@torch.library.register_fake("gpt2::window_attention")
def _attention_fake(q, k, v, window):
    return _like_heads(q), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)


@custom_op(name="window_attention_gradients")
def _attention_gradients(  # noqa: PLR0917
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    gradients = tuple(_like_heads(x) for x in (q, k, v))
    backward(window, dy, (q, k, v, y, log_sums), gradients)
    return gradients


@torch.library.register_fake("gpt2::window_attention_gradients")
def _attention_gradients_fake(dy, *tensors):
    return tuple(_like_heads(x) for x in tensors[:3])
