"""Console lines and log entries of a training run: before the first step, and for each step."""

import contextlib
import math
import signal
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from ..checkpoint.training_state import Resumed
from ..config.earlier import comparable, current_names
from ..config.options import flatten
from ..config.registry import plugins, registered, warnings_of_changes
from ..config.run_paths import shortest
from ..config.train import BatchPlan, OptimOptions, TrainConfig, warmup_steps
from ..data.datasets import (
    split_eval_tokens,
    training_fingerprint,
    validation_fingerprint,
    what_is_missing,
)
from ..distributed.devices import wait_for
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..evaluate.loss import Evaluation, combine
from ..paths import for_shell
from ..report import console, metrics, throughput
from ..report.versions import warn_of_newer_torch
from .run_folder import MODEL_NAME, is_on_record, out_dir
from .schedules import sequences_left
from .state import TrainState
from .tuning_plan import learns_conversations, note_few_steps
from .weight_average import EVERY

MANY_EPOCHS = 50
PLOT_SECONDS = 30  # a run that trained for so long draws its curves at the end
SHORTEST_FOR_EMA = 5  # times the steps of an average: so long a run should be
TOO_LONG = 2 * 86400  # seconds of a run that is warned of
LONGEST = 10**10  # seconds, three centuries: what a date can be
MAY_DIFFER = ("out_dir", "resume", "run_name")  # settings that do not change the run itself


def log_evaluation(
    parts: dict[str, Evaluation], state: TrainState, rt: Runtime, log: metrics.RunLog
) -> None:
    """One line on the console, one object in metrics.jsonl, over all datasets together."""
    result = combine(parts.values())
    several = parts if len(parts) > 1 else {}
    log.record(
        state.step,
        val_loss=result.loss,
        val_perplexity=result.perplexity,
        val_bpb=result.bits_per_byte,
        val_tokens=result.tokens,
        **{f"val_loss_{name}": part.loss for name, part in several.items()},
        tokens=state.tokens,
    )
    if rt.is_main:
        line = console.eval_line(
            state.step, result.loss, result.perplexity, result.bits_per_byte, result.tokens
        )
        each = "".join(f" | {name} {part.loss:.4f}" for name, part in several.items())
        console.log(line + each)


def log_hellaswag(
    results: dict[str, float], state: TrainState, rt: Runtime, log: metrics.RunLog
) -> None:
    """One line on the console, one object in metrics.jsonl, for HellaSwag."""
    log.record(state.step, **results, tokens=state.tokens)
    if rt.is_main:
        console.log(
            f"step {state.step:,} | HellaSwag acc_norm {results['hellaswag_acc_norm']:.4f} "
            f"| acc {results['hellaswag_acc']:.4f} | over {results['hellaswag_items']:,} items"
        )


def log_training_step(  # noqa: PLR0917
    step: int,
    values: dict,
    state: TrainState,
    config: TrainConfig,
    rt: Runtime,
    log: metrics.RunLog,
) -> None:
    """One line, one object in metrics.jsonl, for a step; with the tokens/s since the last line."""
    rate, _ = state.clock.lap()
    peak = throughput.peak_flops(rt.device_name, str(rt.dtype).removeprefix("torch."))
    achieved = rate * state.model.flops_per_token()
    values |= {
        "tokens_per_second": rate,
        "mfu": achieved / (peak * rt.world_size) if peak else None,
        "seconds": state.seconds,
        "peak_gib": rt.peak_gib(),
    }
    if limit := config.optim.max_seconds:
        values |= {"counted_seconds": state.clock.counted(), "time_was_up": state.time_was_up}
    log.record(step, **values)
    steps = config.optim.max_steps
    last = step == steps or state.stop or state.is_complete(config.optim)
    if rt.is_main and (state.progress.line_due() or last):
        sequences = sequences_left(step, config.optim, state.plan)
        left = state.clock.seconds_left(sequences * state.plan.block_size)
        left = min(left, max(0.0, limit - state.clock.counted())) if left and limit else left
        line = {"step": step} | values
        console.log(console.console_line(line, max_steps=steps, seconds_left=left))


