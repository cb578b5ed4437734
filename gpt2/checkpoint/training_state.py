"""`state/step_00000250/`, a training state: everything that a run needs to resume bit for bit.

The folder holds three files. `model.safetensors` has the weights. `train_state.pt` has the
optimizer state, the gradient scaler, the position in the data and the random generators.
`manifest.json` has the sha256 of both. Under FSDP each rank writes its parts of weights and
optimizer state as one safetensors file (`sharded_state.py`).

A state is written under a temporary name and renamed when complete (`files.py`). The hashes are
compared before loading, because neither format detects a flipped bit.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config.model import GPT2Config, to_dict
from ..config.parameter_shapes import check_size
from ..config.registry import plugins
from ..errors import UserError, first_line
from ..files import discard, fingerprint, replacing_folder
from ..huggingface.safetensors_header import read_header
from ..untrusted.display import shown
from ..untrusted.parsing import read_json
from .model_file import config_of, on_cpu
from .safe_load import in_memory, torch_load
from .state_schema import check_kinds, not_whole, whole
from .write_errors import bytes_of, write_errors

STATE_FORMAT = 2  # version of the manifest; version 1 lacks the manifest's own sha256
MODEL_FILE, STATE_FILE, MANIFEST = "model.safetensors", "train_state.pt", "manifest.json"
STEP_FOLDER = re.compile(r"step_(\d{8})")
PART_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # named by DCP


@dataclass
class Resumed:
    """A training state in memory."""

    path: Path
    step: int
    config: GPT2Config
    model: dict[str, Tensor]  # empty if in_parts
    state: dict[str, Any]
    in_parts: bool = False  # FSDP parts, read by `sharded_state.read`
    plugins: dict[str, Any] = field(default_factory=dict)  # path -> sha256


def write_state(
    out_dir: Path,
    step: int,
    config: GPT2Config,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    keep_last: int,
) -> Path:
    """Writes `out_dir/state/step_<step>/`, then deletes all but the newest `keep_last` states.

    The tensors must not change during the write.

    Args:
        out_dir: the run's folder.
        step: optimizer steps done.
        config: the network's config.
        tensors: the model's state dict.
        state: other tensors and plain values.
        keep_last: number of newest states to keep.

    Returns:
        The new folder.

    Raises:
        UserError: no space or no permission; older states stay.
    """
    with new_state(out_dir, step, keep_last, bytes_of(tensors) + bytes_of(state)) as temporary:
        save_file(on_cpu(tensors), temporary / MODEL_FILE)
        write_rest(temporary, step, config, state)
    return folder_of(out_dir, step)


@contextlib.contextmanager
def new_state(out_dir: Path, step: int, keep_last: int, needed: int = 0) -> Iterator[Path]:
    """Yields a temporary folder for a state; renames it at the end and deletes the oldest states.

    Args:
        out_dir: the run's folder.
        step: optimizer steps done.
        keep_last: number of newest states to keep.
        needed: bytes to write, for the error message; 0: unknown.

    Raises:
        UserError: no space or no permission; older states stay.
    """
    final = folder_of(out_dir, step)
    with write_errors(final, needed), replacing_folder(final) as temporary:
        yield temporary
    with contextlib.suppress(OSError):  # the next save deletes them
        for old in state_folders(out_dir)[:-keep_last]:
            discard(old)


def folder_of(out_dir: Path, step: int) -> Path:
    """The folder of a step's state."""
    return out_dir / "state" / f"step_{step:08d}"


