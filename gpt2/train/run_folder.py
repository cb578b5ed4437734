"""The folder of a run: its files, its lock, its log, what a crash left, what moves out of the way.

Nothing that a person may want is deleted here; it moves to `archive_1`, `archive_2`, …
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.average import MEAN_NAME
from ..checkpoint.state_schema import whole
from ..checkpoint.training_state import STATE_FILE, Resumed, state_folders
from ..config import command_line
from ..config.earlier import current_names
from ..config.options import flatten
from ..config.run_paths import CONFIG_FILE, from_anywhere, from_first_folder
from ..config.train import TrainConfig
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..files import LOCK, FolderLock, InUse, delete, leftovers, locked, move, write_atomically
from ..paths import check_unlinked, check_utf8
from ..report import console, metrics
from ..untrusted.parsing import SURROGATES

MODEL_NAME, BEST_NAME = "out_ckpt.pt", "best_ckpt.pt"
BUSY = "run folder {folder} is in use by {holder}"
RUN_FILES = (  # and folders, of a run, besides its states
    *("metrics.jsonl", "history.jsonl", "out_ckpt.pt", "best_ckpt.pt", "config.toml", "loss.png"),
    MEAN_NAME,
    *("tensorboard", "wandb", "wandb_id.txt", "out_adapter", "best_adapter", "nonfinite.json"),
)
OF_A_RUN = (CONFIG_FILE, "metrics.jsonl", "state", MODEL_NAME, BEST_NAME)  # which only runs write
BEST_FILES = (BEST_NAME, "best_adapter")
# Opened in place, or written into: none of them may be a symbolic link.
IN_PLACE = ("state", "metrics.jsonl", "history.jsonl", "tensorboard", "wandb", LOCK)


def out_dir(config: TrainConfig) -> Path:
    """The run's folder."""
    return Path(config.output.out_dir)


def archive(
    out_dir: Path, after_step: int, going_back: bool = False, best: bool = False
) -> Path | None:
    """Moves the checkpoints after a step to a folder `archive_N`.

    Args:
        out_dir: the run's folder.
        after_step: later checkpoints are moved; -1: every checkpoint, and the run's files.
        going_back: also copy the files that a run from an earlier checkpoint will overwrite, and
            move a mean over states, which may be over those that are moved.
        best: also move the model with the lowest validation loss so far.

    Returns:
        The folder, or None when there was nothing to move.
    """
    moved = [p for p in state_folders(out_dir) if int(p.name[5:]) > after_step]
    files = [out_dir / name for name in RUN_FILES if (out_dir / name).exists()]
    names = (BEST_FILES if best else ()) + ((MEAN_NAME,) if going_back and moved else ())
    moved += [path for path in files if after_step < 0 or path.name in names]
    if not moved:
        return None
    number = 1
    while os.path.lexists(folder := out_dir / f"archive_{number}"):
        number += 1
    folder.mkdir()
    if going_back and after_step >= 0:
        for path in files:
            if path.is_file() and path not in moved:
                shutil.copy2(path, folder / path.name)
    for path in moved:
        target = folder / path.relative_to(out_dir)
        target.parent.mkdir(exist_ok=True)
        move(path, target)
    return folder


def clean(out_dir: Path) -> list[str]:
    """Deletes files that a crash left half written; returns their names."""
    found = leftovers(out_dir / "state", "step_*")
    for name in RUN_FILES:
        found += leftovers(out_dir, name)
    for path in found:
        delete(path)
    return [path.name for path in found]