def announce(
    state: TrainState,
    config: TrainConfig,
    rt: Runtime,
    resumed: Resumed | None,
    log: metrics.RunLog,
) -> None:
    """Logs the network, the device, the batch and the data of the run, before its first step.

    What `gpt2 compare` must know goes to history.jsonl: the options that changed since the
    checkpoint, the vocabulary, and a fingerprint of the validation tokens.
    """
    if not rt.is_main:
        return
    changed = changed_options(config, resumed) | changed_step(state.plan, resumed)
    if not is_on_record(config, resumed):  # else no step is made with these options
        record_start(state, rt, changed, log)
    warn_of_newer_torch()
    c = state.model.config
    console.log(
        f"GPT-2 with {state.model.num_parameters():,} parameters: {c.n_layer} layers, "
        f"{c.n_head} heads, width {c.n_embd}, context {c.block_size}"
    )
    for note in (*rt.choices, *state.notes):
        console.log(note)
    console.log(str(state.plan))
    for line in describe_data(state, config.optim):
        console.log(line)
    asked = config.eval.eval_tokens
    have = split_eval_tokens(state.datasets, asked)
    missing = what_is_missing(state.datasets, have, asked)
    console.log(f"validation on {sum(have):,} tokens{missing}")
    note_schedule(config.optim)
    epochs = most_epochs(state, config.optim)
    if few := note_few_steps(config, state.plan, epochs):
        console.warn(few)
    if epochs > MANY_EPOCHS:
        console.warn(
            f"the run reads its text {epochs:,.0f} times, so the model will learn it by heart; "
            f"--max_steps={max(1, round(config.optim.max_steps * 10 / epochs))} reads it 10 times"
        )
    if resumed:
        note_resumed(resumed, changed)


def note_resumed(resumed: Resumed, changed: dict[str, tuple[Any, Any]]) -> None:
    """Logs the checkpoint, and what has changed since."""
    console.log(f"continuing from {resumed.path}")
    for warning in warnings_of_changes(resumed.plugins, resumed.path):
        console.warn(warning)
    for name, (before, now) in changed.items():
        console.log(f"changed since then: {name} {before} -> {now}")


def record_start(
    state: TrainState, rt: Runtime, changed: dict[str, tuple[Any, Any]], log: metrics.RunLog
) -> None:
    """A line of history.jsonl."""
    parts = [(d.share, d.identity) for d in state.datasets]
    log.started(
        state.step,
        changed={name: [_for_json(value) for value in pair] for name, pair in changed.items()},
        validation=validation_fingerprint(parts),
        training=training_fingerprint(parts),
        vocab_size=state.model.config.vocab_size,
        plugins=plugins() or None,
        device=rt.device_name,
    )


def _for_json(value: Any) -> Any:
    """An option's value; infinity and NaN as text, since JSON has neither."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def note_schedule(optim: OptimOptions) -> None:
    """Logs that weights are averaged; warns of a warm-up or an average too long for the run."""
    steps, warmup, ema = optim.max_steps, warmup_steps(optim), optim.ema_steps
    if warmup > steps > 1 and not registered("schedule", optim.schedule):
        console.warn(
            f"the learning rate never comes to its peak: it rises for {warmup:,} steps of a run of "
            f"{steps:,}; use --warmup_steps={steps // 20}"
        )
    if ema:
        console.log(f"validation and the exported model: weights averaged over about {ema:,} steps")
    if ema * SHORTEST_FOR_EMA > steps:
        fits = steps // SHORTEST_FOR_EMA
        # an average over fewer steps than lie between two of its updates is none
        way = f"{fits}, 0 for none" if fits >= EVERY else "0, or leave it out"
        console.warn(
            f"averages over {ema:,} of {steps:,} steps hold weights from long before; use "
            f"--ema_steps={way}"
        )


def changed_options(config: TrainConfig, resumed: Resumed | None) -> dict[str, tuple[Any, Any]]:
    """Options that differ from those of the checkpoint: name -> (before, now)."""
    if not resumed:
        return {}
    # an option that is younger than the checkpoint had its default
    stored = flatten(TrainConfig()) | current_names(resumed.state["settings"])
    before, now = (comparable(shortest(settings)) for settings in (stored, flatten(config)))
    names = [name for name in now if name not in MAY_DIFFER and before.get(name) != now[name]]
    return {name: (before.get(name), now[name]) for name in names}


def changed_step(plan: BatchPlan, resumed: Resumed | None) -> dict[str, tuple[int, int]]:
    """The tokens of a step where they differ from the checkpoint's, as by the number of ranks."""
    now = plan.tokens_per_step
    before = resumed.state.get("tokens_per_step", now) if resumed else now  # older ones lack it
    return {"tokens per step": (before, now)} if before != now else {}


