"""How a run continues: which checkpoint it resumes from, and where newer ones go."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint import training_state
from ..checkpoint.other_formats import number_of
from ..checkpoint.safe_load import torch_load
from ..checkpoint.state_schema import check_complete, whole
from ..checkpoint.training_state import Resumed
from ..config.finetune import targets_of, tuning_options
from ..config.model import IGNORE, to_dict
from ..config.run_paths import CONFIG_FILE, as_written, from_here, shortest
from ..config.switches import defaults, switched
from ..config.train import ModelOptions, TrainConfig
from ..data.conversations import is_chat
from ..data.datasets import split_eval_tokens, validation_fingerprint
from ..data.loader import eval_batches
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..report import console, metrics
from ..untrusted.display import shown
from . import run_folder
from .messages import changed_options
from .run_folder import BEST_NAME, MODEL_NAME, out_dir
from .run_tokenizer import check_resumed_tokenizer
from .state import TrainState

WAYS_OUT = (
    "use the same settings, another --out_dir, or --resume=never "
    "(docs/troubleshooting.md#resume-refused)"
)


def find_checkpoint(config: TrainConfig, rt: Runtime) -> Resumed | None:
    """The checkpoint to resume from, or None for a new run; deletes only half-written files."""
    kept: list[Resumed] = []  # rank 0 has read it already

    def look() -> str | None:
        out = out_dir(config)
        with _as_user_error():
            run_folder.clean(out)
        found, damaged = training_state.find_state(out, config.output.resume)
        for line in damaged:
            console.warn(f"{line}; using an older checkpoint")
        if found:
            check_complete(found.state, found.path / training_state.STATE_FILE)
            _see_paths_from_here(found)
            check_resumed_tokenizer(found, config)
            check_same_run(found, config.model)
            check_same_tuning(found, config)
            kept.append(found)
        return str(found.path) if found else None

    path = rt.on_main(look)
    if not path:
        check_windows(config.model)
        return None
    if kept:
        return kept[0]
    resumed = training_state.load_state(Path(path), verify=False)
    _see_paths_from_here(resumed)
    return resumed


def _see_paths_from_here(found: Resumed) -> None:
    """Lets the paths of a checkpoint's settings begin in the current folder.

    They are compared with those of the command, which may be called from another folder.
    """
    config = found.path.parent.parent / CONFIG_FILE
    settings = from_here(config, found.state["settings"])
    found.state["settings"] = as_written(settings, run_folder.written_before(config))


def archive_previous_run(
    state: TrainState, config: TrainConfig, rt: Runtime, resumed: Resumed | None
) -> None:
    """Archives the checkpoints that are newer than the one to resume from.

    The best model is archived too, and its loss counted anew, where it is not of the run that goes
    on: of a step that this run has not reached, of another folder, or by other validation tokens.
    """
    reason = ""
    if resumed and _validates_otherwise(state, config, resumed):
        reason = f"other validation tokens than in {resumed.path}"
    if reason and state.is_complete(config.optim):
        reason, state.evaluated_at = "", state.step  # no step follows: its results stay
    elif resumed and not reason and not state.is_complete(config.optim):
        found = resumed
        reason = rt.on_main(lambda: _of_another_run(config, found))
    if reason and resumed:
        _forget_best(state, resumed)

    def move() -> None:
        out = out_dir(config)
        after = resumed.step if resumed and _is_in(out, resumed) else -1
        back = config.output.resume not in ("auto", "never")
        with _as_user_error():
            moved = run_folder.archive(out, after, going_back=back, best=bool(reason))
        if reason:
            console.log(f"{reason}: the lowest validation loss is counted anew")
        if moved:
            console.log(f"moved files of an earlier run to {moved}")

    rt.on_main(move)


def _is_in(out: Path, resumed: Resumed) -> bool:
    """Whether a checkpoint lies in the run's own folder."""
    return resumed.path.resolve().parent == (out / "state").resolve()


def _of_another_run(config: TrainConfig, resumed: Resumed) -> str:
    """Why the best model so far is not that of the run which goes on; "" if it is.

    A run that a crash ended before its next checkpoint comes to a later best model again.
    """
    out = out_dir(config)
    if not _is_in(out, resumed):
        counted = resumed.state.get("best_val_loss", math.inf) < math.inf
        return f"another folder than that of {resumed.path}" if counted else ""
    changed = changed_options(config, resumed).keys() - vars(config.output).keys()
    goes_off = config.output.resume != "auto" or changed
    path = out / BEST_NAME
    step = _step_of(path) if goes_off and path.exists() else 0
    return f"{path} is of step {step:,}, after {resumed.path}" if step > resumed.step else ""


def _step_of(path: Path) -> int:
    """The step of a model file of ours; 0 where it does not say, or is damaged."""
    try:
        content = torch_load(path)  # its tensors are mapped, not read
    except UserError:
        return 0  # who uses it is told
    step = number_of(content.get("step")) if isinstance(content, dict) else None
    return int(step) if step else 0


