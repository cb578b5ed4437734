"""Training also by the token after the next: `--loss=…+second`.

The same logits are to predict both. Early in training that tells a position more about what follows
it; later it only blurs the next token, so its share falls to 0. Loss and validation are of the next
token alone.
"""

import torch
from torch import Tensor

from ..config.train import OptimOptions

SUFFIX = "+second"  # of `--loss=`
SHARE = 0.5  # of the token after the next, at first (modded-nanogpt)
UNTIL = 0.6  # share of the steps in which it falls to 0, linearly


def begin(options: OptimOptions, device: torch.device) -> Tensor | None:
    """`LanguageModel.second_share` of a run: () float32, or None without a second token."""
    return torch.zeros((), device=device) if options.loss.endswith(SUFFIX) else None


def share_at(step: int, options: OptimOptions) -> float:
    """Share of the token after the next at update `step` (from 0)."""
    return SHARE * max(0.0, 1 - step / (UNTIL * options.max_steps))
