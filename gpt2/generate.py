"""Sampling: from token ids to more token ids, with a KV cache.

When the context is full, the older half of it is forgotten: the newest block_size // 2 tokens are
read again and generation goes on. The rule is the same with and without the cache, so both give the
same tokens.

Shapes: `B` sequences, `V` vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .config import UserError
from .model import GPT, KVCache


def check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float):
    """Raises UserError for settings that mean nothing."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens}: use 0 or more")
    if temperature and not 1e-3 <= temperature < math.inf:
        raise UserError(f"temperature={temperature}: use 0 (always the likeliest token) or 0.001…")
    if top_k < 0:
        raise UserError(f"top_k={top_k}: use 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: use a number above 0, up to 1")


def filter_logits(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (B, V) divided by the temperature, with -inf for tokens that must not be drawn.

    top_k keeps the k likeliest tokens (Fan et al. 2018); of these, top_p keeps the fewest that
    together reach probability p (Holtzman et al. 2020), at least one.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def pick(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row of (B, V) logits, (B,); temperature 0 takes the likeliest."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


@torch.inference_mode()
def stream(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continues prompts, one token for each of them at a time.

    Prompts may differ in length: all are read up to the length of the shortest, then the longer
    ones still take their own tokens while the others are already writing. No padding is needed.

    Args:
        model: on any device; switched to evaluation mode.
        prompts: token ids, at least one per prompt.
        max_new_tokens: for each prompt.
        temperature: 0 takes the likeliest token.
        top_k: see `filter_logits`; 0 for all tokens.
        top_p: see `filter_logits`; 1 for all tokens.
        seed: the same seed gives the same tokens; None for other ones every time.
        stop_token: ends the sequence that wrote it (and is not yielded).
        use_cache: False computes everything anew for every token, for comparison.

    Yields:
        For each prompt its new token, or None where it has not begun or has ended.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    if not prompts or not all(prompts):
        raise UserError("a prompt needs at least one token")
    device = next(model.parameters()).device
    generator = None
    if seed is not None:
        generator = torch.Generator(device=device).manual_seed(seed)
    model.eval()
    rows = [list(prompt) for prompt in prompts]
    ends = [len(prompt) + max_new_tokens for prompt in prompts]
    finished = [not max_new_tokens] * len(rows)
    reader = _Reader(model, device, use_cache)
    position = min(map(len, rows))
    while not all(finished):
        logits = reader.next_logits([row[:position] for row in rows])
        drawn = pick(logits, temperature, top_k, top_p, generator).tolist()
        new: list[int | None] = [None] * len(rows)
        for i, token in enumerate(drawn):
            if position < len(prompts[i]):
                continue  # this row still reads its own prompt
            rows[i].append(token)  # finished rows go on unseen, so that all stay equally long
            if not finished[i]:
                finished[i] = token == stop_token
                new[i] = None if finished[i] else token
                finished[i] = finished[i] or len(rows[i]) >= ends[i]
        position += 1
        yield new


class _Reader:
    """Logits after the last token of equally long rows, reading each token once."""

    def __init__(self, model: GPT, device: torch.device, use_cache: bool):
        self.model, self.device, self.use_cache = model, device, use_cache
        self.cache: KVCache | None = None
        self.start = 0  # rows before this are forgotten

    def next_logits(self, rows: list[list[int]]) -> Tensor:
        """(B, V) logits for the token that follows rows of length n."""
        block_size, n = self.model.config.block_size, len(rows[0])
        if n - self.start > block_size:
            self.start, self.cache = n - max(1, block_size // 2), None
        weight = self.model.transformer.wte.weight
        if self.use_cache and self.cache is None:
            self.cache = KVCache(self.model.config, len(rows), weight, self._dtype(weight))
        read = self.start + (self.cache.length if self.cache else 0)
        idx = torch.tensor([row[read:n] for row in rows], device=self.device)
        hidden = self.model.hidden(idx, self.cache)[:, -1:]
        return self.model.logits(hidden)[:, 0]

    @staticmethod
    def _dtype(weight: Tensor) -> torch.dtype:
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def generate(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, **settings
) -> list[list[int]]:
    """The new tokens of each prompt; the settings are those of `stream`."""
    written: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, max_new_tokens, **settings):
        for row, token in zip(written, new, strict=True):
            if token is not None:
                row.append(token)
    return written
