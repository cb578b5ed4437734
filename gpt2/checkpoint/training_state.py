"""`state/step_00000250/`, a run to continue.

The folder holds the model as safetensors, the rest (optimizer, scaler, position in the data, random
generators) as tensors and plain values, and `manifest.json` with the sha256 of both. Where ranks
hold parts of the weights (FSDP), the model and the optimizer state are one safetensors file per
rank instead (`sharded_state.py`).

A state is written beside its name and renamed when it is whole (`files.py`). No format notices a
flipped bit by itself, so the hashes are compared before anything is loaded.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config.model import GPT2Config, to_dict
from ..errors import UserError, first_line
from ..files import committed, discard, fingerprint
from .model_file import _on_cpu, _torch_load, size_of

STATE_FORMAT = 2  # of a state's manifest; 1 had no sha256 of its own
MODEL_FILE, STATE_FILE, MANIFEST = "model.safetensors", "train_state.pt", "manifest.json"
STEP_FOLDER = re.compile(r"step_(\d{8})")
PART_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # as DCP names them


# ---- state/step_*/: a run to continue -----------------------------------------------------------


@dataclass
class Resumed:
    """What a state folder held."""

    path: Path
    step: int
    config: GPT2Config
    model: dict[str, Tensor]  # empty if it is in parts
    state: dict[str, Any]
    in_parts: bool = False  # see `sharded`


def save_state(
    out_dir: Path, step: int, model: nn.Module, state: dict[str, Any], keep_last: int
) -> Path:
    """Commits `out_dir/state/step_<step>/`, then deletes all but the last `keep_last` states.

    Args:
        out_dir: the run's folder.
        step: optimizer steps done.
        model: its tensors go into a safetensors file.
        state: everything else, tensors and plain values only.
        keep_last: how many states stay.

    Raises:
        UserError: no space or no permission; older states are still there.
    """
    tensors = model.state_dict()
    return write_state(out_dir, step, model.config, tensors, state, keep_last=keep_last)


def write_state(
    out_dir: Path,
    step: int,
    config: GPT2Config,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    keep_last: int,
) -> Path:
    """The same for tensors with which nothing else happens meanwhile."""
    with new_state(out_dir, step, keep_last, size_of(tensors) + size_of(state)) as temporary:
        save_file(_on_cpu(tensors), temporary / MODEL_FILE)
        write_rest(temporary, step, config, state)
    return out_dir / "state" / f"step_{step:08d}"


@contextlib.contextmanager
def new_state(out_dir: Path, step: int, keep_last: int, needed: int = 0) -> Iterator[Path]:
    """A folder for the files of a state; at the end it is committed, and older states deleted.

    Args:
        out_dir: the run's folder.
        step: optimizer steps done.
        keep_last: how many states stay.
        needed: bytes that will be written, as far as they are known.

    Raises:
        UserError: no space or no permission; older states are still there.
    """
    final = out_dir / "state" / f"step_{step:08d}"
    with committed(final, (RuntimeError, safetensors.SafetensorError), needed) as temporary:
        yield temporary
    with contextlib.suppress(OSError):  # what cannot be deleted now is deleted next time
        for old in state_folders(out_dir)[:-keep_last]:
            discard(old)


def write_rest(folder: Path, step: int, config: GPT2Config, state: dict[str, Any]):
    """Adds what is not in safetensors, and the manifest of all files."""
    torch.save(state, folder / STATE_FILE)
    names = sorted(path.name for path in folder.iterdir())
    with ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
        files = dict(zip(names, pool.map(lambda n: fingerprint(folder / n), names), strict=True))
    manifest = {"format": STATE_FORMAT, "step": step, "config": to_dict(config), "files": files}
    manifest["sha256"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def state_folders(out_dir: Path) -> list[Path]:
    """Committed states, oldest first."""
    return sorted(p for p in (out_dir / "state").glob("step_*") if STEP_FOLDER.fullmatch(p.name))


def load_state(path: Path, verify: bool = True) -> Resumed:
    """Reads one state after comparing its files with the manifest; parts are left where they are.

    Args:
        path: the folder.
        verify: whether the hashes of parts are compared: once is enough for all ranks.

    Raises:
        UserError: what is damaged or missing.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != 1 and manifest.pop("sha256", None) != _digest(manifest):
            raise UserError(f"{path}: {MANIFEST} is damaged (its sha256 differs)")
        step, files = int(manifest["step"]), manifest["files"]
        parts = [name for name in files if PART_FILE.fullmatch(name)]
        check_files(path, files, [*(parts or [MODEL_FILE]), STATE_FILE], verify or not parts)
        model = {} if parts else load_file(path / MODEL_FILE)
        config = GPT2Config.from_dict(manifest["config"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a whole checkpoint ({first_line(error)})") from None
    return Resumed(path, step, config, model, _torch_load(path / STATE_FILE), bool(parts))


def find_state(out_dir: Path, resume: str) -> tuple[Resumed | None, list[str]]:
    """The state to continue from.

    Args:
        out_dir: the run's folder.
        resume: "auto" for the newest whole state of out_dir, "never" for none, or a folder.

    Returns:
        (state or None, one line for each damaged state that was passed over).

    Raises:
        UserError: the named folder is damaged, or every state is: a run that was there is never
            silently started over.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        return load_state(Path(resume)), []
    passed_over: list[str] = []
    for path in reversed(state_folders(out_dir)):
        try:
            return load_state(path), passed_over
        except UserError as error:
            passed_over.append(str(error))
    if passed_over:
        raise UserError(
            f"every checkpoint in {out_dir / 'state'} is damaged: {'; '.join(passed_over)}; "
            "use --resume=never to start over (what is there is kept), or another --out_dir"
        )
    return None, []


# ---- helpers ------------------------------------------------------------------------------------


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_files(path: Path, files: dict[str, Any], names: list[str], verify: bool):
    """Compares a folder with its manifest, whose names cannot point elsewhere.

    Args:
        path: the folder.
        files: name -> `fingerprint`, by the manifest.
        names: those that there must be, fixed or of a fixed form.
        verify: whether the files are read.

    Raises:
        UserError: one is damaged, or there is one more.
        KeyError: one is not in the manifest.
        OSError: one is not there.
    """
    # Parts are found by looking into the folder, where nothing else must lie
    odd = {p.name for p in path.glob("*.safetensors")} - set(names)
    if odd:
        raise UserError(f"{path}: {min(odd)} is not in its manifest")
    with ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
        prints = pool.map(lambda n: fingerprint(path / n) if verify else files[n], names)
        for name, found in zip(names, prints, strict=True):
            if found != files[name]:
                raise UserError(f"{path}: {name} is damaged (its sha256 differs)")
