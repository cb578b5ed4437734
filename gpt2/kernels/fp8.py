"""Numbers in fp8 and their matmul, in plain PyTorch; on a GPU by Triton and tensor cores.

`torch._scaled_mm` is private to PyTorch. Where it is missing, float32 takes its place: equal up to
rounding, but slower and with float32 copies of both factors.
"""

import torch
from torch import Tensor

from .precision import E4M3_MAX, GRADIENT_SCALE, HAS_TRITON, e4m3_scale


def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x / scale in e4m3, its transpose, scale); the scale makes the largest number 448.

    A NaN or an infinity in x makes the scale NaN or infinite, and with it every product. The result
    does not depend on how a cast treats numbers beyond 448: PyTorch 2.11 makes them NaN, 2.13 and
    newer saturate, infinity included.

    Args:
        x: (N, C) contiguous.

    Returns:
        (N, C), (C, N), () float32.
    """
    if x.is_cuda and HAS_TRITON:
        from .triton_training import quantize as by_kernel

        return by_kernel(x)
    scale = e4m3_scale(x)
    # The quotient may round upwards, beyond 448.
    out = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return out, out.t().contiguous(), scale


def gradient_to_fp8(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient of logits times 2^`GRADIENT_SCALE` in e5m2, and its transpose."""
    out = (gradient.float() * 2.0**GRADIENT_SCALE).to(torch.float8_e5m2)
    return out, out.t().contiguous()


def scaled_matmul(  # noqa: PLR0917 - factors, then their scales
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a b · scale_a · scale_b of two matrices in fp8.

    Args:
        a: (N, K), contiguous.
        b: (K, M), the transpose of a contiguous matrix.
        scale_a: () float32.
        scale_b: () float32.
        dtype: of the result.
        fast: use the tensor cores' short accumulator.
    """
    if hasattr(torch, "_scaled_mm"):
        return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast)
    return (a.float() @ b.float() * (scale_a * scale_b)).to(dtype)
