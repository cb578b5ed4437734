"""The training loop.

One optimizer step is `train_step`; what happens between steps is in `loop`. Which device, how many
ranks and which precision is the business of `runtime.py`; what a checkpoint holds that of
`state.py`; what is said on the way that of `messages.py`.
"""

import functools
import math
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checkpoint, devices, lora, parallel, report, runtime
from .begin import (
    adopt_evaluation,
    find_checkpoint,
    make_way,
    open_log,
    order_data,
    reserved,
    settle_init,
    settle_steps,
)
from .checkpoint import Resumed
from .config import TrainConfig, UserError, plan_batch
from .data import Batch, TrainLoader, eval_batches
from .datasets import split_eval_tokens
from .evaluate import evaluate, together
from .messages import (
    announce,
    check_first_loss,
    log_evaluation,
    log_hellaswag,
    log_step,
    note_batch,
    out_of_memory,
)
from .micro_batch import MicroBatches
from .modern import network
from .ops import IGNORE
from .optim import build_optimizer, check_plan, clip_gradients, set_rates
from .packed import Packed, packed
from .runtime import Runtime
from .sinks import check_names
from .state import MODEL_NAME, TrainState, begin_step, export, export_best, out_dir, restore, save
from .tasks import HELLASWAG, load
from .weights import Weights

MAX_SKIPPED_STEPS = 20  # in a row; fp16 needs a few at the start to find its scale


def run(config: TrainConfig) -> int:
    """Trains, or continues, the run in `config.output.out_dir`.

    Returns:
        Exit code: 0 when finished, 128 + signal when a signal asked to stop (all is saved).

    Raises:
        UserError: anything that a person can correct; whatever had been saved is still there.
    """
    with runtime.start(config.system, report.error) as rt, reserved(config, rt):
        resumed = find_checkpoint(config, rt)
        config, init = settle_init(config, rt, resumed)
        state = build(config, rt, resumed, init)
        config = settle_steps(config, state)
        try:
            make_way(config, rt, resumed)
            with state.saver, open_log(config, rt, resumed) as log:
                announce(state, config, rt, resumed)
                adopt_evaluation(state, config, rt, log, resumed)
                loop(state, config, rt, log)
        finally:
            state.loader.close()
        if not state.stop or state.step >= config.optim.max_steps:
            return 0
        return 128 + (rt.stop_signal or signal.SIGTERM)  # another rank may have got the signal


def loop(state: TrainState, config: TrainConfig, rt: Runtime, log: report.RunLog):
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
        while launched and (len(launched) > rt.steps_ahead or stands_still(state, config)):
            note_step(launched.popleft(), state, config, rt, log)
    if rt.is_main:
        if out_of_patience(state, config):
            report.say(f"no gain in {state.evals_without_gain} evaluations: stopping early")
        verb = "stopped" if state.step < max_steps else "finished"
        report.say(f"{verb} at step {state.step}; the model is {out_dir(config) / MODEL_NAME}")


