"""The state of a training run on its way to disk and back.

What a checkpoint must hold for the run to go on bit for bit: weights, optimizer, scaler, position
in the data, and the random generators of every rank.
"""

from collections.abc import Callable

from ..checkpoint import model_file, sharded_state
from ..checkpoint.model_file import write_adapter, write_model
from ..checkpoint.training_state import Resumed, write_state
from ..config.options import flatten
from ..config.train import TrainConfig
from ..data.datasets import remember
from ..distributed import fsdp
from ..distributed.random_state import rng_state, set_rng_state
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..model import lora
from ..report import console
from .optimizer import check_groups
from .run_folder import BEST_NAME, MODEL_NAME, out_dir
from .state import TrainState

COUNTERS = (  # fields of TrainState that a checkpoint holds as they are
    *("seconds", "skipped", "val_loss", "best_val_loss"),
    *("evals_without_gain", "evaluated_at"),
)


def save(state: TrainState, config: TrainConfig, rt: Runtime, final: bool):
    """Commits a checkpoint to continue from; a failure only ends the run when it is the last."""
    content = {
        "position": state.loader.position,
        "scaler": state.scaler.state_dict(),
        "rng": rt.gather(rng_state(rt.device)),
        **{name: getattr(state, name) for name in COUNTERS},
        "data": remember(state.datasets, state.loader.order, state.loader.position),
        "settings": flatten(config),
    }
    tensors = {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
    step, shape, keep = state.step, state.model.config, config.output.keep_last
    if rt.sharded:
        given = out_dir(config), step, shape, tensors, content
        _now(lambda: sharded_state.write(*given, keep_last=keep, rt=rt), rt, final)
        return

    def commit(t: dict):
        rest = content | {"optimizer": t["optimizer"]}
        write_state(out_dir(config), step, shape, t["model"], rest, keep_last=keep)

    write(state, rt, tensors, commit, final)


def restore(state: TrainState, resumed: Resumed, rt: Runtime):
    """Puts back what `save` stored; the loader already stands at its position."""
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
        group.update(asked)  # only the moments come from the checkpoint: options may change
    if content["scaler"] and state.scaler.is_enabled():  # empty unless that run was fp16
        state.scaler.load_state_dict(content["scaler"])
    if rt.rank < len(content["rng"]):  # a new rank keeps the generators it was seeded with
        set_rng_state(content["rng"][rt.rank], rt.device)
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
    path, shape = out_dir(config) / name, state.model.config
    step, val_loss = state.step, state.val_loss
    weights = "merged" if lora.is_adapted(state.model) else "model"  # "model" is in `save` as well
    whole = fsdp.whole_state(state.model, keep=rt.is_main)
    tensors = {weights: lora.merged_state(state.model, whole)}
    if weights == "merged":
        tensors["adapter"], settings = lora.to_peft(state.model, config.model.init, whole)

    def write_both(t: dict):
        write_model(path, shape, t[weights], step, val_loss)
        if weights == "merged":
            folder = path.with_name(path.stem.replace("ckpt", "adapter"))
            write_adapter(folder, t["adapter"], settings)

    write(state, rt, tensors, write_both, final)


def write(state: TrainState, rt: Runtime, tensors: dict, function: Callable, final: bool):
    """Calls `function` with the tensors on rank 0: the last time now, else from copies, later.

    A full disk is no reason to lose the run, unless it was the last chance.

    Raises:
        UserError: it was the last time, and it failed.
    """

    def now():
        state.saver.wait()
        function(tensors)

    if final:
        rt.on_main(now)
    elif rt.is_main:
        with rt.alone():  # as long as the one before is being written
            copies = state.saver.copy(state.step, tensors)
        state.saver.write_later(lambda: function(copies))


def _now(function: Callable[[], None], rt: Runtime, final: bool):
    """The same for a function that all ranks call, and that writes at once."""
    try:
        function()
    except UserError as error:
        if final:
            raise
        if rt.is_main:
            console.warn(f"{error}; training goes on, and what was saved before is kept")