def write_rest(folder: Path, step: int, config: GPT2Config, state: dict[str, Any]) -> None:
    """Writes `train_state.pt`, then the manifest of all files in the folder."""
    torch.save(state, folder / STATE_FILE)
    names = sorted(path.name for path in folder.iterdir())
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        files = dict(zip(names, pool.map(lambda n: fingerprint(folder / n), names), strict=True))
    manifest = {"format": STATE_FORMAT, "step": step, "config": to_dict(config), "files": files}
    if parts := plugins():
        manifest["plugins"] = parts
    manifest["sha256"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def state_folders(out_dir: Path) -> list[Path]:
    """Complete states of a run, oldest first."""
    return sorted(p for p in (out_dir / "state").glob("step_*") if STEP_FOLDER.fullmatch(p.name))


def load_state(path: Path, verify: bool = True) -> Resumed:
    """Reads a state after its files have been compared with the manifest. FSDP parts stay on disk.

    Args:
        path: the state's folder.
        verify: whether to compare the hashes of FSDP parts; one rank does it for all.

    Raises:
        UserError: a file is damaged or missing.
    """
    manifest = read_manifest(path)
    files, config = (
        manifest["files"],
        config_of(manifest["config"], path / MANIFEST, manifest.get("plugins")),
    )
    parts = [name for name in files if PART_FILE.fullmatch(name)]
    tensors = [path / name for name in parts or [MODEL_FILE]]
    try:
        check_files(path, files, [*(parts or [MODEL_FILE]), STATE_FILE], verify or not parts)
        for file in tensors:
            read_header(file)  # a small header, before safetensors reads the file
        check_size(config, sum(file.stat().st_size for file in tensors), path)
        model = {} if parts else load_file(path / MODEL_FILE)
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(not_whole(path, first_line(error))) from None
    state = torch_load(path / STATE_FILE)
    check_kinds(state, path / STATE_FILE)
    with whole(path / STATE_FILE):
        state = in_memory(state)
    used = manifest.get("plugins")
    used = used if isinstance(used, dict) else {}
    return Resumed(path, manifest["step"], config, model, state, bool(parts), used)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a state.

    Raises:
        UserError: the manifest is missing or damaged, or lacks step, config or files.
    """
    try:
        manifest = read_json(path / MANIFEST)
    except UserError as error:
        raise UserError(not_whole(path, str(error).removeprefix(f"{path}{os.sep}"))) from None
    kinds = {"format": int, "step": int, "config": dict, "files": dict}
    if odd := [n for n, kind in kinds.items() if not isinstance(manifest.get(n), kind)]:
        raise UserError(not_whole(path, f"{odd[0]} of {MANIFEST} is missing or of another kind"))
    if not 0 <= manifest["step"] < 10**8:
        raise UserError(not_whole(path, f"step {shown(manifest['step'])} in {MANIFEST}"))
    if manifest["format"] != 1 and manifest.pop("sha256", None) != _digest(manifest):
        raise UserError(f"{path}: {MANIFEST} is damaged (its sha256 differs)")
    return manifest


def find_state(out_dir: Path, resume: str) -> tuple[Resumed | None, list[str]]:
    """Finds and reads the state to resume from.

    Args:
        out_dir: the run's folder.
        resume: "auto" (the newest undamaged state of `out_dir`), "never", or a state's folder.

    Returns:
        (state or None, one line for each damaged state that was skipped).

    Raises:
        UserError: the named state is missing or damaged, or every state of `out_dir` is. A damaged
            run never starts over silently.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        _check_named(Path(resume), out_dir)
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


def _check_named(path: Path, out_dir: Path) -> None:
    """Raises UserError where `--resume=` names no state; the message names one as an example."""
    if path == Path():  # an unset variable of a script: --resume=$STATE
        raise UserError("resume is empty; use --resume=auto or never, or name a checkpoint")
    named = STEP_FOLDER.fullmatch(path.name) or (path / MANIFEST).exists()
    if path.is_dir() and named:
        return  # what it may lack, `load_state` says
    reason = "a file, no folder" if path.exists() else "no such folder"
    if path.is_dir():
        reason = "the folder of a run" if state_folders(path) else f"a folder without {MANIFEST}"
    near = [folder for folder in (path, *path.parents[:2], out_dir) if folder.is_dir()]
    found = next((states[-1] for folder in near if (states := state_folders(folder))), None)
    raise UserError(
        f"{not_whole(path, reason)}; use --resume=auto, --resume=never or a folder such as "
        f"--resume={found or folder_of(out_dir, 250)}"
    )


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_files(path: Path, files: dict[str, Any], names: list[str], verify: bool) -> None:
    """Compares the files of a folder with its manifest.

    Args:
        path: the state's folder.
        files: name -> fingerprint, from the manifest.
        names: the required files. The caller chooses them, so that a manifest cannot name a file
            outside the folder.
        verify: whether to hash the files.

    Raises:
        UserError: a file is damaged, or the folder has a safetensors file that `names` lacks.
        KeyError: the manifest lacks a file.
        OSError: a file is missing.
    """
    # Distributed Checkpoint reads every safetensors file in the folder.
    odd = {p.name for p in path.glob("*.safetensors")} - set(names)
    if odd:
        raise UserError(f"{path}: {min(odd)} is not in its manifest")
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        prints = pool.map(lambda n: fingerprint(path / n) if verify else files[n], names)
        for name, found in zip(names, prints, strict=True):
            if found != files[name]:
                raise UserError(f"{path}: {name} is damaged (its sha256 differs)")