def check_writable(out_dir: Path) -> None:
    """Writes a probe, so that a run fails before its first step instead of at its first save.

    Raises:
        UserError: the folder cannot be made or written to, or its name is not UTF-8.
    """
    check_utf8(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to out_dir={out_dir}: {reason}; use another") from None


@contextlib.contextmanager
def folder_lock(config: TrainConfig, rt: Runtime) -> Iterator[list[FolderLock]]:
    """Holds the lock of the run's folder, which it gives on rank 0 alone.

    Raises:
        UserError: another run holds it.
    """
    held: list[FolderLock] = []
    with contextlib.ExitStack() as stack:

        def reserve() -> None:
            if not config.output.out_dir:  # an unset variable of a script: --out_dir=$OUT
                raise UserError("out_dir is empty; name a folder, or leave the option out")
            folder = out_dir(config)
            check_writable(folder)
            check_unlinked(folder, *(folder / name for name in IN_PLACE))
            if (folder / "state").exists():  # and is no link
                check_writable(folder / "state")
            held.append(stack.enter_context(locked(folder, BUSY)))

        rt.on_main(reserve)
        yield held


def is_on_record(config: TrainConfig, resumed: Resumed | None) -> bool:
    """Whether a run is over, by its own settings and by those given, and its folder has its own."""
    folder = out_dir(config)
    if resumed is None or not (folder / "config.toml").is_file():
        return False
    if resumed.path.parent.parent.resolve() != folder.resolve():
        return False  # it goes on from another folder
    state = resumed.state
    with whole(resumed.path / STATE_FILE):
        return all(
            resumed.step >= s["max_steps"]
            or 0 < s["max_seconds"] <= state.get("time_was_up", 0.0)
            or 0 < s["early_stop_evals"] <= state["evals_without_gain"]
            for s in (flatten(TrainConfig()) | current_names(state["settings"]), flatten(config))
        )


def written_before(path: Path) -> dict[str, Any]:
    """The settings in a run's config.toml; {} where it is missing or damaged."""
    try:
        return command_line.read_toml(path)
    except (OSError, ValueError):
        return {}


def settings_to_store(settings: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """The settings for a checkpoint in a run's folder: `from_here` finds the paths after a move."""
    path = out_dir / CONFIG_FILE
    return from_first_folder(settings, path, written_before(path))


def write_settings(config: TrainConfig) -> None:
    """Writes the settings to config.toml for `--config=`.

    Raises:
        UserError: it could not be written.
    """
    own = {name: value for name, value in flatten(config).items() if name != "resume"}
    path = out_dir(config) / CONFIG_FILE
    written = from_anywhere(own, path, written_before(path))
    content = command_line.to_toml(written).encode("utf-8", SURROGATES)
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path} not written: {error.strerror or error}") from None


def hold_on(config: TrainConfig, held: list[FolderLock]) -> None:
    """Takes the run's folder again where somebody has moved or deleted it meanwhile.

    Called before each line of the log and each save, also by the thread that saves.

    Args:
        config: of the run.
        held: the lock of the run's folder, on rank 0.

    Raises:
        UserError: the folder of this name is another run's by now.
    """
    for lock in held:
        with lock.alone:
            if not lock.held():
                _take_again(config, lock)


def _take_again(config: TrainConfig, lock: FolderLock) -> None:
    folder, moved = out_dir(config), lock.moved()  # else somebody deleted .lock alone
    try:
        if moved and any((folder / name).exists() for name in OF_A_RUN):
            raise InUse(f"{folder} has the files of another run")
        lock.renew()
    except InUse as error:
        raise UserError(
            f"{folder} was moved or deleted while this run trained, and now: {error}; with "
            "--out_dir= of its own folder this run goes on from its last checkpoint there"
        ) from None
    except UserError:  # what is written next says so
        return
    if moved:
        write_settings(config)
        console.warn(
            f"{folder} was moved or deleted while this run trains; it goes on in a new folder of "
            "this name, and what it had written is in the old one"
        )


def open_log(
    config: TrainConfig, rt: Runtime, resumed: Resumed | None, held: list[FolderLock]
) -> contextlib.AbstractContextManager[metrics.RunLog]:
    """Opens metrics.jsonl and the services; writes the settings to config.toml for `--config=`.

    A finished run was trained with the settings that are there.

    Args:
        config: of the run.
        rt: this process.
        resumed: the checkpoint that it goes on from.
        held: the lock of the run's folder, on rank 0.
    """
    if rt.is_main and not is_on_record(config, resumed):
        write_settings(config)
    return metrics.open_run(
        out_dir(config),
        before_each=partial(hold_on, config, held),
        config=flatten(config),
        sinks=config.output.log_to,
        run_name=config.output.run_name,
        resume_step=resumed.step if resumed else None,
        is_main=rt.is_main,
    )
