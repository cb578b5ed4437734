"""Log-probabilities of tokens, and of the likeliest tokens in their place.

They are those of the model's own distribution: the softmax of its logits in float32, before the
repetition penalty, the temperature and the filters of `sampling`.

Shapes: `N` positions, `K` likeliest tokens, `V` vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .cached_forward import HostCopy


class TokenLogprobs(NamedTuple):
    """The log-probability of one token of a text."""

    token: int
    logprob: float | None  # nats; None for a first token, which nothing predicts
    top: tuple[tuple[int, float], ...]  # (token, logprob) of the likeliest tokens, falling


class LogprobsCopy:
    """Log-probabilities on their way to the CPU.

    Args:
        logits: (N, V) in any precision.
        tokens: (N,) int64, the tokens at these positions.
        count: K, from 0.
        wait: as in `HostCopy`.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, count: int, *, wait: bool):
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(count, logprobs.shape[-1]))
        chosen = logprobs.gather(-1, tokens[:, None])
        self._values = HostCopy(torch.cat([chosen, top.values], dim=-1), wait=wait)
        self._ids = HostCopy(torch.cat([tokens[:, None], top.indices], dim=-1), wait=wait)

    def get(self) -> list[TokenLogprobs]:
        """One for each position, once they have arrived."""
        return [
            TokenLogprobs(ids[0], values[0], tuple(zip(ids[1:], values[1:], strict=True)))
            for ids, values in zip(self._ids.get(), self._values.get(), strict=True)
        ]
