"""Which row of a table belongs to a token and the one before it.

Pairs are too many for a row each, so they share rows by a hash (Svenstrup et al. 2017,
arXiv:1709.03933, with one hash).

Shapes: `B` batch, `T` time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FACTOR = 1_000_003  # odd, and far from the sizes of tables


def shifted(idx: Tensor) -> Tensor:
    """(B, T) ids -> (B, T), each one's predecessor; the first has none, see `bigram_rows`."""
    return F.pad(idx[:, :-1], (1, 0))


def bigram_rows(idx: Tensor, before: Tensor, positions: Tensor, end: int, rows: int) -> Tensor:
    """(B, T) rows of the table.

    A document knows nothing of the one before: what begins one (the token `end`, or position 0)
    counts as coming after `end`.

    Args:
        idx: (B, T) ids.
        before: (B, T) ids before them.
        positions: (T,) or (B, T).
        end: id of the end of text.
        rows: of the table.
    """
    before = torch.where((positions == 0) | (idx == end), end, before)
    return (before * FACTOR + idx) % rows
