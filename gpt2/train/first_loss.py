"""The loss of the first step, compared with what fresh weights must give.

A fresh network guesses uniformly, but for two effects. The token just read gets a higher logit
(`LanguageModel.own_logit`), so text that repeats tokens, such as source code with its spaces, has a
lower loss. And each target's logit is random, with variance C·σ²: a step of few different targets
has a loss that is off by more. Both follow from the step's tokens, which are read again only if the
loss is not close to the theory.
"""

import math
from dataclasses import dataclass

import numpy as np

from ..distributed.runtime import Runtime
from ..model.gpt import INIT_STD
from ..report import console
from .state import TrainState

CLOSE = 0.1  # nats: fits without a look at the tokens
DEVIATIONS = 4  # of the random part, that a loss may be off
UNSURE = 0.4  # share by which the gain from repeated tokens may be off
MOST_SEQUENCES = 4096  # that are read


@dataclass(frozen=True)
class StepTokens:
    """What matters about the tokens of a step."""

    count: int
    repeats: float  # share of targets that equal the token before them
    spread: float  # √(Σ share²) over the different targets: 1 for a single one, 0 for ever more


def check_first_loss(  # noqa: PLR0917
    loss: float, tokens: int, state: TrainState, rt: Runtime, init: str, chat: bool = False
) -> None:
    """Logs the first loss, or warns where no fresh network would have it.

    Given weights must only do better than guessing.

    Args:
        loss: of step 1, in nats.
        tokens: of step 1, over all ranks.
        state: of the run.
        rt: this process.
        init: the weights that the run began with; empty: fresh ones.
        chat: whether it learns conversations, which the model's own tokenizer encodes.
    """
    if not rt.is_main:
        return
    expected = state.model.expected_first_loss()
    if math.isnan(expected) or state.model.own_loss is not None:
        console.log(f"first loss {loss:.4f}; no theory knows the parts of a plugin")
        return
    if init and loss < expected:
        console.log(f"first loss {loss:.4f}, of the weights of {init}")
        return
    if init:
        cause = (
            "are the shards and the model of one tokenizer? "
            "(docs/troubleshooting.md#another-tokenizer)"
        )
        if chat:
            cause = "the model knows nothing of such conversations yet"
        console.warn(
            f"first loss {loss:.2f}, of the weights of {init}, is no better than guessing "
            f"({expected:.2f}): {cause}"
        )
        return
    text = f"first loss {loss:.2f}; fresh weights should give {expected:.2f}"
    if abs(loss - expected) <= CLOSE:
        console.log(f"{text}: as expected")
        return
    seen = read_tokens(state, tokens)
    here, tolerance = expected_on(seen, state, expected)
    text = (
        f"{text}, and {here:.2f} ± {tolerance:.2f} on these {seen.count:,} tokens, of which "
        f"{seen.repeats:.0%} repeat the one before"
    )
    if abs(loss - here) <= tolerance:
        console.log(f"{text}: as expected")
        return
    cause = "a token sees its target, or the initialisation was changed"
    if loss > here:
        cause = "the initialisation or the scale of the logits was changed"
    console.warn(f"{text}: {cause} (docs/troubleshooting.md#first-loss)")


def expected_on(seen: StepTokens, state: TrainState, expected: float) -> tuple[float, float]:
    """(loss of fresh weights on these tokens, by how much it may be off), in nats."""
    gain = seen.repeats * state.model.own_logit()
    random = INIT_STD * state.model.config.n_embd**0.5 * seen.spread
    return expected - gain, CLOSE + DEVIATIONS * random + UNSURE * gain


def read_tokens(state: TrainState, tokens: int) -> StepTokens:
    """What the first sequences of the run hold, read from the shards once more.

    Read from the shards, so that targets which the loader shifts wrongly do not look right.
    """
    length = state.plan.block_size
    found = state.loader.order.locate(0, min(MOST_SEQUENCES, max(1, tokens // length)))
    rows = [shard.read(int(start), length + 1).astype(np.int64) for shard, start in found]
    repeats = sum(int((row[1:] == row[:-1]).sum()) for row in rows)
    targets = np.concatenate([row[1:] for row in rows])
    shares = np.unique(targets, return_counts=True)[1] / len(targets)
    return StepTokens(tokens, repeats / len(targets), float(np.sqrt((shares**2).sum())))