def conclude(state: TrainState, config: TrainConfig, resumed_at: int, early: bool) -> None:
    """The last lines of a run: where the model is, and what can be done with it.

    Args:
        state: of the run.
        config: its settings.
        resumed_at: the step that this process began at.
        early: whether it stopped because evaluations brought no gain.
    """
    steps, limit, folder = config.optim.max_steps, config.optim.max_seconds, out_dir(config)
    complete = state.is_complete(config.optim)
    model = folder / MODEL_NAME
    if early:
        console.log(f"no gain in {state.evals_without_gain} evaluations: stopping early")
    if complete and state.step == resumed_at:
        more = "--max_steps=" if state.step >= steps else "--max_seconds="
        console.log(
            f"already finished at step {state.step}; the model is {model}; a larger {more} "
            "continues, another --out_dir= begins a new run"
        )
        return
    if complete and state.step < steps:
        console.log(
            f"--max_seconds={limit:g} are over after {state.step:,} of {steps:,} steps: the "
            "learning rate did not come to the end of its schedule"
        )
    if not state.step:
        console.log("stopped before the first step; nothing is saved, the same command begins anew")
        return
    verb = "finished" if complete else "stopped"
    console.log(f"{verb} at step {state.step}; the model is {model}")
    if state.stop and not complete:
        console.log("the same command continues")
        return
    if state.seconds >= PLOT_SECONDS:
        try:
            from ..report.plot import plot_run  # imports matplotlib

            console.log(f"curves: {plot_run(folder)}")
        except UserError as error:
            console.warn(f"no curves: {error}")
    chat = learns_conversations(config)
    run, ckpt, plugin = for_shell(folder), for_shell(model), config.system.plugin
    ckpt += f" {for_shell(f'--plugin={plugin}')}" if plugin else ""  # which the model needs
    use = f"gpt2 chat {ckpt}" if chat else f'gpt2 sample {ckpt} --prompt="Hello world,"'
    console.log(f"next: gpt2 plot {run}, {use}, gpt2 eval {ckpt}")


@contextlib.contextmanager
def watched(state: TrainState, config: TrainConfig, rt: Runtime) -> Iterator[None]:
    """Around the loop: rank 0 says how long a step and the run take, and how far a step is."""
    if not rt.is_main:
        yield
        return
    compiled = rt.device.type == "cuda" or config.system.compile_model == "True"
    epochs = most_epochs(state, config.optim)  # later, the loader is ahead of the steps
    with state.progress.running(
        tell=lambda seconds: announce_time(seconds, state, config, rt, epochs),
        wait=lambda: wait_for(rt.device),
        warm_up=2 if compiled else 0,
    ):
        yield