def between_steps(
    state: TrainState, config: TrainConfig, rt: Runtime, log: report.RunLog, resumed_at: int
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
    return state.step >= config.optim.max_steps or state.stop or out_of_patience(state, config)


def stands_still(state: TrainState, config: TrainConfig) -> bool:
    """Whether something is due between the last step and the next, which needs all numbers."""
    every = (config.output.save_every, config.eval.eval_every, config.eval.eval_hellaswag_every)
    return is_over(state, config) or any(due(state.step, n) for n in every)


def out_of_patience(state: TrainState, config: TrainConfig) -> bool:
    """Whether so many evaluations brought no gain that it is time to stop."""
    return 0 < config.eval.early_stop_evals <= state.evals_without_gain


@dataclass
class Launched:
    """A step that the device may still be working on."""

    step: int
    lr: float
    tokens: int  # trained on so far, this step included
    own_tokens: int  # of this step
    read: Callable[[], list[float]]  # waits; mean loss in nats, norm of the gradient, stops


def train_step(state: TrainState, config: TrainConfig, rt: Runtime) -> Launched:
    """One optimizer step over all micro-batches of all ranks; does not wait for the device.

    The loss is the sum over the step's valid tokens divided by their number over all ranks, so its
    gradient does not depend on how the step is cut into micro-batches and ranks.
    """
    lr = set_rates(state.optimizer, state.step, config.optim)
    before = state.tokens
    batches = next_batches(state, rt, begin_step(state, config))
    valid_tokens = rt.all_sum(sum((y != IGNORE).sum() for _, y, *_ in batches))
    loss_sum = torch.zeros((), device=rt.device)
    # DDP and FSDP take the mean over ranks of what should be a sum
    factor = state.scaler.scale(rt.world_size / valid_tokens)
    for micro, (x, y, *begins) in enumerate(batches):
        inside = packed(*begins, dropout=config.model.dropout)
        with rt.accumulate(state.forward, last=micro == len(batches) - 1):
            loss_sum += state.micro_batches(x, y, factor, inside, first=micro == 0)  # nats
    state.scaler.unscale_(state.optimizer)
    grad_norm = parallel.gradient_norm(state.model.parameters())
    if config.optim.grad_clip:
        inside = rt.device.type == "cuda" and not state.scaler.is_enabled()
        clip_gradients(state.optimizer, grad_norm, config.optim.grad_clip, inside)
    # one message for all that ranks must agree on, copied while the weights change
    parts = [loss_sum / valid_tokens, grad_norm / rt.world_size, rt.stop_flag()]
    parts = rt.all_sum(torch.stack(parts))
    read = rt.read_later(parts)
    _update(state, skip=~parts[:2].isfinite().all())
    state.step += 1
    return Launched(state.step, lr, state.tokens, state.tokens - before, read)


def note_step(
    launched: Launched, state: TrainState, config: TrainConfig, rt: Runtime, log: report.RunLog
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
        log_step(launched.step, values, state, config, rt, log)


def next_batches(state: TrainState, rt: Runtime, count: int) -> list[Batch]:
    """The step's micro-batches; a damaged shard is named by the rank that meets it."""
    try:
        return state.loader.next_step(count)
    except UserError as error:
        if not rt.is_main:  # rank 0's errors are told by the command line
            report.error(f"[rank {rt.rank}] {error}")
        raise


def _update(state: TrainState, skip: Tensor):
    """Changes the weights, unless `skip` (on the device): the gradient holds NaN or infinity."""
    if not state.scaler.is_enabled():  # the scaler skips by itself, and lowers its scale
        state.optimizer.found_inf = skip.float()  # what fused optimizers look at, without a wait
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)


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


def build(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None, init: Weights | None = None
) -> TrainState:
    """Model, optimizer and loader, fresh or as a checkpoint left them; checks all that can be."""
    shape = config.model.shape()
    plan = plan_batch(config.data, shape.block_size, rt.world_size)
    check_plan(resumed.step if resumed else 0, config.optim, plan)
    datasets, mixture = order_data(config, rt, resumed)
    check_names(config.output.log_to)
    hellaswag = []
    if config.eval.eval_hellaswag_every:  # broadcast: other machines may lack the file
        hellaswag = rt.on_main(lambda: load(HELLASWAG, config.eval.hellaswag, report.say))
    model = network(shape)  # on the CPU: the same weights on every device
    if init:
        checkpoint.load_into(model, init.state, init.origin)
    lora.adapt(model, config.tuning)
    rt.place(model)
    model.fp8_head = devices.allow_fp8(config.system.fp8, rt.device, rt.dtype)
    model.checkpoint_activations = config.system.activation_checkpointing
    compiled, reason = devices.choose_compile(config.system.compile_model, rt.device)
    if compiled:
        rt.compile(model)
    rt.notes.append(f"compile_model {compiled}: {reason}")
    runtime.seed(config.system.seed + rt.rank)  # from here on only dropout draws
    loader = TrainLoader(
        mixture,
        plan,
        rank=rt.rank,
        position=resumed.state["position"] if resumed else 0,
        device=rt.device,
    )
    state = TrainState(
        model=model,
        forward=model,
        optimizer=build_optimizer(model, config.optim, rt),
        scaler=rt.grad_scaler(),
        loader=loader,
        datasets=datasets,
        plan=plan,
        clock=report.Throughput(),
        hellaswag=hellaswag,
    )
    if resumed:
        restore(state, resumed, rt)
    state.forward = rt.wrap(model)
    state.micro_batches = micro_batches(state, rt, compiled)
    return state


def micro_batches(state: TrainState, rt: Runtime, compiled: bool) -> MicroBatches:
    """Runs `forward_backward`, as a CUDA graph where that is chosen."""
    graph, reason = devices.choose_graph(rt.device, compiled, rt.world_size)
    if rt.device.type == "cuda":
        rt.notes.append(f"CUDA graph {graph}: {reason}")
    run = functools.partial(forward_backward, state, rt)
    return MicroBatches(state.model, run, graph, report.warn)


def forward_backward(  # noqa: PLR0917 - the last four are `micro_batch.Run`'s
    state: TrainState, rt: Runtime, x: Tensor, y: Tensor, factor: Tensor, inside: Packed | None
) -> Tensor:
    """The loss of a micro-batch, summed over its tokens; the gradient of its `factor`-fold."""
    with rt.autocast():
        loss = state.forward(x, y, reduction="sum", cache=inside)
    (loss * factor).backward()
    return loss.detach()


def validate(state: TrainState, config: TrainConfig, rt: Runtime, log: report.RunLog):
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


def evaluate_hellaswag(state: TrainState, rt: Runtime, log: report.RunLog):
    """Evaluates on HellaSwag and logs; a signal on the way leaves it for the next run."""
    results = HELLASWAG.ask(state.model, state.hellaswag, rt)
    if results is None:
        state.stop = True
        return
    state.hellaswag_at = state.step
    log_hellaswag(results, state, rt, log)
