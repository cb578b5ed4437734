"""Log-likelihood of continuations given contexts, for multiple choice and last-word tasks.

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
from ..model.evaluation_mode import in_evaluation_mode, without_compiled_code
from ..model.gpt import LanguageModel

Continuation = tuple[Sequence[int], Sequence[int]]  # ids of the context (>= 1), ids to score

BATCH_TOKENS = {"cuda": 2**15, "mps": 2**13, "cpu": 2**12}  # padding included
WIDTH_STEP = 16  # batches are padded to a multiple of it
HEAD_ROWS = 1024  # positions whose logits are held at once: 200 MB in float32


class Score(NamedTuple):
    """The score of one continuation."""

    nats: float  # -log-likelihood, summed over its tokens
    tokens: (
        int  # tokens predicted; fewer than the continuation has if it is longer than the context
    )
    greedy: bool  # whether each token is the likeliest at its position


@torch.no_grad()
def score(
    model: LanguageModel,
    continuations: Sequence[Continuation],
    rt: Runtime,
    title: str = "",
    batch_tokens: int = 0,
) -> list[Score] | None:
    """Scores continuations, each on one rank, in batches of similar length.

    The batches do not depend on the number of ranks. If context and continuation are longer than
    block_size, the beginning is cut off. Training state and random numbers stay untouched.

    A compiled model runs uncompiled here, since each new length would compile it anew. The matmuls,
    which dominate, are the same.

    Args:
        model: in any mode, which is restored afterwards.
        continuations: equal on every rank.
        rt: this process.
        title: of the progress bar.
        batch_tokens: positions in a batch; 0 for a number that suits the device.

    Returns:
        A score for each continuation, on every rank; None if a signal asked any rank to stop.
    """
    block_size = model.config.block_size
    lengths = [min(len(context) + len(ids) - 1, block_size) for context, ids in continuations]
    batches = plan_batches(lengths, batch_tokens or BATCH_TOKENS[rt.device.type])
    mine = batches[rt.rank :: rt.world_size]
    exact = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    found = torch.zeros(len(continuations), 2, device=rt.device, dtype=exact)  # see _score_batch
    rounds = range(len(batches[:: rt.world_size]))  # equally many on all ranks
    hide = None if rt.is_main else True  # None: where there is no terminal
    with in_evaluation_mode(model), without_compiled_code(model):
        for i in tqdm(rounds, title, disable=hide, leave=False, dynamic_ncols=True):
            if rt.stop_requested():
                return None
            if i >= len(mine) and not rt.sharded:
                continue
            width, indices = mine[i] if i < len(mine) else batches[0]
            scores = _score_batch(model, [continuations[j] for j in indices], width, rt)
            if i < len(mine):  # else the pass only took part in FSDP's all-gathers
                found[torch.tensor(indices, device=rt.device)] = scores
    counts = [min(len(ids), block_size) for _, ids in continuations]
    answers = rt.all_sum(found).tolist()  # other ranks add zeros
    return [Score(n, c, not missed) for (n, missed), c in zip(answers, counts, strict=True)]


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, list[int]]]:
    """Batches as (width, indices), the longest first: running out of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches, start = [], 0
    while start < len(order):
        width = -(-lengths[order[start]] // WIDTH_STEP) * WIDTH_STEP
        count = max(1, batch_tokens // width)
        batches.append((width, order[start : start + count]))
        start += count
    return batches


def _score_batch(model: LanguageModel, rows: list[Continuation], width: int, rt: Runtime) -> Tensor:
    """(B, 2): nats of each continuation, and how many of its tokens are not the likeliest."""
    block_size = model.config.block_size
    width = min(width, block_size)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORE)
    for i, (context, continuation) in enumerate(rows):
        tokens = torch.tensor([*context, *continuation][-block_size - 1 :])
        end = len(tokens) - 1
        begin = max(0, end - len(continuation))
        ids[i, :end] = tokens[:-1]
        targets[i, begin:end] = tokens[begin + 1 :]
    ids, targets = ids.to(rt.device), targets.to(rt.device)
    counts = targets != IGNORE
    with rt.autocast():
        # (N, C): logits are computed for predicted tokens only
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
