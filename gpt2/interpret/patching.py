"""Activation patching: where the difference between two texts is stored, layer by layer.

A network reads a text A, but at one layer and one position its residual stream is replaced by the
stream of another text B. The share of the prediction that moves from A's to B's says how much of
the difference passes through that place. Meng et al. 2022 (arXiv:2202.05262, causal tracing)
restore states of a clean run in a corrupted one; Geiger et al. 2021 (arXiv:2106.02997) take them
from another input. The measure is the logit difference of Wang et al. 2022 (arXiv:2211.00593).

Shapes: `T` tokens, `L` layers, `C` channels, `V` vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.logits_loss import soft_cap
from ..model.gpt import LanguageModel
from .logit_lens import record

MOST_TOKENS = 128  # of a text: (L + 1) · T passes of T tokens
PASS_TOKENS = 4096  # of the patched texts that are computed at once
LEAST_CHANGE = 0.001  # of the probability; below, a share of the change would be noise


@dataclass(frozen=True)
class Patched:
    """Effects of all patches of B into A, for the prediction at each position. On the CPU.

    Row 0 of the layers replaces the embedding, row l the output of block l - 1. At each position
    the two tokens compared are the one whose probability falls most from A to B, and the one whose
    probability rises most.
    """

    ids: list[int]  # T, of A
    other_ids: list[int]  # T, of B
    ours: Tensor  # (T,) token whose probability falls most
    theirs: Tensor  # (T,) token whose probability rises most
    probs: Tensor  # (2, 2, T) of text A or B, of `ours` or `theirs`
    change: Tensor  # (T,) share of the probability that moves from A to B (total variation)
    effect: Tensor  # (L + 1, T, T) layer, patched position, prediction: 0 A's, 1 B's, NaN no change


@torch.no_grad()
def patched_logits(
    model: LanguageModel, ids: list[int], states: Tensor, layer: int, positions: Tensor
) -> Tensor:
    """Logits of a text whose residual stream is replaced at one layer.

    Args:
        model: a network, in evaluation mode.
        ids: T tokens.
        states: (B, C) the states to put in, one for each of B separate passes.
        layer: 0 the embedding, l the output of block l - 1.
        positions: (B,) int64, where each pass has its state put in.

    Returns:
        (B, T, V) the logits of each pass.
    """
    return model.logits(_patched_hidden(model, ids, states, layer, positions))


@torch.no_grad()
def patch_effects(model: LanguageModel, ids: list[int], other_ids: list[int]) -> Patched:
    """Patches the stream of B into A at each layer and position; gives a `Patched`.

    Positions before the first difference of the texts have equal states, so their effect is 0
    without a pass.

    Args:
        model: a network, in evaluation mode.
        ids: of A, from 1 to `MOST_TOKENS` tokens.
        other_ids: of B, as many.

    Raises:
        UserError: texts that cannot be compared, see `check_pair`.
    """
    check_pair(ids, other_ids)
    streams, probs = [], []
    for text in (ids, other_ids):
        logits, stream, _ = record(model, text, attention=False)
        streams.append(torch.stack(stream))  # (L + 1, T, C)
        probs.append(logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1))
    moved = probs[1] - probs[0]  # (T, V)
    ours, theirs = moved.argmin(-1), moved.argmax(-1)
    pair = torch.stack([ours, theirs])  # (2, T)
    change = moved.clamp(min=0).sum(-1)
    normed = [model.transformer.ln_f(stream[-1]) for stream in streams]
    of_a, of_b = (_logit_difference(model, hidden, pair) for hidden in normed)
    T = len(ids)
    effect = torch.zeros(len(streams[0]), T, T, dtype=of_a.dtype, device=of_a.device)
    first = next(t for t in range(T) if ids[t] != other_ids[t])
    rows = max(1, PASS_TOKENS // T)
    for layer in range(len(effect)):
        for positions in torch.arange(first, T, device=of_a.device).split(rows):
            states = streams[1][layer, positions]
            hidden = _patched_hidden(model, ids, states, layer, positions)
            share = (_logit_difference(model, hidden, pair) - of_a) / (of_b - of_a)
            effect[layer, positions] = share
    effect[:, :, change < LEAST_CHANGE] = torch.nan
    both = torch.stack([torch.stack([p.gather(1, t[:, None])[:, 0] for t in pair]) for p in probs])
    return Patched(
        ids=ids,
        other_ids=other_ids,
        ours=ours.cpu(),
        theirs=theirs.cpu(),
        probs=both.cpu(),
        change=change.cpu(),
        effect=effect.cpu(),
    )


def check_pair(ids: list[int], other_ids: list[int]) -> None:
    """Raises UserError if two texts are of different lengths, equal or too long for patching."""
    if len(ids) != len(other_ids):
        raise UserError(
            f"the text has {len(ids):,} tokens and the second text {len(other_ids):,}; patching "
            "goes position by position: change words so that both have as many"
        )
    if ids == other_ids:
        raise UserError("both texts are equal, so nothing can move over; change a word in one")
    if len(ids) > MOST_TOKENS:
        raise UserError(
            f"patching takes texts of at most {MOST_TOKENS} tokens, since each layer and position "
            f"is a pass of its own; these have {len(ids):,}"
        )


def _patched_hidden(
    model: LanguageModel, ids: list[int], states: Tensor, layer: int, positions: Tensor
) -> Tensor:
    """(B, T, C), the output of the last norm; arguments are those of `patched_logits`."""
    assert not model.training
    rows = torch.arange(len(positions), device=positions.device)

    def replaced(x: Tensor) -> Tensor:
        x = x.clone()
        x[rows, positions] = states.to(x.dtype)
        return x

    blocks = model.transformer.h
    if layer == 0:
        handle = blocks[0].register_forward_pre_hook(
            lambda _, given: (replaced(given[0]), *given[1:])
        )
    else:
        handle = blocks[layer - 1].register_forward_hook(lambda _, __, out: replaced(out))
    try:
        return model.hidden(torch.tensor([ids], device=states.device).expand(len(rows), -1))
    finally:
        handle.remove()


def _logit_difference(model: LanguageModel, hidden: Tensor, pair: Tensor) -> Tensor:
    """(…, T, C) hidden -> (…, T) logit of pair[1] minus that of pair[0]; pair is (2, T) ids."""
    weight = model.head_weight[pair].to(hidden.dtype)  # (2, T, C)
    ours, theirs = (soft_cap((hidden * w).sum(-1), model.softcap) for w in weight)
    return theirs - ours