def _validates_otherwise(state: TrainState, config: TrainConfig, resumed: Resumed) -> bool:
    """Whether the validation loss is about other tokens than that of the checkpoint's run.

    A checkpoint that does not name its shards (version 0.1.0) counts as one of these tokens.
    """
    settings, stored = resumed.state["settings"], resumed.state.get("data")
    if stored is None:
        return False
    with whole(resumed.path / training_state.STATE_FILE):
        # a mixture in another order is the same text
        before, now = (
            sorted(validation_fingerprint([part]) for part in parts)
            for parts in (
                [(d["share"], d["shards"]) for d in stored["datasets"]],
                [(d.share, d.identity) for d in state.datasets],
            )
        )
        asked = [settings.get("eval_tokens", config.eval.eval_tokens), config.eval.eval_tokens]
        counts = [split_eval_tokens(state.datasets, tokens) for tokens in asked]
    return before != now or counts[0] != counts[1]


def _forget_best(state: TrainState, resumed: Resumed) -> None:
    """Counts the lowest validation loss anew, also for those who read the checkpoint's counters."""
    anew = {"best_val_loss": math.inf, "evals_without_gain": 0}
    resumed.state |= anew
    for name, value in anew.items():
        setattr(state, name, value)


@contextlib.contextmanager
def _as_user_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror or error}") from None


def _run_of(init: str) -> Path:
    """The folder of a run, also where its model is named; any other source as it is."""
    path = Path(init)
    path = path.parent if path.name == MODEL_NAME else path
    return path.resolve() if path.exists() else path


def check_windows(options: ModelOptions) -> None:
    """Raises UserError for windows without a layer; runs of earlier versions go on with them."""
    pattern, layers = options.window_pattern, options.given().get("n_layer", 0)
    if pattern and not options.init and "S" not in pattern[:layers]:
        raise UserError(
            f"window_pattern={pattern}: none of the {layers} layers is an S; leave it and window "
            "out, or let it begin with S"
        )


def check_same_tuning(found: Resumed, config: TrainConfig) -> None:
    """Raises UserError for a checkpoint with other adapters, or other conversations held out."""
    before, options = found.state.get("settings", {}), tuning_options(config)
    if options is None:
        return
    names = ["lora_rank", *["lora_targets", "lora_alpha"] * (options.lora_rank > 0)]
    names += ["val_share"] * is_chat(config.data.data_dir)
    for name in names:
        value = getattr(options, name)
        theirs = before.get(name, value)
        equal = theirs == value
        if name == "lora_targets":  # in any order
            equal = set(targets_of(str(theirs))) == set(options.targets())
        if not equal:
            other = f"{name}={shown(str(theirs))}, not {value}"
            raise UserError(f"{found.path} is of a run with {other}; {WAYS_OUT}")


def check_same_run(found: Resumed, options: ModelOptions) -> None:
    """Raises UserError for a checkpoint of another network, or of a run with another `--init`."""
    began_with = found.state.get("settings", {}).get("init", "")
    if options.init and not (began_with and _run_of(options.init) == _run_of(str(began_with))):
        raise UserError(
            f"{found.path} is of a run that began with {shown(began_with) or 'fresh weights'}, not "
            f"init={options.init}; use another --out_dir, or --resume=never "
            "(docs/troubleshooting.md#resume-refused)"
        )
    theirs = defaults() | to_dict(found.config)
    ours = defaults() | to_dict(options.shape())
    if options.init:  # the rest is that of the weights
        ours = options.given() | switched(options)
    ours.pop("dropout", None)  # may change between runs
    different = [f"{n} {ours[n]} instead of {theirs[n]}" for n in ours if ours[n] != theirs[n]]
    if different:
        raise UserError(
            f"{found.path} is of another network: you asked for {', '.join(different)}; {WAYS_OUT}"
        )


def restore_logged_evaluation(
    state: TrainState,
    config: TrainConfig,
    rt: Runtime,
    log: metrics.RunLog,
    resumed: Resumed | None,
) -> bool:
    """Takes over an evaluation of this step from the log, made after the checkpoint was saved.

    Returns whether its loss is the lowest of the run. The process may have ended before it had
    written the model, so this one has to.
    """
    known = rt.broadcast(log.recorded(state.step))
    if known.get("hellaswag_items") == len(state.hellaswag):
        state.hellaswag_at = state.step
    val_loss = metrics.measured(known, "val_loss")
    if not resumed or val_loss is None or state.evaluated_at == state.step:
        return False
    if _validates_otherwise(state, config, resumed):
        state.evaluated_at = state.step  # one loss a step in metrics.jsonl, as it was measured
        return False
    before, now = resumed.state["settings"].get("data_dir"), config.data.data_dir
    same_data = shortest({"data_dir": before}) == shortest({"data_dir": now})
    if not same_data or known.get("val_tokens") != _validated_tokens(state, config):
        return False
    return state.note_evaluation(val_loss)


def _validated_tokens(state: TrainState, config: TrainConfig) -> int:
    """Tokens that a validation loss is over: of conversations those that are learned."""
    size, found = state.plan.block_size, 0
    counts = split_eval_tokens(state.datasets, config.eval.eval_tokens)
    for part, tokens in zip(state.datasets, counts, strict=True):
        batches = eval_batches(part.val, block_size=size, batch_size=1, eval_tokens=tokens)
        found += sum(int((y != IGNORE).sum()) for _, y, *_ in batches)
    return found
