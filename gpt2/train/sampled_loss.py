"""Training by a sampled softmax: when it is sampled, and when it cannot be.

The logarithm of the estimated sum is too small on average, and most so for a good model, whose sums
have few large terms. So the end of a run takes the whole softmax.
"""

import numpy as np
import torch
from torch import Tensor

from ..config.train import BatchPlan, OptimOptions
from ..data.sequence_order import Mixture
from ..errors import UserError
from ..kernels.sampled_softmax import sampled_size
from ..model.gpt import LanguageModel
from .second_token import SUFFIX
from .state import TrainState

WHOLE = 0.1  # share of the steps, the last ones, that take the whole softmax


def begin(options: OptimOptions, vocab: int) -> Tensor | None:
    """`LanguageModel.sampled_ids` of a run: () int64, or None without a sampled softmax."""
    sampled = options.loss.removesuffix(SUFFIX) == "sampled_softmax"
    return torch.tensor(sampled_size(vocab)) if sampled else None


def choose(state: TrainState, sampled: Tensor, options: OptimOptions) -> None:
    """Sets of how many ids the step's softmax is, 0 for all; a CUDA graph is of one number."""
    whole = state.step >= (1 - WHOLE) * options.max_steps
    size = 0 if whole else sampled_size(state.model.config.vocab_size)
    if size != int(sampled):
        sampled.fill_(size)
        state.graph.forget()


def check(
    order: Mixture, plan: BatchPlan, position: int, model: LanguageModel, loss: str
) -> list[str]:
    """Notes for the log.

    Looks at the first micro-batch: a later one may still have more different targets than the
    softmax has ids; the others then do not train.

    Args:
        order: of the sequences.
        plan: of the batch.
        position: sequences that the run has read before.
        model: to be trained.
        loss: `--loss=`.

    Raises:
        UserError: the ids of the softmax cannot hold the targets of the first micro-batch.
    """
    if model.sampled_ids is None:
        return []
    size, vocab = int(model.sampled_ids), model.config.vocab_size
    found = order.locate(position, plan.batch_size)
    targets = [reader.sequence(start, plan.block_size)[1] for reader, start in found]
    different = len(np.unique(np.concatenate(targets)))
    if different > size:
        raise UserError(
            f"loss={loss} takes {size:,} of the {vocab:,} ids, and the first micro-batch has "
            f"{different:,} different targets; use "
            f"--loss={loss.replace('sampled_softmax', 'cross_entropy')}, or a smaller --batch_size"
        )
    share = f"{different:,} of them targets in the first micro-batch"
    return [f"softmax over {size:,} of {vocab:,} ids ({share}), over all in the last {WHOLE:.0%}"]
