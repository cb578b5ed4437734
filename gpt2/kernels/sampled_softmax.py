"""Which ids the softmax of a sampled loss sums over, and by how much their logits are raised.

The sum of e^logit over the vocabulary is estimated from the targets of the micro-batch, each of
which counts as it is, and from other ids, drawn without replacement, of which each stands for
k = (V - T) / (S - T) of them (Bengio & Senécal 2003, "Quick training of probabilistic neural nets
by importance sampling"; Jean et al. 2015, arXiv:1412.2007). The estimate has no bias.
"""

import torch
from torch import Tensor

from ..config.model import IGNORE

SHARE = 1 / 3  # of the vocabulary
TILE = 128  # columns: tensor cores want a multiple
BITS = 0x7FFFFFFF  # of an int32 that is not negative


def sampled_size(vocab: int) -> int:
    """S for a vocabulary of V ids; 16,768 for GPT-2's."""
    return max(1, round(vocab * SHARE / TILE)) * TILE


def sample_ids(targets: Tensor, vocab: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ids of a sampled softmax. Shapes do not depend on the targets, as CUDA graphs need it.

    The draw is a hash of ids and targets. So it needs no random state, and a run that was
    interrupted draws as one that was not.

    If T > S, the ids are S of the targets, and positions with other targets do not train.

    Args:
        targets: (N,) int64 ids, `IGNORE` where nothing is predicted.
        vocab: V.
        size: S, at most V.

    Returns:
        ids, (S,) int64, all different, the T different targets among them; the column of each
        target in ids, (N,) int64, or `IGNORE`; what is added to the logits of the ids, (S,)
        float32: 0 for targets, ln k for others.
    """
    device = targets.device
    # The positions that predict nothing write to a place behind the vocabulary.
    place = torch.where(targets == IGNORE, vocab, targets)
    is_target = torch.zeros(vocab + 1, dtype=torch.bool, device=device)
    is_target = is_target.index_fill_(0, place, True)[:vocab]
    order = torch.arange(targets.shape[0], device=device)
    seed = _mixed((place * (2 * order + 1)).sum())
    hashed = _mixed(torch.arange(vocab, device=device) + seed)
    key = torch.where(is_target, -1, hashed).to(torch.int32)  # a sort of 32 bits is faster
    ids = key.argsort(stable=True)[:size]
    column = torch.full((vocab + 1,), IGNORE, dtype=torch.int64, device=device)
    column.index_copy_(0, ids, torch.arange(size, device=device))
    others, drawn = vocab - is_target.sum(), size - is_target.sum()
    raised = torch.where(is_target[ids], 0.0, (others / drawn.clamp(min=1)).log())
    return ids, column[place], raised


def _mixed(x: Tensor) -> Tensor:
    """31 pseudo-random bits of each int64: multiplied and folded twice."""
    for factor in (0x9E3779B1, 0x85EBCA77):
        x = (x & BITS) * factor
        x = (x ^ (x >> 31)) & BITS
    return x
