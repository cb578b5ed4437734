"""How a run begins: in which folder, from which checkpoint, with which weights and data."""

import bisect
import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from . import checkpoint, flags, report, rundir, weights
from .checkpoint import Resumed
from .config import GPT2Config, ModelOptions, TrainConfig, UserError, flatten, to_dict
from .conversations import check_eval_tokens, is_chat, open_conversations
from .datasets import (
    Dataset,
    MixStart,
    build_mixture,
    continue_mix,
    identify,
    open_datasets,
    split_eval_tokens,
)
from .lock import locked
from .optim import sequences_left
from .order import Mixture
from .runtime import Runtime
from .state import TrainState, out_dir
from .switches import check_of_switches, defaults, switched
from .weights import Weights

BUSY = "run folder {folder} is in use by {holder}"


@contextlib.contextmanager
def reserved(config: TrainConfig, rt: Runtime) -> Iterator[None]:
    """Keeps other runs out of the run's folder; raises UserError when one is in there."""
    with contextlib.ExitStack() as stack:

        def reserve():
            rundir.check_writable(out_dir(config))
            stack.enter_context(locked(out_dir(config), BUSY))

        rt.on_main(reserve)
        yield


def find_checkpoint(config: TrainConfig, rt: Runtime) -> Resumed | None:
    """The state to continue from, or None for a new run; changes nothing but our leftovers."""
    kept: list[Resumed] = []  # what rank 0 has read need not be read twice

    def look() -> str | None:
        out = out_dir(config)
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
    return kept[0] if kept else checkpoint.load_state(Path(path), verify=False)


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
    settled = weights.settle(options, shape)
    check_of_switches(config.optim, settled)
    return replace(config, model=settled), next(iter(loaded), None)


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
    wanted = config.tuning.epochs * rows
    steps = max(1, math.ceil(wanted / state.plan.sequences_per_step))
    if config.optim.batch_warmup:  # steps are smaller at first, by no more than half on the average
        steps = bisect.bisect_left(
            range(2 * steps), wanted, lo=steps,
            key=lambda n: sequences_left(0, replace(config.optim, max_steps=n), state.plan),
        )  # fmt: skip
    max_steps = min(config.optim.max_steps, steps)
    return replace(config, optim=replace(config.optim, max_steps=max_steps))


def adopt_evaluation(
    state: TrainState, config: TrainConfig, rt: Runtime, log: report.RunLog, resumed: Resumed | None
):
    """Takes from the log an evaluation that the interrupted run made after its last save."""
    known = rt.broadcast(log.recorded(state.step))
    if known.get("hellaswag_items") == len(state.hellaswag):
        state.hellaswag_at = state.step
    asked = sum(split_eval_tokens(state.datasets, config.eval.eval_tokens))
    if not resumed or "val_loss" not in known or state.evaluated_at == state.step:
        return
    same_data = resumed.state["settings"]["data_dir"] == config.data.data_dir
    if same_data and known.get("val_tokens") == asked:
        state.note_evaluation(known["val_loss"])


def open_log(config: TrainConfig, rt: Runtime, resumed: Resumed | None):
    """metrics.jsonl and the services; also writes the settings as a file that --config= reads."""
    settings = flatten(config)
    if rt.is_main:
        own = {name: value for name, value in settings.items() if name != "resume"}
        (out_dir(config) / "config.toml").write_text(flags.to_toml(own), encoding="utf-8")
    return report.open_run(
        out_dir(config),
        config=settings,
        sinks=config.output.log_to,
        run_name=config.output.run_name,
        resume_step=resumed.step if resumed else None,
        is_main=rt.is_main,
    )
