"""RoPE, rotary position embeddings (Su et al. 2021, arXiv:2104.09864).

Shapes: `B` batch, `H` heads, `T` positions, `D` head width.
"""

import torch
from torch import Tensor

from ..kernels.custom_op import custom_op


@custom_op(name="turns")
def rope_cos_sin(positions: Tensor, pairs: int, rotated: int, base: float) -> Tensor:
    """Cosines and signed sines of the RoPE angles, position · base^(-i/rotated) for pair i.

    Equations 15 and 34: channel i of the first half of D becomes a cos - b sin, of the second half
    b cos + a sin. So both halves have the cosine, and the sine has a minus in the first.

    One opaque operator: the compiler would otherwise recompute them for every head and layer.

    Args:
        positions: (T,) or (B, T).
        pairs: D / 2.
        rotated: number of pairs that RoPE rotates, the first ones; the others keep angle 0.
        base: of the wavelengths.

    Returns:
        (2, T, D) or (2, B, 1, T, D), float32.
    """
    rates = torch.zeros(pairs, device=positions.device)
    number = torch.arange(rotated, device=positions.device, dtype=torch.float32)
    rates[:rotated] = base ** (-number / max(1, rotated))
    angles = positions[..., None] * rates
    if angles.ndim == 3:
        angles = angles[:, None]  # broadcast over heads
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


@torch.library.register_fake("gpt2::turns")
def _rope_cos_sin_fake(positions: Tensor, pairs: int, rotated: int, base: float) -> Tensor:
    shape = (2, *positions.shape, 2 * pairs)
    shape = shape if positions.ndim == 1 else (*shape[:2], 1, *shape[2:])
    return positions.new_empty(shape, dtype=torch.float32)


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates pairs of channels (eq. 34): pair i is channel i of each half of D.

    The compiler makes one kernel of it and of a norm before it. Halves computed apart and joined
    by `cat` would need more.

    Args:
        x: (B, H, T, D), queries or keys.
        cos_sin: see `rope_cos_sin`.
    """
    cos, sin = cos_sin
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    other = exact.roll(x.shape[-1] // 2, dims=-1)
    return (exact * cos + other * sin).to(x.dtype)
