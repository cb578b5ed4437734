"""Paths in a run's config.toml, whichever folder a command is called from.

A run writes its paths as they were given, so relative ones begin at the folder in which it was
started. Later that folder is found by `out_dir`: of a run in `/a/out/x` with out_dir="out/x" it is
`/a`, also where somebody has renamed `x`. Nothing is recorded, so that a moved or copied project
still works. A run that goes on from another folder writes its paths as they begin in the first one.
A run whose out_dir does not tell (an absolute path, or one with `..`) writes its other paths as
absolute ones.
"""

import os
import re
import shlex
from pathlib import Path
from typing import Any

from ..errors import UserError

CONFIG_FILE = "config.toml"
PATHS = ("data_dir", "init", "hellaswag")  # options that may name files and folders to read
PIECE = re.compile(r"^(.*?)(:[\d.eE+-]+)?$")  # of a mix: a folder and its weight


def from_here(config: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config.toml with paths that lead from the current folder to the same files.

    Args:
        config: the file. One that is not in the folder of its run is left as it is.
        settings: its content.
    """
    start = _started_in(config, settings.get("out_dir"))
    if start is None or start == Path.cwd():
        return settings
    found = {name: _moved(settings[name], start) for name in PATHS if name in settings}
    return settings | found | {"out_dir": os.fspath(start / settings["out_dir"])}


def check_not_renamed(config: Path, out_dir: object) -> None:
    """Raises UserError for the config.toml of a run whose folder is not its out_dir any more.

    Args:
        config: the file.
        out_dir: as it stands there.
    """
    if not _is_run(config) or not isinstance(out_dir, str) or not out_dir:
        return
    start = _started_in(config, out_dir) or Path.cwd()
    if (start / out_dir).resolve() != config.resolve().parent:
        raise UserError(
            f"--config={config}: the run in this folder was called {out_dir}; add "
            f"--out_dir={shlex.quote(str(config.parent))} to go on with it, or another --out_dir= "
            "for a new run"
        )


def from_anywhere(
    settings: dict[str, Any], config: Path | None = None, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The settings to write, with paths that lead to the same files from anywhere.

    Args:
        settings: of the run; its paths begin in the current folder.
        config: the file that they are written to.
        earlier: its content so far. Where its out_dir tells in which folder the run was first
            started, paths inside of that folder begin there.

    Returns:
        The settings; with absolute paths where no out_dir tells where they begin.
    """
    if _plain(settings["out_dir"]):
        return settings
    here = Path.cwd()
    found = settings | {name: _moved(settings[name], here) for name in PATHS if name in settings}
    return found if config is None else from_first_folder(found, config, earlier or {})


def from_first_folder(
    settings: dict[str, Any], config: Path, earlier: dict[str, Any]
) -> dict[str, Any]:
    """The settings with paths as they begin in the folder in which the run was first started.

    Args:
        settings: of the run, as `from_here` gives them.
        config: its config.toml.
        earlier: content of that file. Where its out_dir does not tell, the settings stay.
    """
    first = earlier.get("out_dir")
    start = _started_in(config, first)
    if start is None or start == Path.cwd():
        return settings
    inside = {name: _inside(settings[name], start) for name in PATHS if name in settings}
    now = config.resolve().parent  # which may have been renamed
    out_dir = first if (start / str(first)).resolve() == now else os.fspath(now.relative_to(start))
    return settings | inside | {"out_dir": out_dir}


def as_written(settings: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint, with paths that are not here as its run's config.toml has them.

    Args:
        settings: of the checkpoint, as the run was given them.
        written: content of config.toml, absolute where `from_anywhere` made them so.
    """
    found = {}
    for name in {*PATHS} & {*settings} & {*written}:
        ours, theirs = (str(of[name]).split(",") for of in (settings, written))
        if len(ours) == len(theirs):
            found[name] = ",".join(map(_as_written, ours, theirs))
    return settings | found


def shortest(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with paths as one would type them here: relative inside of the current folder.

    So two ways to write one path become one. The paths of the settings begin in this folder.
    """
    here, there = Path.cwd(), {name: settings[name] for name in PATHS if name in settings}
    return settings | {name: _inside(_moved(path, here), here) for name, path in there.items()}


def find_beside(name: str, file: Path) -> str:
    """A relative path that is not here, looked for in the folders above the file that names it."""
    if os.path.isabs(name) or os.path.exists(name) or not _plain(name):
        return name
    above = (os.fspath(folder / name) for folder in file.resolve().parents)
    return next(filter(os.path.exists, above), name)


def _plain(path: object) -> bool:
    """Whether this is a relative path that goes down only."""
    if not isinstance(path, str) or not path:
        return False
    return not Path(path).is_absolute() and ".." not in Path(path).parts


def _started_in(config: Path, out_dir: object) -> Path | None:
    """The folder in which a run was started; None: this is not the config.toml in its folder."""
    if config.name != CONFIG_FILE or not _plain(out_dir):
        return None
    folder, names = config.resolve().parent, Path(str(out_dir)).parts
    if len(folder.parts) <= len(names) or folder.parts[-len(names) : -1] != names[:-1]:
        return None
    # A run may have been renamed. Of a path of one name, nothing would be left to know it by.
    if folder.name != names[-1] and (len(names) == 1 or not _is_run(config)):
        return None
    return Path(*folder.parts[: -len(names)])


def _is_run(config: Path) -> bool:
    """Whether a run has left more in the folder than its config.toml."""
    beside = config.parent / "metrics.jsonl", config.parent / "state"
    return config.name == CONFIG_FILE and any(path.exists() for path in beside)


def _moved(value: Any, start: Path) -> Any:
    """A path, or a mix of paths with weights, as seen from another folder than `start`.

    What is not there stays as it is: it may be a name, such as gpt2 or hub.
    """
    if not isinstance(value, str) or not value:
        return value
    if os.path.exists(start / value):
        return os.fspath(start / value)
    pieces = (PIECE.match(piece) for piece in value.split(","))
    return ",".join(_piece(found[1], found[2] or "", start) for found in pieces if found)


def _inside(value: Any, start: Path) -> Any:
    """A path, or a mix of paths, as it begins in `start` where it lies inside of that folder."""
    if not isinstance(value, str):
        return value
    prefix = os.path.join(start, "")
    return ",".join(piece.removeprefix(prefix) for piece in value.split(","))


def _as_written(given: str, written: str) -> str:
    """A path that is not here by its absolute form in config.toml; both may have a weight."""
    ours, theirs = PIECE.match(given), PIECE.match(written)
    if not ours or not theirs or ours[2] != theirs[2]:  # a line break, or another weight
        return given
    name, path = ours[1], theirs[1]
    same = os.path.isabs(path) and path.endswith(os.sep + os.path.normpath(name))
    if not name or not same or os.path.exists(name):
        return given
    return written if os.path.exists(path) else given


def _piece(name: str, weight: str, start: Path) -> str:
    there = name and os.path.exists(start / name)
    return (os.fspath(start / name) if there else name) + weight
