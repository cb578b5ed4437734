"""Validation loss over a fixed number of tokens, perplexity and bits per byte."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..config.model import IGNORE
from ..data.loader import Batch
from ..distributed.runtime import Runtime
from ..model.evaluation_mode import in_evaluation_mode
from ..model.gpt import LanguageModel
from ..model.packed_documents import packed
from ..tokenizer import Tokenizer, gpt2_tokenizer

SIGNAL_CHECK_BATCHES = 8  # of a GPU, between two checks for a signal; a CPU takes seconds for one


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
        """exp(loss); infinite on overflow."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the predicted text, comparable across tokenizers.

        The bits of end-of-text tokens count; they have no bytes.
        """
        return self.nats / math.log(2) / max(1, self.text_bytes)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[Batch],
    rt: Runtime,
    tokenizer: Tokenizer | None = None,
) -> Evaluation | None:
    """Loss of a model over this rank's batches, summed over ranks.

    Args:
        model: in any mode, which is restored afterwards.
        batches: equally many on every rank.
        rt: this process.
        tokenizer: the model's; by default GPT-2's.

    Returns:
        The sums, or None if a signal asked any rank to stop.
    """
    token_bytes = _bytes_per_token(tokenizer or gpt2_tokenizer()).to(rt.device)
    # float32 would round the nats of a million tokens, some 2**22, to 0.5 with each batch
    wide = torch.float32 if rt.device.type == "mps" else torch.float64  # which MPS lacks
    nats = torch.zeros((), dtype=wide, device=rt.device)
    counts = torch.zeros(2, dtype=torch.int64, device=rt.device)
    check_every = 1 if rt.device.type == "cpu" else SIGNAL_CHECK_BATCHES
    with in_evaluation_mode(model):
        for number, (x, y, *begins) in enumerate(batches):
            if number % check_every == 0 and rt.stop_requested():
                return None
            with rt.autocast():
                nats += model(x, y, reduction="sum", cache=packed(*begins))
            counts[0] += (y != IGNORE).sum()
            counts[1] += (token_bytes[y.clamp(min=0)] * (y != IGNORE)).sum()
    tokens, text_bytes = rt.all_sum(counts).tolist()
    return Evaluation(rt.all_sum(nats).item(), tokens, text_bytes)


def combine(parts: Iterable[Evaluation]) -> Evaluation:
    """The evaluation of several data sets as one; each weighs by its tokens."""
    sums = [(part.nats, part.tokens, part.text_bytes) for part in parts]
    return Evaluation(*(sum(column) for column in zip(*sums, strict=True)))


@functools.cache
def _bytes_per_token(tokenizer: Tokenizer) -> torch.Tensor:
    return torch.from_numpy(tokenizer.bytes_per_token())
