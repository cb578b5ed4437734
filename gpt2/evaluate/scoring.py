"""How likely a model finds continuations of contexts: what multiple choice and last words ask.

Shapes: `B` rows of a batch, `T` positions, `C` channels, `N` predicted tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..config.model import IGNORE
from ..distributed.fsdp import method
from ..distributed.runtime import Runtime
from ..model.gpt import GPT

Row = tuple[Sequence[int], Sequence[int]]  # ids of a context (one or more), and of what follows

BATCH_TOKENS = {"cuda": 2**15, "mps": 2**13, "cpu": 2**12}  # padding included
WIDTH_STEP = 16  # rows are padded to multiples of this
HEAD_ROWS = 1024  # positions whose logits are held at once: 200 MB


class Score(NamedTuple):
    """A continuation as the model sees it."""

    nats: float  # minus the log-likelihood of all its tokens together
    tokens: int  # predicted: fewer than it has if it is longer than the context window
    greedy: bool  # whether each of them is the likeliest one


@torch.no_grad()
def score(
    model: GPT, rows: Sequence[Row], rt: Runtime, title: str = "", batch_tokens: int = 0
) -> list[Score] | None:
    """Scores rows, each on one rank, in batches of rows of similar length.

    The batches do not depend on the number of ranks. Of a row that is longer than the window, the
    beginning is left out. Neither training state nor random numbers are touched, and a model that
    was compiled is used uncompiled: `hidden` and `logits` are plain methods of it, so that rows of
    another length compile nothing anew (the products, which take the time, are the same).

    Args:
        model: in any mode, which it is in again afterwards.
        rows: the same on every rank.
        rt: this process.
        title: of the progress bar.
        batch_tokens: positions in a batch; 0: as many as suit the device.

    Returns:
        A score for each row, on every rank; None when a signal asked any rank to stop on the way.
    """
    window, was_training = model.config.block_size, model.training
    lengths = [min(len(context) + len(ids) - 1, window) for context, ids in rows]
    batches = plan_batches(lengths, batch_tokens or BATCH_TOKENS[rt.device.type])
    mine = batches[rt.rank :: rt.world_size]
    exact = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    found = torch.zeros(len(rows), 2, device=rt.device, dtype=exact)  # as _score_batch gives them
    turns = range(len(batches[:: rt.world_size]))  # equally many on all ranks
    hide = None if rt.is_main else True  # None: where there is no terminal
    model.eval()
    try:
        for turn in tqdm(turns, title, disable=hide, leave=False, dynamic_ncols=True):
            if rt.stop_requested():
                return None
            if turn >= len(mine) and not rt.sharded:
                continue
            width, indices = mine[turn] if turn < len(mine) else batches[0]
            scores = _score_batch(model, [rows[i] for i in indices], width, rt)
            if turn < len(mine):  # else computed only because all ranks gather weights together
                found[torch.tensor(indices, device=rt.device)] = scores
    finally:
        model.train(was_training)
    counts = [min(len(ids), window) for _, ids in rows]
    answers = rt.all_sum(found).tolist()  # zeros from the ranks that did not have the row
    return [Score(n, c, not missed) for (n, missed), c in zip(answers, counts, strict=True)]


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, list[int]]]:
    """(width, numbers of rows) of batches; the longest first, so that memory runs out at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches, start = [], 0
    while start < len(order):
        width = -(-lengths[order[start]] // WIDTH_STEP) * WIDTH_STEP
        count = max(1, batch_tokens // width)
        batches.append((width, order[start : start + count]))
        start += count
    return batches


def _score_batch(model: GPT, rows: list[Row], width: int, rt: Runtime) -> Tensor:
    """(B, 2): nats of a row's continuation, and how many of its tokens are not the likeliest."""
    window = model.config.block_size
    width = min(width, window)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORE)
    for i, (context, continuation) in enumerate(rows):
        tokens = torch.tensor([*context, *continuation][-window - 1 :])
        end = len(tokens) - 1
        begin = max(0, end - len(continuation))
        ids[i, :end] = tokens[:-1]
        targets[i, begin:end] = tokens[begin + 1 :]
    ids, targets = ids.to(rt.device), targets.to(rt.device)
    counts = targets != IGNORE
    with rt.autocast():
        # (N, C): no logits where nothing is predicted
        hidden = method(model, "hidden")(ids)[counts]
    parts = []
    for part, wanted in zip(hidden.split(HEAD_ROWS), targets[counts].split(HEAD_ROWS), strict=True):
        with rt.autocast():
            logits = method(model, "logits")(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = F.cross_entropy(logits, wanted, reduction="none")
        parts.append(torch.stack([nats, (logits.argmax(-1) != wanted).to(nats.dtype)], dim=-1))
    of_tokens = torch.zeros(*targets.shape, 2, device=rt.device, dtype=parts[0].dtype)
    of_tokens[counts] = torch.cat(parts)
    return of_tokens.sum(1)
