"""Rotary positions (Su et al. 2021, arXiv:2104.09864): queries and keys turn with their position.

Shapes: `B` batch, `H` heads, `T` time, `D` head width.
"""

import torch
from torch import Tensor

from ..kernels.custom_op import custom_op


@custom_op
def turns(positions: Tensor, pairs: int, turning: int, base: float) -> Tensor:
    """Cosines and sines of the angles by which pairs turn (eq. 15): position · base^(-i/turning).

    One operation to the compiler, which would otherwise compute them anew for every head and layer.

    Args:
        positions: (T,) or (B, T).
        pairs: D / 2.
        turning: of these, the first ones that turn; the others stay as they are.
        base: of the wavelengths.

    Returns:
        (2, T, D/2) or (2, B, 1, T, D/2), float32.
    """
    rates = torch.zeros(pairs, device=positions.device)
    number = torch.arange(turning, device=positions.device, dtype=torch.float32)
    rates[:turning] = base ** (-number / max(1, turning))
    angles = positions[..., None] * rates
    if angles.ndim == 3:
        angles = angles[:, None]  # every head
    return torch.stack([angles.cos(), angles.sin()])


@torch.library.register_fake("gpt2::turns")
def _(positions: Tensor, pairs: int, turning: int, base: float) -> Tensor:
    shape = (2, *positions.shape, pairs)
    shape = shape if positions.ndim == 1 else (*shape[:2], 1, *shape[2:])
    return positions.new_empty(shape, dtype=torch.float32)


def rotate(x: Tensor, turned: Tensor) -> Tensor:
    """Turns pairs (eq. 34): member i of the first half of D with member i of the second.

    Args:
        x: (B, H, T, D).
        turned: see `turns`.
    """
    cos, sin = turned
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
