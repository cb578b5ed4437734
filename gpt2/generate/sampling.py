"""Sampling: from logits to one token per row, reproducible by seed.

`choose` applies the repetition penalty, the temperature and the filters (top-k, top-p, min-p), then
draws. No function here synchronizes with the device or branches on values of a tensor, so a CUDA
graph can record `choose`.

Shapes: `B` rows (sequences being generated), `N` new tokens, `V` vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

MOST_TOKENS = 10_000_000  # of a text: a random number for each is drawn before the first
MIN_PENALTY, MAX_PENALTY = 0.01, 100  # beyond them float32 logits become infinite, and then NaN


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings; the defaults sample from the model's distribution.

    Args:
        temperature: divides the logits; 0, and anything below 0.001, for greedy decoding.
        top_k: keep the k likeliest tokens; 0 for all.
        top_p: keep the fewest likeliest tokens whose probabilities reach this sum; 1 for all, 0 for
            the likeliest alone, which is greedy decoding.
        min_p: keep tokens at least this many times as likely as the likeliest; 0 for all.
        repetition_penalty: above 1, tokens that have occurred become less likely; 1 for none.

    Raises:
        UserError: a setting is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature}: use 0 (always the likeliest token) or more"
            )
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: use 0 (all tokens) or more")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: use a number above 0, up to 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}: use a number from 0 (all tokens) to 1")
        if not MIN_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            raise UserError(
                f"repetition_penalty={self.repetition_penalty}: use a number from {MIN_PENALTY} to "
                f"{MAX_PENALTY}; 1 for none, 1.2 for few repetitions"
            )
        if self.temperature < 1e-3 or self.top_p == 0:  # logits / 1e-40 would be infinite
            object.__setattr__(self, "temperature", 0.0)


def check_sampling(max_new_tokens: int, **settings: Any) -> Sampling:
    """Builds `Sampling` from its fields and also checks the number of tokens.

    Raises:
        UserError: a setting is out of range.
    """
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens}: use 0 or more")
    if max_new_tokens > MOST_TOKENS:
        raise UserError(f"max_new_tokens={max_new_tokens}: use at most {MOST_TOKENS:,}")
    return Sampling(**settings)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty (Keskar et al. 2019, section 4.1): repeated tokens become less likely.

    Negative logits are multiplied by the penalty, others divided by it, as in transformers.

    Args:
        logits: (B, V).
        seen: (B, V) bool, True for tokens of the prompt and generated tokens.
        penalty: above 1 for fewer repetitions.

    Returns:
        (B, V) logits.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Divides by the temperature and sets filtered tokens to -inf.

    The filters apply in this order:

    1. top_k keeps the k likeliest tokens (Fan et al. 2018).
    2. top_p (nucleus sampling, Holtzman et al. 2020) keeps the smallest set of likeliest tokens
       whose probabilities reach p, and at least one token.
    3. min_p keeps tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024).

    Args:
        logits: (B, V).
        temperature: above 0.
        top_k: 0 for all tokens.
        top_p: 1 for all tokens.
        min_p: 0 for all tokens.

    Returns:
        (B, V) logits.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        likelier = _cumulative(probabilities) - probabilities  # mass of all likelier tokens
        drop = torch.zeros_like(likelier, dtype=torch.bool).scatter(1, index, likelier >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    if min_p > 0:
        lowest = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    return logits


def _cumulative(p: Tensor) -> Tensor:
    """Cumulative sums of each row, in float64 except on MPS, which lacks it.

    The order of summation depends on the number of rows. In float32 its rounding would make a
    row's tokens depend on the other rows of the batch.
    """
    return p.cumsum(-1, dtype=torch.float32 if p.device.type == "mps" else torch.float64)


def uniforms(seed: int | None, rows: int, count: int) -> Tensor:
    """Uniform random numbers in [0, 1), one for each token to be drawn; (N, B) on the CPU.

    Row i uses its own generator with `seed + i`: its numbers depend neither on the other rows nor
    on the device, and a larger count appends numbers without changing the first ones. Without a
    seed, the numbers come from torch's default generator.
    """
    kind: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
    if seed is None:
        return torch.rand(count, rows, **kind)
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    return torch.stack([torch.rand(count, generator=g, **kind) for g in generators], dim=1)


def choose(
    logits: Tensor, uniform: Tensor, sampling: Sampling, seen: Tensor | None = None
) -> Tensor:
    """Chooses one token per row.

    A draw inverts the cumulative distribution at one uniform number (inverse transform sampling).
    It needs a single random number per token, whatever the device and the other rows are.

    Args:
        logits: (B, V) in any precision.
        uniform: (B,) in [0, 1), from `uniforms`; not read at temperature 0.
        sampling: the settings.
        seen: (B, V) bool; needed with a repetition penalty.

    Returns:
        (B,) token ids.
    """
    s = sampling
    if s.temperature == 0 and s.repetition_penalty == 1:
        return logits.argmax(-1)
    logits = logits.float()
    if s.repetition_penalty != 1:
        assert seen is not None
        logits = penalise(logits, seen, s.repetition_penalty)
    if s.temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, s.temperature, s.top_k, s.top_p, s.min_p).softmax(-1)
    total = _cumulative(p)
    token = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)
    token = token.clamp(max=p.shape[-1] - 1)
    # rounding of the sums may end at a token of probability 0: take the likeliest instead
    return torch.where(p.gather(1, token) > 0, token, p.argmax(-1, keepdim=True)).squeeze(1)