def announce_time(
    seconds: float, state: TrainState, config: TrainConfig, rt: Runtime, epochs: float
) -> None:
    """One line: seconds of a step, the time until the end, and epochs; warns of a very long run.

    Args:
        seconds: of a micro-batch, forward and backward.
        state: of the run.
        config: its settings.
        rt: this process.
        epochs: of the whole run.
    """
    plan, optim, tokens = state.plan, config.optim, config.eval.eval_tokens
    per_micro = plan.batch_size * rt.world_size  # sequences
    training = seconds * sequences_left(state.step, optim, plan) / per_micro
    every = config.eval.eval_every
    times = max(1, optim.max_steps // every - state.step // every if every else 1)
    held_out = sum(split_eval_tokens(state.datasets, tokens))
    # a forward pass takes a third of forward and backward (Kaplan et al. 2020, section 2.1)
    evaluation = times * seconds / 3 * held_out / (per_micro * plan.block_size)
    if limit := optim.max_seconds:
        training = min(training, max(0.0, limit - state.clock.counted()))
    whole = training + evaluation
    until = datetime.now() + timedelta(seconds=min(whole, LONGEST))
    share = f", of which evaluations {console.in_words(evaluation)}" * (evaluation > whole / 20)
    console.log(
        f"about {console.in_words(seconds * plan.grad_accum_steps)} a step, "
        f"{console.in_words(whole)} in all (until {until:%d %b %Y %H:%M}){share}; "
        f"{epochs:,.1f} epochs"
    )
    if whole > TOO_LONG:
        console.warn(
            f"{console.in_words(whole)} is long: fewer --max_steps=, a smaller --size=, "
            "--block_size= or --total_batch_tokens= shorten the run; --config=configs/laptop.toml "
            "takes minutes (docs/troubleshooting.md#slow-on-a-cpu)"
        )


def most_epochs(state: TrainState, options: OptimOptions) -> float:
    """How often the whole run reads the dataset that it reads most often; asked between steps."""
    planned = planned_sequences(state, options)
    orders = zip(state.datasets, state.loader.order.orders, strict=True)
    return max(planned * dataset.share / order.per_epoch for dataset, order in orders)


def planned_sequences(state: TrainState, options: OptimOptions) -> int:
    """Sequences that the whole run reads; a step before a resume may have had more or fewer."""
    left = sequences_left(state.step, options, state.plan)
    return state.loader.position + max(0, left)


def answer_signal(number: int) -> None:
    """What a run says to the first signal, while it may still compute for a while."""
    again = "; Ctrl-C again ends now" if number == signal.SIGINT else ""
    console.warn(f"{signal.Signals(number).name}: stopping after this step, and saving{again}")


def describe_data(state: TrainState, options: OptimOptions) -> list[str]:
    """One line for each dataset: its share, its tokens, and how many epochs the run makes."""
    lines = []
    planned = planned_sequences(state, options)
    for dataset, order in zip(state.datasets, state.loader.order.orders, strict=True):
        share = f"{dataset.name}: {dataset.share:.1%} of the tokens; " if dataset.share < 1 else ""
        held = sum(shard.tokens for shard in dataset.train)
        longer = ""
        if order.sequence_start == "document":
            times = order.tokens_per_epoch / held
            longer = f" ({times:.2f} times those of the shards: sequences begin with documents)"
        lines.append(
            f"{share}{order.tokens_per_epoch:,} training tokens per epoch{longer}; "
            f"{options.max_steps} steps are {planned * dataset.share / order.per_epoch:.2f} epochs"
        )
    return lines


def out_of_memory(plan: BatchPlan, checkpointing: bool = False) -> str:
    """The message for a GPU that is out of memory: smaller micro-batches, equal tokens per step."""
    now = plan.batch_size
    smaller = max((n for n in range(1, now) if now % n == 0), default=0)
    if not smaller:
        less = "" if checkpointing else "--activation_checkpointing=True, or "
        return (
            f"out of GPU memory with batch_size=1; use {less}a smaller --block_size= or --size= "
            "(docs/troubleshooting.md#out-of-gpu-memory)"
        )
    accum = plan.grad_accum_steps * now // smaller
    return (
        f"out of GPU memory with batch_size={now}; use --batch_size={smaller} "
        f"--grad_accum_steps={accum}: the same {plan.tokens_per_step:,} tokens per step "
        "(docs/troubleshooting.md#out-of-gpu-memory)"
    )
