"""Which precision an operation computes in, and whether Triton is there."""

import importlib.util

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None  # on Linux it comes with PyTorch


def to_residual_stream(x: Tensor) -> Tensor:
    """The residual stream is bf16 where products are: half the traffic, and what llm.c does.

    In fp16 it stays float32, whose range it may need.
    """
    return x.bfloat16() if matmuls_in_bf16(x.device.type) else x


def matmuls_in_bf16(kind: str) -> bool:
    """Whether autocast computes them so, on a device of this kind."""
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.bfloat16
