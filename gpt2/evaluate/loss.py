"""Evaluation: loss over a fixed number of tokens, perplexity and bits per byte."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..config.model import IGNORE
from ..data.loader import Batch
from ..distributed.runtime import Runtime
from ..model.gpt import GPT
from ..model.packed_documents import packed
from ..tokenizer import gpt2_tokenizer

ASK_EVERY = 8  # batches between two looks for a signal


@dataclass(frozen=True)
class Evaluation:
    """Sums over all predicted tokens of all ranks."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is more than a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the predicted text: does not depend on the tokenizer.

        End-of-text tokens cost bits but are no text.
        """
        return self.nats / math.log(2) / max(1, self.text_bytes)


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[Batch], rt: Runtime) -> Evaluation | None:
    """Loss of a model over this rank's batches, summed over ranks.

    Args:
        model: in any mode, which it is in again afterwards.
        batches: see `data.Batch`; equally many on every rank.
        rt: this process.

    Returns:
        The sums, or None when a signal asked any rank to stop on the way.
    """
    was_training = model.training
    model.eval()
    token_bytes = _bytes_per_token().to(rt.device)
    # float32 holds whole numbers up to 2**24 only, so the counts are summed as integers
    nats = torch.zeros((), device=rt.device)
    counts = torch.zeros(2, dtype=torch.int64, device=rt.device)
    try:
        for number, (x, y, *begins) in enumerate(batches):
            if number % ASK_EVERY == 0 and rt.stop_requested():
                return None
            with rt.autocast():
                nats += model(x, y, reduction="sum", cache=packed(*begins))
            counts[0] += (y != IGNORE).sum()
            counts[1] += (token_bytes[y.clamp(min=0)] * (y != IGNORE)).sum()
    finally:
        model.train(was_training)
    tokens, text_bytes = rt.all_sum(counts).tolist()
    return Evaluation(rt.all_sum(nats).item(), tokens, text_bytes)


def together(parts: Iterable[Evaluation]) -> Evaluation:
    """The evaluation of several texts as one: each counts by its tokens."""
    sums = [(part.nats, part.tokens, part.text_bytes) for part in parts]
    return Evaluation(*(sum(column) for column in zip(*sums, strict=True)))


@functools.cache
def _bytes_per_token() -> torch.Tensor:
    return torch.from_numpy(gpt2_tokenizer().bytes_per_token())
