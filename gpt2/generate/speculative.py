"""Speculative decoding (Leviathan et al. 2023) of one float32 sequence on a CPU.

A forward pass of one token is bound by reading the weights. An fp16 copy of the matrices, half the
bytes, drafts up to 12 tokens one by one. An fp32 copy in oneDNN's packed layout then verifies them
in one pass. Draft and verification choose with the same random number per token, so the tokens kept
are exactly the choices of the float32 weights.
"""

import time

import torch
from torch import Tensor

from ..model.gpt import LanguageModel
from ..model.kv_cache import KVCache
from . import few_token_pass
from .sampling import Sampling, choose

DRAFT_TOKENS = 12  # verified in one pass
DRAFT_MIN_PARAMETERS = 30_000_000  # smaller models are not bound by reading weights
DRAFT_MIN_TOKENS = 200  # making both copies takes about as long as this many tokens save


class SpeculativeDecoding:
    """Draft and verification of a model, and whether they are faster than single steps.

    Args:
        model: GPT-2's network in float32 on a CPU, whose weights no longer change: their copies
            would be stale.
        sampling: how tokens are chosen.
    """

    def __init__(self, model: LanguageModel, sampling: Sampling):
        self.model, self.sampling = model, sampling
        layers = few_token_pass.linear_layers(model)
        self.halves = {layer: few_token_pass.half_linear(layer) for layer in layers}
        self.packed = {layer: few_token_pass.packed_linear(layer, DRAFT_TOKENS) for layer in layers}
        self.single_step_seconds = 0.0  # of one token without a draft, measured by the decoder
        self.rounds, self.tokens, self.seconds = 0, 0, 0.0

    def write(
        self, token: Tensor, uniform: Tensor, cache: KVCache, start: int, seen: Tensor | None
    ) -> list[int]:
        """One round: drafts a token for each random number, verifies all, keeps a prefix.

        Args:
            token: (1,) the newest token, not yet in the cache.
            uniform: (n, 1) random numbers, n at most `DRAFT_TOKENS`.
            cache: of one row; holds the positions before `token`.
            start: number of these positions.
            seen: (1, V) bool or None, see `choose`; the tokens kept are added.

        Returns:
            From 1 to n tokens: all n if every draft was right.
        """
        began = time.perf_counter()
        drafts = self._draft(token, uniform, cache, start, seen)
        cache.length = start  # verification overwrites the draft's keys and values
        tokens: list[int] = []
        logits = self._verify(torch.stack(drafts, dim=1), cache)
        for i, row in enumerate(logits):
            kept = choose(row[None], uniform[i], self.sampling, seen)
            if seen is not None:
                seen.scatter_(1, kept[:, None], True)
            tokens.append(int(kept.item()))
            if i + 1 < len(drafts) and tokens[-1] != drafts[i + 1].item():
                break
        self.count(len(tokens), time.perf_counter() - began)
        return tokens

    def _draft(
        self, token: Tensor, uniform: Tensor, cache: KVCache, start: int, seen: Tensor | None
    ) -> list[Tensor]:
        """The newest token and n - 1 guesses of what follows, each (1,)."""
        cache.length = start
        seen = None if seen is None else seen.clone()
        drafts = [token]
        for number in uniform[:-1]:
            logits = self._half_logits(drafts[-1], cache)
            guess = choose(logits, number, self.sampling, seen)
            if seen is not None:
                seen[0, guess] = True
            drafts.append(guess)
        return drafts

    def _half_logits(self, token: Tensor, cache: KVCache) -> Tensor:
        """Logits of the fp16 copy, (1,) -> (1, V)."""
        linear = few_token_pass.using(self.halves)
        return few_token_pass.next_logits(self.model, token[:, None], cache, linear)

    def _verify(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits of the float32 copy, (1, T) -> (T, V)."""
        linear = few_token_pass.using(self.packed)
        return few_token_pass.next_logits(self.model, tokens, cache, linear)

    def count(self, tokens: int, seconds: float) -> None:
        """Adds a round to the statistics that `pays` reads."""
        self.rounds, self.tokens = self.rounds + 1, self.tokens + tokens
        self.seconds += seconds

    def pays(self) -> bool:
        """Whether rounds are faster per token than single steps.

        False until a single step has been timed, then True for three rounds, to time those.
        """
        if not self.single_step_seconds or self.rounds < 3:
            return bool(self.single_step_seconds)
        return self.seconds < self.single_step_seconds * self.tokens
