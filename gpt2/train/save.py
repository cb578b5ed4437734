"""Writing checkpoints and models during a run, and restoring a checkpoint.

A checkpoint holds all that a run needs to resume bit for bit: weights, optimizer state, loss scale,
position in the data, and the random generators of every rank.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from ..checkpoint import model_file, sharded_state
from ..checkpoint.model_file import write_adapter, write_model
from ..checkpoint.state_schema import whole
from ..checkpoint.training_state import STATE_FILE, Resumed, write_state
from ..config.options import flatten
from ..config.train import TrainConfig
from ..data.datasets import remember
from ..distributed import fsdp
from ..distributed.random_state import rng_state, set_rng_state
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..huggingface.kept_tokenizer import to_store
from ..model import lora
from ..report import console
from .optimizer_state import check_groups
from .run_folder import MODEL_NAME, out_dir, settings_to_store
from .state import TrainState
from .weight_average import averaged, forget_average

# Keys of the tensors to save. `Saver` names its buffers by them and copies each once a step: a
# checkpoint and the model for use share one copy of the weights.
WEIGHTS, MERGED, AVERAGED = "model", "merged", "averaged"
COUNTERS = (  # fields of TrainState that a checkpoint holds unchanged
    *("seconds", "first_steps", "time_was_up", "skipped", "val_loss", "best_val_loss"),
    *("evals_without_gain", "evaluated_at"),
)


def save_checkpoint(state: TrainState, config: TrainConfig, rt: Runtime, final: bool) -> None:
    """Writes a checkpoint to resume from; only the failure of the final one ends the run.

    Raises:
        UserError: the final checkpoint could not be written. The model, which is smaller, has been
            tried then, before anything else takes the room that is left. Or the folder of the run
            has become another run's.
    """
    rt.on_main(state.saver.check)
    content = {
        "position": state.loader.position,
        "scaler": state.scaler.state_dict(),
        "rng": rt.gather(rng_state(rt.device)),
        **{name: getattr(state, name) for name in COUNTERS},
        "data": remember(state.datasets, state.loader.order, state.loader.position),
        "settings": settings_to_store(flatten(config), out_dir(config)),
        "tokens_per_step": state.plan.tokens_per_step,
    }
    if state.own_tokenizer:
        content["tokenizer"] = to_store(state.own_tokenizer)
    tensors = {WEIGHTS: state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
    folder, step, shape = out_dir(config), state.step, state.model.config
    keep = config.output.keep_last

    def write_checkpoint(t: dict[str, Any]) -> None:
        rest = content | {"optimizer": t["optimizer"]}
        write_state(folder, step, shape, t[WEIGHTS], rest, keep_last=keep)

    try:
        if rt.sharded:
            sharded_state.write(folder, step, shape, tensors, content, keep_last=keep, rt=rt)
        else:
            write(state, rt, tensors, write_checkpoint, final)
    except UserError as error:
        if final:
            _save_model_alone(error, state, config, rt)
        if rt.is_main:
            console.warn(f"{error}; training goes on, and what was saved before is kept")


def _save_model_alone(
    error: UserError, state: TrainState, config: TrainConfig, rt: Runtime
) -> NoReturn:
    """Writes the model of a run whose last checkpoint failed, and raises that error on all ranks.

    Raises:
        UserError: always; it says whether the model was written.
    """
    try:
        export_model(state, config, rt, MODEL_NAME, final=True)
    except UserError as second:
        raise UserError(f"{error}; {second}") from None
    path = out_dir(config) / MODEL_NAME
    raise UserError(f"{error}; the model without it is in {path}") from None


def restore(state: TrainState, config: TrainConfig, resumed: Resumed, rt: Runtime) -> None:
    """Restores a checkpoint; the loader was made with its position.

    Raises:
        UserError: weights or optimizer state that do not fit.
    """
    with whole(resumed.path / STATE_FILE):
        _restore(state, resumed, rt)
    if not config.optim.ema_steps and not state.is_complete(config.optim):
        forget_average(state.optimizer)  # a run that is over keeps the model that it has


def _restore(state: TrainState, resumed: Resumed, rt: Runtime) -> None:
    content = resumed.state
    check_groups(state.optimizer, content["optimizer"], resumed.path)
    if resumed.in_parts:
        optimizer = sharded_state.read(state.model, state.optimizer, resumed)
    else:
        model_file.load_into(state.model, resumed.model, resumed.path)
        optimizer = sharded_state.shard_optimizer(state.optimizer, resumed)
    options = [
        {k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups
    ]
    state.optimizer.load_state_dict(optimizer)
    for group, asked in zip(state.optimizer.param_groups, options, strict=True):
        group.update(asked)  # only the optimizer state is the checkpoint's: options may change
    if content["scaler"] and state.scaler.is_enabled():  # empty unless that run was fp16
        state.scaler.load_state_dict(content["scaler"])
    if rt.rank < len(content["rng"]):  # a new rank keeps the generators it was seeded with
        set_rng_state(content["rng"][rt.rank], rt.device)
    state.step = resumed.step
    for name in COUNTERS:
        setattr(state, name, content.get(name, getattr(state, name)))


def export_model(
    state: TrainState, config: TrainConfig, rt: Runtime, name: str, final: bool
) -> None:
    """Writes the model for use, with its step and validation loss; adapters merged and beside it.

    Args:
        state: of the run.
        config: its settings.
        rt: this process; all ranks call together.
        name: `MODEL_NAME`, or `BEST_NAME` after the lowest validation loss so far.
        final: whether the run is over.

    Raises:
        UserError: the final model could not be written, or the folder of the run has become another
            run's.
    """
    rt.on_main(state.saver.check)
    path, shape = out_dir(config) / name, state.model.config
    step, val_loss = state.step, state.val_loss
    adapted = lora.is_adapted(state.model)
    weights = MERGED if adapted else AVERAGED if config.optim.ema_steps else WEIGHTS

    def write_files(t: dict[str, Any]) -> None:
        own = state.own_tokenizer
        write_model(path, shape, t[weights], step, val_loss, own_tokenizer=own)
        if adapted:
            folder = path.with_name(path.stem.replace("ckpt", "adapter"))
            write_adapter(folder, t["adapter"], settings, sample)

    with averaged(state.model, state.optimizer):
        whole = fsdp.whole_state(state.model, keep=rt.is_main)
        tensors = {weights: lora.merged_state(state.model, whole)}
        if adapted:
            adapter = lora.to_peft(state.model, config.model.init, whole)
            tensors["adapter"], settings, sample = adapter
        write(state, rt, tensors, write_files, final)


def write(
    state: TrainState, rt: Runtime, tensors: dict[str, Any], function: Callable, final: bool
) -> None:
    """Calls function(tensors) on rank 0: the final time at once, else in a thread, with copies.

    A full disk ends the run only when it is the final time.

    Raises:
        UserError: it was the final time, and it failed.
    """

    def write_now() -> None:
        state.saver.wait()
        function(tensors)

    if final:
        rt.on_main(write_now)
    elif rt.is_main:
        with rt.alone():  # `copy` waits until the save before is written
            copies = state.saver.copy(state.step, tensors)
        state.saver.write_later(lambda: function(copies))
