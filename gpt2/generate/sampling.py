"""From logits to a token: filters of the distribution, repetition penalty, reproducible draws.

Nothing here waits for the device or depends on values in it, so that a CUDA graph can hold it.

Shapes: `B` sequences, `N` new tokens, `V` vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the defaults draw as the model says.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: see `filter_logits`; 0 for all tokens.
        top_p: see `filter_logits`; 1 for all tokens.
        min_p: see `filter_logits`; 0 for all tokens.
        repetition_penalty: see `penalise`; 1 for none.

    Raises:
        UserError: for settings that mean nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if self.temperature and not 1e-3 <= self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature}: use 0 (always the likeliest token) or 0.001…"
            )
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: use 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: use a number above 0, up to 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}: use a number from 0 (all tokens) to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(
                f"repetition_penalty={self.repetition_penalty}: use a number above 0; "
                "1 for none, 1.2 for few repetitions"
            )


def check_sampling(max_new_tokens: int, *positional, **settings):
    """Raises UserError for settings that mean nothing; they are those of `Sampling`, in order."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens}: use 0 or more")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    Sampling(**dict(zip(names, positional, strict=False)), **settings)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens that have occurred less likely (Keskar et al. 2019, section 4.1).

    As in transformers, negative logits are multiplied by the penalty and the others divided by it.

    Args:
        logits: (B, V).
        seen: (B, V) bool, the tokens of the prompt and those written.
        penalty: above 1 for fewer repetitions.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Logits (B, V) divided by the temperature, with -inf for tokens that must not be drawn.

    top_k keeps the k likeliest tokens (Fan et al. 2018); of these, top_p keeps the fewest that
    together reach probability p (Holtzman et al. 2020), at least one; min_p keeps those at least
    min_p times as likely as the likeliest (Nguyen et al. 2024).
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = _sums(probabilities) - probabilities  # mass of the likelier tokens
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    if min_p > 0:
        lowest = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    return logits


def _sums(p: Tensor) -> Tensor:
    """Sums of each row of probabilities up to every place.

    In float64, where there is one, since a row beside others is added in another order than alone:
    in float32 that changes tokens.
    """
    return p.cumsum(-1, dtype=torch.float32 if p.device.type == "mps" else torch.float64)


def uniforms(seed: int | None, rows: int, count: int) -> Tensor:
    """(count, rows) numbers of [0, 1) on the CPU, one for each token that will be drawn.

    Row i has the numbers of `seed + i`, whatever the other rows and the device are, and a larger
    count only appends. Without a seed they are torch's next random numbers.
    """
    if seed is None:
        return torch.rand(count, rows)
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    return torch.stack([torch.rand(count, generator=g) for g in generators], dim=1)


def choose(
    logits: Tensor, uniform: Tensor, sampling: Sampling, seen: Tensor | None = None
) -> Tensor:
    """One token for each row of (B, V) logits, (B,).

    A draw is the inverse of the cumulative distribution at one uniform number: it needs one
    number a token, which no other row and no device changes.

    Args:
        logits: (B, V) in any precision.
        uniform: (B,) in [0, 1), see `uniforms`; not read at temperature 0.
        sampling: the settings.
        seen: (B, V) bool; needed with a repetition penalty.
    """
    s = sampling
    if s.temperature == 0 and s.repetition_penalty == 1:
        return logits.argmax(-1)
    logits = logits.float()
    if s.repetition_penalty != 1:
        logits = penalise(logits, seen, s.repetition_penalty)
    if s.temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, s.temperature, s.top_k, s.top_p, s.min_p).softmax(-1)
    total = _sums(p)
    at = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)
    at = at.clamp(max=p.shape[-1] - 1)
    # rounding in the sum can lead to a token that was filtered out
    return torch.where(p.gather(1, at) > 0, at, p.argmax(-1, keepdim=True)).squeeze(1)


def pick(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row of (B, V) logits, (B,); temperature 0 takes the likeliest."""
    uniform = torch.rand(len(logits), device=logits.device, generator=generator)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    return choose(logits, uniform, sampling)
