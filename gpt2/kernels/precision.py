"""The precision of matmuls and of the residual stream, and whether Triton is installed."""

import importlib.util
import math

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None  # on Linux it comes with PyTorch
E4M3_MAX = 448.0
GRADIENT_SCALE = 14  # gradients of logits are stored as e5m2 times 2^14: 2^-30 … 3.5


def to_residual_stream(x: Tensor) -> Tensor:
    """x in the dtype of the residual stream: bf16 if matmuls are in bf16, as in llm.c.

    That halves the memory traffic. With fp16 the stream stays float32, whose range it may need.
    """
    return x.bfloat16() if matmuls_in_bf16(x.device.type) else x


def matmuls_in_bf16(kind: str) -> bool:
    """Whether autocast computes matmuls in bf16 on a device type, as "cuda"."""
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.bfloat16


def e4m3_scale(x: Tensor) -> Tensor:
    """The largest magnitude divided by 448, () float32; NaN or infinite if a number of x is."""
    return (torch.linalg.vector_norm(x, math.inf).float() / E4M3_MAX).clamp(min=1e-12)
