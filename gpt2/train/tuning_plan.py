"""How a fine-tuning run follows from the amount of its data: batch, epochs and steps.

The numbers are those by which docs/results/chat and models/box-chat learned to answer: about a
hundred steps, few epochs where there are many rows, and small steps where there are few.
"""

import bisect
import math
from dataclasses import replace

from ..checkpoint.training_state import Resumed
from ..config.finetune import FinetuneConfig
from ..config.train import BatchPlan, DataOptions, TrainConfig
from ..data.conversations import is_chat
from ..data.sequence_order import Mixture
from .schedules import sequences_left
from .state import TrainState

LARGEST_BATCH = 8  # rows
STEPS_AN_EPOCH = 16  # at least, where a smaller batch can give them
ENOUGH_STEPS, FEW_STEPS = 100, 50
LEAST_EPOCHS, MOST_EPOCHS = 3, 30


def fit_batch(
    data: DataOptions, mixture: Mixture, world_size: int, resumed: Resumed | None
) -> DataOptions:
    """The options with a batch size where none was given: 8, 4, 2 or 1 rows.

    A resumed run keeps the batch that it had.
    """
    if data.batch_size:
        return data
    rows = sum(order.per_epoch for order in mixture.orders) // world_size
    size = LARGEST_BATCH
    while size > 1 and rows < STEPS_AN_EPOCH * size:
        size //= 2
    stored = resumed.state.get("settings", {}).get("batch_size") if resumed else None
    return replace(data, batch_size=stored or size)


def resolve_steps(
    config: TrainConfig, state: TrainState, resumed: Resumed | None = None
) -> TrainConfig:
    """The settings with the numbers that the data decide: batch, epochs, and steps for these.

    `max_steps` is lowered to the steps that the epochs take. A resumed run keeps its epochs, and
    the steps that follow read what is left of them, also where a step reads more or fewer rows now.
    """
    if not isinstance(config, FinetuneConfig):
        return config
    rows = sum(order.per_epoch for order in state.loader.order.orders)
    stored = resumed.state.get("settings", {}).get("epochs") if resumed else None
    epochs = (
        config.tuning.epochs
        or stored
        or min(
            MOST_EPOCHS,
            max(LEAST_EPOCHS, math.ceil(ENOUGH_STEPS * state.plan.sequences_per_step / rows)),
        )
    )
    left = max(0, math.ceil(epochs * rows) - state.loader.position)
    more = math.ceil(left / state.plan.sequences_per_step)
    steps = max(1, state.step + more)
    if config.optim.batch_warmup:  # steps are smaller at first, by no more than half on average

        def sequences(max_steps: int) -> int:
            of_so_many = replace(config.optim, max_steps=max_steps)
            return sequences_left(state.step, of_so_many, state.plan)

        steps = bisect.bisect_left(range(steps + more), left, lo=steps, key=sequences)
    max_steps = min(config.optim.max_steps, steps)
    return replace(
        config,
        data=replace(config.data, batch_size=state.plan.batch_size),
        optim=replace(config.optim, max_steps=max_steps),
        tuning=replace(config.tuning, epochs=epochs),
    )


def learns_conversations(config: TrainConfig) -> bool:
    """Whether a run is fine-tuned on conversations, not on shards."""
    return isinstance(config, FinetuneConfig) and is_chat(config.data.data_dir)


def note_few_steps(config: TrainConfig, plan: BatchPlan, epochs: float) -> str:
    """What to change in a fine-tuning of fewer than `FEW_STEPS` steps; empty where there are more.

    Args:
        config: the settings, resolved by `resolve_steps`.
        plan: of the batch.
        epochs: that the run makes.
    """
    steps = config.optim.max_steps
    if not isinstance(config, FinetuneConfig) or steps >= FEW_STEPS:
        return ""
    ways = [f"--epochs={math.ceil(config.tuning.epochs * ENOUGH_STEPS / steps)}"]
    ways += ["--batch_size=1"] * (plan.batch_size > 1)
    if epochs < config.tuning.epochs:  # max_steps was given
        ways = [f"--max_steps={ENOUGH_STEPS}"]
    chat = is_chat(config.data.data_dir)
    what, more = ("to answer as the file does", "conversations") if chat else ("the text", "text")
    return (
        f"{steps} steps are few: the model will hardly learn {what}; use {' or '.join(ways)}, or "
        f"more {more} (docs/finetuning.md#how-long)"
    )
