"""`state/step_00000250/`, a training state: everything that a run needs to resume bit for bit.

The folder holds three files: `model.safetensors`; `train_state.pt` with the optimizer state, the
gradient scaler, the position in the data and the random generators; and `manifest.json` with the
sha256 of both. Under FSDP the model and the optimizer state are one safetensors file per rank
instead (`sharded_state.py`).

A state is written under a temporary name and renamed when it is complete (`files.py`). None of
these formats detects a flipped bit, so the hashes are compared before anything is loaded.
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
from torch import Tensor

from ..config.model import GPT2Config, to_dict
from ..errors import UserError, first_line
from ..files import discard, fingerprint, replacing_folder
from .model_file import on_cpu
from .safe_load import torch_load
from .write_errors import bytes_of, write_errors

STATE_FORMAT = 2  # of a state's manifest; 1 had no sha256 of its own
MODEL_FILE, STATE_FILE, MANIFEST = "model.safetensors", "train_state.pt", "manifest.json"
STEP_FOLDER = re.compile(r"step_(\d{8})")
PART_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # as DCP names them


@dataclass
class Resumed:
    """The content of a state folder."""

    path: Path
    step: int
    config: GPT2Config
    model: dict[str, Tensor]  # empty if in_parts
    state: dict[str, Any]
    in_parts: bool = False  # whether the tensors are FSDP parts, which `sharded_state` reads


def write_state(
    out_dir: Path,
    step: int,
    config: GPT2Config,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    keep_last: int,
) -> Path:
    """Writes `out_dir/state/step_<step>/`, then deletes all but the last `keep_last` states.

    Nobody may change the tensors during the write.

    Args:
        out_dir: the run's folder.
        step: optimizer steps done.
        config: of the network.
        tensors: the model's state dict.
        state: everything else, tensors and plain values only.
        keep_last: how many states stay.

    Returns:
        The new folder.

    Raises:
        UserError: no space or no permission; older states are still there.
    """
    with new_state(out_dir, step, keep_last, bytes_of(tensors) + bytes_of(state)) as temporary:
        save_file(on_cpu(tensors), temporary / MODEL_FILE)
        write_rest(temporary, step, config, state)
    return out_dir / "state" / f"step_{step:08d}"


@contextlib.contextmanager
def new_state(out_dir: Path, step: int, keep_last: int, needed: int = 0) -> Iterator[Path]:
    """Gives a folder for the files of a state; renames it when the block ends, deletes old states.

    Args:
        out_dir: the run's folder.
        step: optimizer steps done.
        keep_last: how many states stay.
        needed: bytes that will be written, as far as they are known; for the message.

    Raises:
        UserError: no space or no permission; older states are still there.
    """
    final = out_dir / "state" / f"step_{step:08d}"
    with write_errors(final, needed), replacing_folder(final) as temporary:
        yield temporary
    with contextlib.suppress(OSError):  # the next save tries again to delete them
        for old in state_folders(out_dir)[:-keep_last]:
            discard(old)


def write_rest(folder: Path, step: int, config: GPT2Config, state: dict[str, Any]) -> None:
    """Writes `train_state.pt`, then the manifest of all files of the folder."""
    torch.save(state, folder / STATE_FILE)
    names = sorted(path.name for path in folder.iterdir())
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        files = dict(zip(names, pool.map(lambda n: fingerprint(folder / n), names), strict=True))
    manifest = {"format": STATE_FORMAT, "step": step, "config": to_dict(config), "files": files}
    manifest["sha256"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def state_folders(out_dir: Path) -> list[Path]:
    """Complete states of a run, oldest first."""
    return sorted(p for p in (out_dir / "state").glob("step_*") if STEP_FOLDER.fullmatch(p.name))


def load_state(path: Path, verify: bool = True) -> Resumed:
    """Reads one state, after comparing its files with the manifest. FSDP parts are not read.

    Args:
        path: the folder.
        verify: whether to compare the hashes of FSDP parts, which one rank does for all.

    Raises:
        UserError: a file is damaged or missing.
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
    return Resumed(path, step, config, model, torch_load(path / STATE_FILE), bool(parts))


def find_state(out_dir: Path, resume: str) -> tuple[Resumed | None, list[str]]:
    """Finds and reads the state to resume from.

    Args:
        out_dir: the run's folder.
        resume: "auto" for the newest undamaged state of out_dir, "never" for none, or a folder.

    Returns:
        (state or None, one line for each damaged state that was skipped).

    Raises:
        UserError: the named folder is damaged, or all states are. A run that was there is never
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


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_files(path: Path, files: dict[str, Any], names: list[str], verify: bool) -> None:
    """Compares the files of a folder with its manifest.

    Args:
        path: the folder.
        files: the manifest's fingerprint of each file by name.
        names: of the files that must be there. They are ours and not the manifest's, so that a
            manifest cannot name a file outside of the folder.
        verify: whether to read the files and compare their hashes.

    Raises:
        UserError: a file is damaged, or a safetensors file too many is there.
        KeyError: a file is not in the manifest.
        OSError: a file is missing.
    """
    # Distributed Checkpoint reads every safetensors file that it finds in the folder.
    odd = {p.name for p in path.glob("*.safetensors")} - set(names)
    if odd:
        raise UserError(f"{path}: {min(odd)} is not in its manifest")
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        prints = pool.map(lambda n: fingerprint(path / n) if verify else files[n], names)
        for name, found in zip(names, prints, strict=True):
            if found != files[name]:
                raise UserError(f"{path}: {name} is damaged (its sha256 differs)")
