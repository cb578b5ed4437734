"""Inspection of a network on one text: probabilities, the logit lens, attention weights.

The model's own forward pass runs. `Recorder` takes the place of the KV cache and computes the
attention; forward hooks record the residual stream between the blocks. The result therefore shows
the effect of RoPE, QK-norm, attention windows, documents and soft-caps. Training has no code for
inspection.

Shapes: `T` tokens, `L` layers, `H` heads, `D` head width, `C` channels, `V` vocabulary, `K`
alternatives.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.evaluation_mode import check_logits
from ..model.gpt import LanguageModel


class Recorder:
    """Attention by its formula (Vaswani et al. 2017, eq. 1), for one text; keeps the weights.

    Follows `model.attention_cache.MaskedAttentionCache`: `model(idx, cache=Recorder())`.
    """

    def __init__(self) -> None:
        self.weights: list[Tensor] = []  # of each layer, (H, T, T): queries, keys; rows sum to 1
        self.first: list[Tensor] = []  # of each layer, (T,): the earliest position a query may see

    def start(self) -> int:
        """Position of the first token."""
        return 0

    def advance(self, count: int) -> None:
        """Does nothing: no positions follow."""

    def add_documents(self, begins: Tensor, positions: Tensor) -> Tensor:
        """(1, T) bool, True for the first token of a document -> (1, T) numbers of documents."""
        return begins.cumsum(1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention; all (1, H, T, D)."""
        T = q.shape[2]
        return self._attend(layer, q, k, v, torch.ones(1, 1, T, T, device=q.device).tril() > 0)

    def attend_masked(  # noqa: PLR0917 - what attention has
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Tensor | None,
        positions: Tensor,
        documents: Tensor | None,
    ) -> Tensor:
        """Attention over the keys that attention window and documents leave visible."""
        from ..model.attention_masks import visible  # imports FlexAttention, which GPT-2 is without

        seen = visible(positions, positions, window, documents, documents)
        return self._attend(layer, q, k, v, seen)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Attention over `seen`, (1, 1, T, T) bool; keeps the weights."""
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        assert len(self.weights) == layer, layer
        self.weights.append(weights[0].cpu())
        self.first.append(seen[0, 0].int().argmax(-1).cpu())
        return weights @ v


@dataclass(frozen=True)
class Look:
    """Everything that is shown of a text. Probabilities are of the next token; tensors on the CPU.

    `lens_…` are the logit lens (nostalgebraist 2020): the final norm and the head applied to the
    residual stream after each block. Row 0 is the embedding, row L the network itself.
    """

    ids: list[int]  # T
    nats: Tensor  # (T - 1,) -log p of tokens 1 … T - 1; nothing predicts token 0
    ranks: Tensor  # (T - 1,) 1: it was the likeliest
    top_ids: Tensor  # (T, K) likeliest tokens after each position, the last one included
    top_probs: Tensor  # (T, K)
    lens_ids: Tensor  # (L + 1, T, K')
    lens_probs: Tensor  # (L + 1, T, K')
    lens_actual: Tensor  # (L + 1, T - 1) probability of the token that came
    attention: list[Tensor] = field(default_factory=list)  # L of (H, T, T), empty if not wanted
    first: list[Tensor] = field(default_factory=list)  # L of (T,), see `Recorder`


@torch.no_grad()
def record(
    model: LanguageModel, ids: list[int], attention: bool = True
) -> tuple[Tensor, list[Tensor], Recorder | None]:
    """One pass over a text.

    Args:
        model: a network, in evaluation mode.
        ids: at most block_size tokens.
        attention: keep its weights, L · H · T² numbers.

    Returns:
        (logits (T, V), residual stream before, between and after the blocks: L + 1 of (T, C), the
        `Recorder` or None).

    Raises:
        UserError: the logits are not finite.
    """
    assert not model.training
    stream: list[Tensor] = []
    blocks = model.transformer.h
    handles = [blocks[0].register_forward_pre_hook(lambda _, given: stream.append(given[0][0]))]
    handles += [b.register_forward_hook(lambda _, __, out: stream.append(out[0])) for b in blocks]
    recorder = Recorder() if attention else None
    try:
        idx = torch.tensor([ids], device=model.transformer.wte.weight.device)
        logits = model(idx, cache=recorder)[0]
    finally:
        for handle in handles:
            handle.remove()
    check_logits(logits)
    return logits, stream, recorder


@torch.no_grad()
def look(
    model: LanguageModel, ids: list[int], top: int = 10, lens_top: int = 5, attention: bool = True
) -> Look:
    """Looks at a text; gives a `Look`.

    Args:
        model: a network, in evaluation mode.
        ids: from 1 to block_size tokens.
        top: K, alternatives of each token.
        lens_top: K', alternatives of each layer's prediction.
        attention: keep its weights.
    """
    logits, stream, recorder = record(model, ids, attention)
    actual = torch.tensor(ids[1:], device=logits.device)[:, None]
    log_probs = _log_softmax(logits)
    nats = -log_probs[:-1].gather(1, actual)
    ranks = 1 + (log_probs[:-1] > -nats).sum(1)
    top_log, top_ids = log_probs.topk(min(top, logits.shape[1]))
    layers = []
    for x in stream:  # one at a time: T · V numbers each
        log_probs = _log_softmax(model.logits(model.transformer.ln_f(x)))
        values, indices = log_probs.topk(min(lens_top, logits.shape[1]))
        layers.append((indices, values.exp(), log_probs[:-1].gather(1, actual)[:, 0].exp()))
    parts = zip(*layers, strict=True)
    lens_ids, lens_probs, lens_actual = (torch.stack(part).cpu() for part in parts)
    return Look(
        ids=ids,
        nats=nats[:, 0].cpu(),
        ranks=ranks.cpu(),
        top_ids=top_ids.cpu(),
        top_probs=top_log.exp().cpu(),
        lens_ids=lens_ids,
        lens_probs=lens_probs,
        lens_actual=lens_actual,
        attention=recorder.weights if recorder else [],
        first=recorder.first if recorder else [],
    )


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
