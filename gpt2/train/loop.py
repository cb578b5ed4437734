"""The training loop: steps, and what is due between them.

One optimizer step is in `step.py`, the making of a run in `setup.py`, the console lines in
`messages.py`. Which device, how many ranks and which precision is the business of
`distributed/runtime.py`.
"""

import math
import signal
from collections import deque

import torch

from ..config.train import TrainConfig
from ..distributed import runtime
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..report import console, metrics
from ..report.trackers import Sink
from .divergence import check_end, give_up
from .first_loss import check_first_loss
from .messages import (
    announce,
    answer_signal,
    conclude,
    log_training_step,
    out_of_memory,
    watched,
)
from .resume import archive_previous_run, find_checkpoint, restore_logged_evaluation
from .run_folder import BEST_NAME, MODEL_NAME, folder_lock, hold_on, open_log
from .run_tokenizer import resolve_vocabulary
from .save import export_model, save_checkpoint
from .setup import build, resolve_init
from .state import TrainState
from .step import Launched, train_step
from .tuning_plan import learns_conversations, resolve_steps
from .validation import evaluate_hellaswag, validate

SIGPIPE = getattr(signal, "SIGPIPE", 13)  # Windows has none
MAX_SKIPPED_STEPS = 20  # in a row; fp16 needs a few at the start to find its scale


def run(config: TrainConfig, watch: Sink | None = None) -> int:
    """Trains, or continues, the run in `config.output.out_dir`.

    Args:
        config: every option.
        watch: gets the numbers that metrics.jsonl gets, such as a progress bar.

    Returns:
        Exit code: 0 when finished, 128 + signal when a signal asked to stop (all is saved).

    Raises:
        UserError: anything that a person can correct; whatever had been saved is still there.
    """
    started = runtime.start(config.system, console.error, answer_signal)
    with started as rt, console.unread(lambda: rt.stop(SIGPIPE)), folder_lock(config, rt) as own:
        config = resolve_vocabulary(config)  # which a checkpoint is compared with
        resumed = find_checkpoint(config, rt)
        config, init = resolve_init(config, rt, resumed)
        state = build(config, rt, resumed, init)
        config = resolve_steps(config, state, resumed)
        state.saver.check = lambda: hold_on(config, own)
        try:
            archive_previous_run(state, config, rt, resumed)
            with state.saver, open_log(config, rt, resumed, own) as log, watched(state, config, rt):
                if watch:
                    log.attach("watch", watch)
                announce(state, config, rt, resumed, log)
                if restore_logged_evaluation(state, config, rt, log, resumed):
                    export_model(state, config, rt, BEST_NAME, final=False)
                loop(state, config, rt, log)
        finally:
            state.loader.close()
        if not state.stop or state.is_complete(config.optim):
            return 0
        return 128 + (rt.stop_signal or signal.SIGTERM)  # another rank may have got the signal


def loop(state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog) -> None:
    """Steps, and what is due between them, until the last step, a signal or an early stop.

    Raises:
        UserError: the GPU is out of memory, or the run has diverged.
    """
    resumed_at = state.step
    state.clock.start(state.seconds, state.first_steps)
    state.stop = rt.stop_requested()  # a signal may have come during the setup
    launched: deque[Launched] = deque()
    while not between_steps(state, config, rt, log, resumed_at):
        try:
            launched.append(train_step(state, config, rt))
        except torch.OutOfMemoryError:
            checkpointing = config.system.activation_checkpointing == "True"
            raise UserError(out_of_memory(state.plan, checkpointing)) from None
        # The loss of a step is read after the next is launched: a GPU that waited would idle 4 %.
        while launched and (len(launched) > rt.steps_ahead or needs_sync(state, config)):
            log_step(launched.popleft(), state, config, rt, log)
    check_end(state, config, rt, log, resumed_at)
    if rt.is_main:
        conclude(state, config, resumed_at, early_stopped(state, config))


def between_steps(
    state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog, resumed_at: int
) -> bool:
    """Saves, evaluates and exports where that is due; True when the run is at its end.

    The checkpoint comes before the evaluation, so that a crash in the evaluation costs nothing. An
    evaluation may end the run, by its loss or by a signal; a last checkpoint then follows.
    """
    last, ends = state.is_complete(config.optim), is_over(state, config)
    save_due = ends or due(state.step, config.output.save_every)
    is_new = state.step > resumed_at  # else the checkpoint is there already
    with state.clock.pause():
        if save_due and is_new:
            save_checkpoint(state, config, rt, final=ends)
        evaluate_where_due(state, config, rt, log, last)
        if not ends and is_over(state, config):
            ends = save_due = True
            if is_new:
                save_checkpoint(state, config, rt, final=True)
        if save_due and state.step:  # before the first step there is nothing to keep
            export_model(state, config, rt, MODEL_NAME, final=ends)
    return ends


def evaluate_where_due(
    state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog, last: bool
) -> None:
    """Computes validation loss and HellaSwag where due; skips both after a signal.

    A result that this step already has is not computed again.
    """
    hellaswag_every = config.eval.eval_hellaswag_every
    hellaswag_due = (last and hellaswag_every > 0) or due(state.step, hellaswag_every)
    eval_due = last or due(state.step, config.eval.eval_every)
    if eval_due and not state.stop and state.evaluated_at != state.step:
        validate(state, config, rt, log)
    if hellaswag_due and not state.stop and state.hellaswag_at != state.step:
        evaluate_hellaswag(state, rt, log)


def due(step: int, every: int) -> bool:
    """True if `step` is a multiple of `every`, and neither is 0: `every` 0 means never."""
    return every > 0 and step > 0 and step % every == 0


def is_over(state: TrainState, config: TrainConfig) -> bool:
    """Whether no step follows."""
    return state.is_complete(config.optim) or state.stop or early_stopped(state, config)


def needs_sync(state: TrainState, config: TrainConfig) -> bool:
    """True if a save, an evaluation or the end comes next: pending losses must be read first."""
    every = (config.output.save_every, config.eval.eval_every, config.eval.eval_hellaswag_every)
    return is_over(state, config) or any(due(state.step, n) for n in every)


def early_stopped(state: TrainState, config: TrainConfig) -> bool:
    """Whether `early_stop_evals` evaluations in a row brought no gain."""
    return 0 < config.eval.early_stop_evals <= state.evals_without_gain


def log_step(
    launched: Launched, state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog
) -> None:
    """Waits for a step's loss, gradient norm and stop flags, acts on them and logs them."""
    loss, norm, stops, no_time = launched.read()
    rt.reached(launched.step)
    state.skipped = 0 if math.isfinite(loss + norm) else state.skipped + 1
    if state.skipped >= MAX_SKIPPED_STEPS:
        give_up(launched, state, config, rt, log)
    state.stop = state.stop or stops > 0
    state.time_was_up = config.optim.max_seconds if no_time else state.time_was_up
    state.clock.step(launched.own_tokens, launched.numbers.finished_at())
    state.seconds, state.first_steps = state.clock.seconds(), state.clock.first_steps
    if launched.step == 1:
        chat = learns_conversations(config)
        check_first_loss(loss, launched.own_tokens, state, rt, config.model.init, chat)
    last = launched.step == config.optim.max_steps or state.stop or no_time > 0
    if due(launched.step, config.output.log_every) or last:
        values = {"loss": loss, "lr": launched.lr, "grad_norm": norm, "tokens": launched.tokens}
        log_training_step(launched.step, values, state, config, rt, log)
