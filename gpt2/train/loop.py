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
from ..data.datasets import split_eval_tokens
from ..data.loader import eval_batches
from ..distributed import runtime
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..evaluate.loss import evaluate, together
from ..evaluate.tasks import HELLASWAG
from ..report import console, metrics
from .messages import (
    announce,
    check_first_loss,
    log_evaluation,
    log_hellaswag,
    log_training_step,
    note_batch,
    out_of_memory,
)
from .resume import archive_previous_run, find_checkpoint, restore_logged_evaluation
from .run_folder import MODEL_NAME, open_log, out_dir, run_folder_lock
from .save import export, export_best, save
from .setup import build, resolve_init, resolve_steps
from .state import TrainState
from .step import Launched, train_step

MAX_SKIPPED_STEPS = 20  # in a row; fp16 needs a few at the start to find its scale


def run(config: TrainConfig) -> int:
    """Trains, or continues, the run in `config.output.out_dir`.

    Returns:
        Exit code: 0 when finished, 128 + signal when a signal asked to stop (all is saved).

    Raises:
        UserError: anything that a person can correct; whatever had been saved is still there.
    """
    with runtime.start(config.system, console.error) as rt, run_folder_lock(config, rt):
        resumed = find_checkpoint(config, rt)
        config, init = resolve_init(config, rt, resumed)
        state = build(config, rt, resumed, init)
        config = resolve_steps(config, state)
        try:
            archive_previous_run(config, rt, resumed)
            with state.saver, open_log(config, rt, resumed) as log:
                announce(state, config, rt, resumed)
                restore_logged_evaluation(state, config, rt, log, resumed)
                loop(state, config, rt, log)
        finally:
            state.loader.close()
        if not state.stop or state.step >= config.optim.max_steps:
            return 0
        return 128 + (rt.stop_signal or signal.SIGTERM)  # another rank may have got the signal


def loop(state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog):
    """Steps, and what is due between them, until the last step, a signal or an early stop."""
    resumed_at, max_steps = state.step, config.optim.max_steps
    state.clock.start(state.seconds)
    state.stop = rt.stop_requested()  # while the data were opened and the model was made
    launched: deque[Launched] = deque()
    while not between_steps(state, config, rt, log, resumed_at):
        try:
            launched.append(train_step(state, config, rt))
        except torch.OutOfMemoryError:
            checkpointing = config.system.activation_checkpointing
            raise UserError(out_of_memory(state.plan, checkpointing)) from None
        # A GPU that had to wait for each step's loss to be read would idle 4 % of the time.
        while launched and (len(launched) > rt.steps_ahead or needs_sync(state, config)):
            log_step(launched.popleft(), state, config, rt, log)
    if rt.is_main:
        if early_stopped(state, config):
            console.log(f"no gain in {state.evals_without_gain} evaluations: stopping early")
        verb = "stopped" if state.step < max_steps else "finished"
        console.log(f"{verb} at step {state.step}; the model is {out_dir(config) / MODEL_NAME}")


def between_steps(
    state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog, resumed_at: int
) -> bool:
    """Saves, evaluates and exports where that is due; True when the run is at its end."""
    last = state.step >= config.optim.max_steps
    ends = is_over(state, config)
    save_due = ends or due(state.step, config.output.save_every)
    eval_due = last or due(state.step, config.eval.eval_every)
    hellaswag_every = config.eval.eval_hellaswag_every
    hellaswag_due = (last and hellaswag_every > 0) or due(state.step, hellaswag_every)
    with state.clock.pause():
        if save_due and state.step > resumed_at:
            save(state, config, rt, ends)  # before evaluating: a crash there costs nothing
        if eval_due and not state.stop and state.evaluated_at != state.step:
            validate(state, config, rt, log)
        if hellaswag_due and not state.stop and state.hellaswag_at != state.step:
            evaluate_hellaswag(state, rt, log)
        if not ends and is_over(state, config):  # since a moment ago
            return between_steps(state, config, rt, log, resumed_at)
        if save_due:
            export(state, config, rt, ends)
    return ends


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every > 0 and step > 0 and step % every == 0


def is_over(state: TrainState, config: TrainConfig) -> bool:
    """Whether no step follows."""
    return state.step >= config.optim.max_steps or state.stop or early_stopped(state, config)


def needs_sync(state: TrainState, config: TrainConfig) -> bool:
    """Whether something is due between the last step and the next, which needs all numbers."""
    every = (config.output.save_every, config.eval.eval_every, config.eval.eval_hellaswag_every)
    return is_over(state, config) or any(due(state.step, n) for n in every)


def early_stopped(state: TrainState, config: TrainConfig) -> bool:
    """Whether so many evaluations brought no gain that it is time to stop."""
    return 0 < config.eval.early_stop_evals <= state.evals_without_gain


def log_step(
    launched: Launched, state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog
):
    """Waits for a step's numbers, acts on them and logs them."""
    loss, norm, stops = launched.read()
    rt.reached(launched.step)
    count_skipped(state, config, rt, launched, math.isfinite(loss + norm))
    state.stop = state.stop or stops > 0
    state.clock.step(launched.own_tokens)
    if launched.step == 1:
        check_first_loss(loss, state, rt, config.model.init)
    last = launched.step == config.optim.max_steps or state.stop
    if due(launched.step, config.output.log_every) or last:
        values = {"loss": loss, "lr": launched.lr, "grad_norm": norm, "tokens": launched.tokens}
        log_training_step(launched.step, values, state, config, rt, log)


def count_skipped(
    state: TrainState, config: TrainConfig, rt: Runtime, launched: Launched, finite: bool
):
    """Counts steps in a row that changed nothing; raises UserError, with their text, after many."""
    state.skipped = 0 if finite else state.skipped + 1
    if state.skipped >= MAX_SKIPPED_STEPS:
        own = launched.own_tokens
        batch = rt.on_main(lambda: note_batch(state, config, launched.tokens - own, own))
        raise UserError(
            f"the loss or the gradient was NaN or infinite in {state.skipped} steps in a row, up "
            f"to step {launched.step}, which read {batch}; the checkpoints are untouched: continue "
            "with a lower --learning_rate, or with --dtype=float32"
        )


def validate(state: TrainState, config: TrainConfig, rt: Runtime, log: metrics.RunLog):
    """Evaluates, logs and keeps the best model; a signal on the way leaves it for the next run."""
    parts = {}
    counts = split_eval_tokens(state.datasets, config.eval.eval_tokens)
    for dataset, eval_tokens in zip(state.datasets, counts, strict=True):
        batches = eval_batches(
            dataset.val,
            block_size=state.plan.block_size,
            batch_size=state.plan.batch_size,
            eval_tokens=eval_tokens,
            rank=rt.rank,
            world_size=rt.world_size,
            device=rt.device,
        )
        result = evaluate(state.model, batches, rt)
        if result is None:
            state.stop = True
            return
        parts[dataset.name] = result
    if state.note_evaluation(together(parts.values()).loss):
        export_best(state, config, rt)
    log_evaluation(parts, state, rt, log)


def evaluate_hellaswag(state: TrainState, rt: Runtime, log: metrics.RunLog):
    """Evaluates on HellaSwag and logs; a signal on the way leaves it for the next run."""
    results = HELLASWAG.ask(state.model, state.hellaswag, rt)
    if results is None:
        state.stop = True
        return
    state.hellaswag_at = state.step
    log_hellaswag(results, state, rt, log)
