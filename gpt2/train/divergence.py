"""Runs that diverge: their loss or gradient becomes NaN or infinite, and stays so.

Such a run ends with an error, exit code 2, and everything saved. The line `diverged_since` of
metrics.jsonl tells `gpt2 compare` and `gpt2 sweep`.
"""

import contextlib
import json
import math
from typing import NoReturn

from ..checkpoint.training_state import state_folders
from ..config.train import TrainConfig
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..files import write_atomically
from ..paths import for_shell
from ..report import console, metrics
from ..report.runs import DIVERGED
from .run_folder import out_dir
from .state import TrainState
from .step import Launched


def give_up(
    launched: Launched, state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog
) -> NoReturn:
    """Ends a run in which too many steps in a row were skipped.

    Raises:
        UserError: always; names the text that the last of these steps read.
    """
    own = launched.own_tokens
    batch = rt.on_main(lambda: note_batch(state, config, launched.tokens - own, own))
    log.record(launched.step, **{DIVERGED: launched.step - state.skipped + 1})
    way = rt.on_main(lambda: way_out(launched.step, state, config))
    raise UserError(
        f"the loss or the gradient was NaN or infinite in {state.skipped} steps in a row, up "
        f"to step {launched.step}, which read {batch}; the checkpoints are untouched: {way} "
        "with a lower --learning_rate, or with --dtype=float32 "
        "(docs/troubleshooting.md#loss-is-nan)"
    )


def note_batch(state: TrainState, config: TrainConfig, tokens_before: int, tokens: int) -> str:
    """Writes the places of all sequences that a step read into nonfinite.json.

    Args:
        state: of the run.
        config: its settings.
        tokens_before: tokens that the run had trained on before the step.
        tokens: tokens of the step, over all ranks.

    Returns:
        The place of the first sequence in words, for the error.
    """
    length = state.plan.block_size
    found = state.loader.order.locate(tokens_before // length, tokens // length)
    sequences = [
        {"shard": str(shard.path), "first_token": int(start), "tokens": length + 1}
        for shard, start in found
    ]
    path, content = out_dir(config) / "nonfinite.json", {"tokens_before": tokens_before}
    with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
        write_atomically(path, json.dumps(content | {"windows": sequences}, indent=1).encode())
    first = f"{sequences[0]['shard']} from token {sequences[0]['first_token']:,}"
    return f"{first} and {len(sequences) - 1} more sequences (all in {path})"


def check_end(
    state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog, resumed_at: int
) -> None:
    """Whether the model of a run that is over is of use; warns where its last steps were skipped.

    A run that a signal stopped is not over.

    Args:
        state: of the run, equal on all ranks.
        config: its settings.
        rt: this process; all ranks call together.
        log: of the run.
        resumed_at: the step that this process began at.

    Raises:
        UserError: the last validation loss is NaN or infinite, or no step changed the weights.
    """
    if state.stop and not state.is_complete(config.optim):
        return
    step, since = state.step, state.step - state.skipped + 1
    val_loss = state.val_loss if state.evaluated_at == step else None
    lost = val_loss is not None and not math.isfinite(val_loss)
    # fp16 skips its first steps while it looks for the scale of the loss
    untrained = 0 < step == state.skipped and not state.scaler.is_enabled()
    if not (lost or untrained):
        if state.skipped > 1 and rt.is_main:
            console.warn(
                f"the loss or the gradient was NaN or infinite in every step since step {since}, "
                f"so the model is of step {since - 1} (docs/troubleshooting.md#loss-is-nan)"
            )
        return
    if step > resumed_at:  # else the log has it already
        log.record(step, **{DIVERGED: min(since, step)})
    steps = f"the loss or the gradient was NaN or infinite in every step since step {since}"
    loss = f"the validation loss at step {step} is NaN or infinite"
    both = f"{loss}, and {steps}" if state.skipped else loss
    way = rt.on_main(lambda: way_out(step, state, config))
    raise UserError(
        f"the run has diverged: {both if lost else steps}; everything is saved: {way} with a lower "
        "--learning_rate, or with --dtype=float32 (docs/troubleshooting.md#loss-is-nan)"
    )


def way_out(step: int, state: TrainState, config: TrainConfig) -> str:
    """From where a run that has diverged up to a step can be trained again, in words."""
    # The weights that gave the first bad loss are those of the step before it.
    last = step - state.skipped - 1
    good = [p for p in state_folders(out_dir(config)) if int(p.name[5:]) <= last]
    if good:
        return f"go on from an earlier state ({for_shell(f'--resume={good[-1]}')})"
    return "begin again (--resume=never)"
