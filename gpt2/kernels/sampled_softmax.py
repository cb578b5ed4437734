"""Which ids the softmax of a sampled loss sums over, and by how much their logits are raised.

The sum of e^logit over the vocabulary is estimated without bias by that over the targets of the
micro-batch, each of which counts as it is, and over other ids, drawn without replacement, of which
each stands for k = (V - T) / (S - T) of its kind (Bengio & Senécal 2003, "Quick training of
probabilistic neural nets by importance sampling"; Jean et al. 2015, arXiv:1412.2007).
"""

import torch
from torch import Tensor

from ..config.model import IGNORE

SHARE = 1 / 3  # of the vocabulary


def sampled_ids(vocab: int) -> int:
    """S of a vocabulary of V ids: a third of it, in tiles of 128 columns."""
    return max(128, round(vocab * SHARE / 128) * 128)


def sample_ids(targets: Tensor, vocab: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ids of a sampled softmax, in ascending order; nothing waits for the device.

    The draw is a hash of ids and targets, so that it needs no random state, and a run that goes on
    draws as one that was never stopped.

    Args:
        targets: (N,) int64 ids, `IGNORE` where nothing is predicted.
        vocab: V.
        count: S < V.

    Returns:
        ids, (S,) int64: all T distinct targets if T ≤ S, and others; the column of each target
        among them, (N,) int64, `IGNORE` where it has none; what is added to the logits of each id,
        (S,) float32: 0 for targets, ln k for others.
    """
    ids = torch.arange(vocab, device=targets.device)
    order = torch.arange(targets.shape[0], device=targets.device)
    seed = ((targets + 2) * (2 * order + 1)).sum()
    key = _mixed(ids + _mixed(seed))
    counts = targets != IGNORE
    # Rows without a target write to a place behind the ids.
    is_target = torch.zeros(vocab + 1, dtype=torch.bool, device=targets.device)
    place = torch.where(counts, targets, vocab)
    is_target = is_target.index_fill_(0, place, True)[:vocab]
    key = torch.where(is_target, -1, key)
    chosen = key.topk(count, largest=False, sorted=False).indices.sort().values
    column = torch.full((vocab + 1,), IGNORE, dtype=torch.int64, device=targets.device)
    column.index_copy_(0, chosen, torch.arange(count, device=targets.device))
    columns = column[place]
    distinct = is_target.sum()
    k = (vocab - distinct) / (count - distinct).clamp(min=1)
    return chosen, columns, torch.where(is_target[chosen], 0.0, k.log())


def _mixed(x: Tensor) -> Tensor:
    """31 pseudo-random bits of each integer (the mixing of a linear congruential generator)."""
    for factor in (2654435761, 2246822519):
        x = ((x & 0x7FFFFFFF) * factor) & 0x7FFFFFFFFFFFFFFF
        x = (x ^ (x >> 15)) & 0x7FFFFFFF
    return x
