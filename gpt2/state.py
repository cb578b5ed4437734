"""The state of a training run, and its way to disk and back.

What a checkpoint must hold for the run to go on bit for bit: weights, optimizer, scaler, position
in the data, and the random generators of every rank.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, lora, report, rundir, weights
from .checkpoint import Resumed
from .config import (
    BatchPlan,
    GPT2Config,
    ModelOptions,
    TrainConfig,
    UserError,
    flatten,
    to_dict,
)
from .conversations import check_eval_tokens, is_chat, open_conversations
from .data import TrainLoader
from .datasets import (
    Dataset,
    MixStart,
    build_mixture,
    continue_mix,
    identify,
    open_datasets,
    remember,
)
from .model import GPT
from .optim import check_groups, micro_batches_at, window_at
from .order import Mixture
from .runtime import Runtime
from .switches import defaults, switched
from .tasks import Choice
from .weights import Weights

MODEL_NAME, BEST_NAME = "out_ckpt.pt", "best_ckpt.pt"
COUNTERS = (  # fields of TrainState that a checkpoint holds as they are
    *("seconds", "skipped", "val_loss", "best_val_loss"),
    *("evals_without_gain", "evaluated_at"),
)


@dataclass
class TrainState:
    """All that changes while training."""

    model: GPT
    forward: Callable[..., Tensor]  # the model, or DDP around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: TrainLoader
    datasets: list[Dataset]
    plan: BatchPlan
    clock: report.Throughput
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training before this process
    skipped: int = 0  # steps in a row whose gradient was not finite
    val_loss: float | None = None
    best_val_loss: float = math.inf
    evals_without_gain: int = 0
    evaluated_at: int = -1  # the step of the last evaluation
    stop: bool = False  # agreed by all ranks
    hellaswag: list[Choice] = field(default_factory=list)  # items, if it is evaluated
    hellaswag_at: int = -1  # the step of its last evaluation

    @property
    def tokens(self) -> int:
        """Tokens that all ranks have trained on, whatever the batch was at each step."""
        return self.loader.position * self.plan.block_size

    def note_evaluation(self, loss: float) -> bool:
        """Takes down a validation loss of this step; True when it is the best so far."""
        improved = loss < self.best_val_loss
        self.val_loss, self.evaluated_at = loss, self.step
        self.best_val_loss = loss if improved else self.best_val_loss
        self.evals_without_gain = 0 if improved else self.evals_without_gain + 1
        return improved


def begin_step(state: TrainState, config: TrainConfig) -> int:
    """Grows the windows while `window_warmup` lasts; the micro-batches of the step."""
    if config.optim.window_warmup:
        state.model.limit_windows(window_at(state.step, config.optim, state.plan.block_size))
    return micro_batches_at(state.step, config.optim, state.plan)


def find_checkpoint(config: TrainConfig, rt: Runtime) -> Resumed | None:
    """The state to continue from, or None for a new run; changes nothing but our leftovers."""
    kept: list[Resumed] = []  # what rank 0 has read need not be read twice

    def look() -> str | None:
        out = out_dir(config)
        rundir.check_writable(out)
        with _as_user_error():
            rundir.clean(out)
        found, damaged = checkpoint.find_state(out, config.output.resume)
        for line in damaged:
            report.warn(f"{line}; using an older checkpoint")
        if found:
            check_same_run(found, config.model)
            kept.append(found)
        return str(found.path) if found else None

    path = rt.on_main(look)
    if not path:
        return None
    return kept[0] if kept else checkpoint.load_state(Path(path))


def settle_init(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None
) -> tuple[TrainConfig, Weights | None]:
    """The settings with the sizes of the weights that `--init` names, and these weights.

    A run that goes on does not read them again. They are loaded on rank 0 only: DDP gives its
    weights to the other ranks.

    Raises:
        UserError: no such weights, or options that contradict them.
    """
    options = config.model
    if not options.init:
        return config, None
    loaded: list[Weights] = []

    def look() -> GPT2Config:
        found = weights.load(options.init)
        settled = weights.settle(options, found.config)
        found = weights.for_training(found, settled.block_size)
        report.say(f"beginning with {found.origin}")
        for note in found.notes:
            report.say(note)
        loaded.append(found)
        return found.config

    shape = resumed.config if resumed else rt.on_main(look)
    return replace(config, model=weights.settle(options, shape)), next(iter(loaded), None)


def make_way(config: TrainConfig, rt: Runtime, resumed: Resumed | None):
    """Moves aside what an earlier run left beyond the state to continue from."""

    def move():
        out = out_dir(config)
        own = resumed and resumed.path.resolve().parent == (out / "state").resolve()
        back = config.output.resume not in ("auto", "never")
        with _as_user_error():
            moved = rundir.archive(out, resumed.step if own else -1, going_back=back)
        if moved:
            report.say(f"moved files of an earlier run to {moved}")

    rt.on_main(move)


@contextlib.contextmanager
def _as_user_error():
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror or error}") from None


def check_same_run(found: Resumed, options: ModelOptions):
    """Raises UserError when the checkpoint is of another network, or began with other weights."""
    began_with = found.state.get("settings", {}).get("init", "")
    if options.init and options.init != began_with:
        raise UserError(
            f"{found.path} is of a run that began with {began_with or 'fresh weights'}, not "
            f"init={options.init}; use another --out_dir, or --resume=never"
        )
    theirs = defaults() | to_dict(found.config)
    ours = defaults() | to_dict(options.shape())
    if options.init:  # the rest is that of the weights
        ours = options.given() | switched(options)
    ours.pop("dropout", None)  # may change between runs
    different = [f"{n} {ours[n]} instead of {theirs[n]}" for n in ours if ours[n] != theirs[n]]
    if different:
        raise UserError(
            f"{found.path} is of another network: you asked for {', '.join(different)}; "
            "use the same settings, another --out_dir, or --resume=never"
        )


def order_data(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None
) -> tuple[list[Dataset], Mixture]:
    """The datasets, and the order of their windows: from the beginning or as a checkpoint goes on.

    Raises:
        UserError: what is wrong with the datasets, or not as it was when the checkpoint was saved.
    """
    shape, seed = config.model.shape(), config.system.seed
    datasets = _open_data(config, shape.block_size, rt)
    identities = rt.on_main(lambda: [identify(dataset) for dataset in datasets])
    datasets = [replace(d, identity=i) for d, i in zip(datasets, identities, strict=True)]
    start = MixStart()
    if resumed and "data" in resumed.state:
        position = resumed.state["position"]
        stored = resumed.state["data"]
        datasets, start, notes = continue_mix(datasets, stored, position, resumed.path)
        rt.notes.extend(notes)
    elif resumed:
        rt.notes.append(
            f"{resumed.path} does not say which shards it was trained on: it is of an older "
            "version, whose order was another; what was read in this epoch may come again"
        )
    if config.data.window_start == "document" and rt.is_main:
        report.say("looking for the beginnings of documents in the training shards")
    return datasets, build_mixture(datasets, config.data, shape.block_size, seed, start)


def _open_data(config: TrainConfig, block_size: int, rt: Runtime) -> list[Dataset]:
    """Folders of shards or, for `gpt2 finetune`, files of conversations."""
    if config.tuning is None or not is_chat(config.data.data_dir):
        return open_datasets(config.data.data_dir)
    if config.data.window_start != "anywhere":
        raise UserError("--window_start=document is for text; conversations are always whole")
    if config.model.document_mask:
        raise UserError(
            f"init={config.model.init} has document_mask: the end-of-text tokens between messages "
            "would hide them from one another; begin with another model"
        )
    share = config.tuning.val_share
    datasets, notes = open_conversations(config.data.data_dir, block_size, share)
    check_eval_tokens(config.eval.eval_tokens, datasets, block_size)
    rt.notes.extend(notes)
    return datasets


def settle_steps(config: TrainConfig, state: TrainState) -> TrainConfig:
    """The settings with the steps that `--epochs=` takes, if these are fewer than max_steps."""
    if config.tuning is None:
        return config
    rows = sum(order.per_epoch for order in state.loader.order.orders)
    steps = max(1, math.ceil(config.tuning.epochs * rows / state.plan.sequences_per_step))
    max_steps = min(config.optim.max_steps, steps)
    return replace(config, optim=replace(config.optim, max_steps=max_steps))


def save(state: TrainState, config: TrainConfig, rt: Runtime, final: bool):
    """Commits a checkpoint to continue from; a failure only ends the run when it is the last."""
    content = {
        "position": state.loader.position,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "rng": rt.gather(rt.rng_state()),
        **{name: getattr(state, name) for name in COUNTERS},
        "data": remember(state.datasets, state.loader.order, state.loader.position),
        "settings": flatten(config),
    }
    keep = config.output.keep_last
    write(
        rt,
        lambda: checkpoint.save_state(out_dir(config), state.step, state.model, content, keep),
        final,
    )


def restore(state: TrainState, resumed: Resumed, rt: Runtime):
    """Puts back what `save` stored; the loader already stands at its position."""
    content = resumed.state
    check_groups(state.optimizer, content["optimizer"], resumed.path)
    checkpoint.load_into(state.model, resumed.model, resumed.path)
    options = [
        {k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups
    ]
    state.optimizer.load_state_dict(content["optimizer"])
    for group, asked in zip(state.optimizer.param_groups, options, strict=True):
        group.update(asked)  # only the moments come from the checkpoint: options may change
    if content["scaler"] and state.scaler.is_enabled():  # empty unless that run was fp16
        state.scaler.load_state_dict(content["scaler"])
    if rt.rank < len(content["rng"]):  # a new rank keeps the generators it was seeded with
        rt.set_rng_state(content["rng"][rt.rank])
    state.step = resumed.step
    for name in COUNTERS:
        setattr(state, name, content[name])


def export(state: TrainState, config: TrainConfig, rt: Runtime, final: bool):
    """Writes the model for use, `out_ckpt.pt`."""
    save_model(state, config, MODEL_NAME, rt, final)


def export_best(state: TrainState, config: TrainConfig, rt: Runtime):
    """Writes the model with the lowest validation loss so far, `best_ckpt.pt`."""
    save_model(state, config, BEST_NAME, rt, final=False)


def save_model(state: TrainState, config: TrainConfig, name: str, rt: Runtime, final: bool):
    """Writes the model with its step and validation loss; beside it an adapter, if it has one."""
    path = out_dir(config) / name
    write(rt, lambda: checkpoint.save_model(path, state.model, state.step, state.val_loss), final)
    if lora.is_adapted(state.model):
        folder = path.with_name(path.stem.replace("ckpt", "adapter"))
        write(rt, lambda: checkpoint.save_adapter(folder, state.model, config.model.init), final)


def write(rt: Runtime, function: Callable[[], Any], final: bool):
    """Writes on rank 0. A full disk is no reason to lose the run, unless it was the last chance."""
    try:
        rt.on_main(function)
    except UserError as error:
        if final:
            raise
        if rt.is_main:
            report.warn(f"{error}; training goes on, and what was saved before is kept")


def out_dir(config: TrainConfig) -> Path:
    """The run's folder."""
    return Path(config.output.out_dir)
