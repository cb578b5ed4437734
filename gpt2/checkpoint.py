"""Checkpoints: the only place for torch.save and torch.load.

Two kinds. `out_ckpt.pt` is for using a model: a dict of `model` (tensors under GPT-2's names),
`config`, `step`, `val_loss`, `format`. `state/step_00000250/` is for continuing a run: the model as
safetensors, the rest (optimizer, scaler, position in the data, random generators) as tensors and
plain values, and `manifest.json` with the sha256 of both. Where ranks hold parts, the model and the
optimizer's moments are one safetensors file per rank instead (`sharded.py`).

A state is written beside its name and renamed when it is whole (`commit.py`). No format notices a
flipped bit by itself, so the hashes are compared before anything is loaded. Nothing here ever
unpickles code: `weights_only=True` everywhere.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import foreign, parallel
from .commit import committed, discard, fingerprint, first_line, sync, why_not_written
from .config import GPT2Config, UserError, to_dict
from .integrity import check_files, check_sums, size_of
from .lora import merged_state
from .switches import SWITCH_NAMES

FORMAT = 1  # of out_ckpt.pt
STATE_FORMAT = 2  # of a state's manifest; 1 had no sha256 of its own
MODEL_FILE, STATE_FILE, MANIFEST = "model.safetensors", "train_state.pt", "manifest.json"
STEP_FOLDER = re.compile(r"step_(\d{8})")
PART_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # as DCP names them
# What wrappers put before or into names: torch.compile, DistributedDataParallel, FSDP.
WRAPPER_PREFIX = re.compile(r"(^|(?<=\.))(_orig_mod|module|_fsdp_wrapped_module)\.")


# ---- out_ckpt.pt: a model to use ----------------------------------------------------------------


def save_model(path: Path, model: nn.Module, step: int, val_loss: float | None):
    """Writes `out_ckpt.pt`, adapters merged, or leaves the old one untouched.

    Raises:
        UserError: no space or no permission.
    """
    write_model(path, model.config, merged_state(model), step, val_loss)


def write_model(
    path: Path, config: GPT2Config, tensors: dict[str, Tensor], step: int, val_loss: float | None
):
    """The same for tensors with which nothing else happens meanwhile."""
    content = {
        "format": FORMAT,
        "model": _on_cpu(tensors),
        "config": to_dict(config),
        "step": step,
        "val_loss": val_loss,
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        sync(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when the disk is full
        raise UserError(why_not_written(path, error, size_of(tensors))) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_adapter(folder: Path, tensors: dict[str, Tensor], settings: bytes):
    """Writes what `lora.to_peft` made of a model's adapters, as `peft` reads it.

    Raises:
        UserError: no space or no permission.
    """
    with committed(folder, (safetensors.SafetensorError,)) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_bytes(settings)


def load_model(path: str | Path) -> tuple[GPT2Config, dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_model` wrote, or a checkpoint of nanoGPT, build-nanogpt or llm.c.

    Returns:
        (config, state dict on the CPU, the rest of the file: `step`, `val_loss`; for a foreign
        file also `origin`, and `notes` on what had to be changed).

    Raises:
        UserError: no file, a damaged or foreign file, one that would run code, weights that are
            not numbers.
    """
    path = Path(path)
    if foreign.is_llmc(path):
        config, state, rest = foreign.read_llmc(path)
        check_finite(state, path)
        return config, state, rest
    rest = _torch_load(path)
    if not isinstance(rest, dict) or not ({"model", "config"} <= set(rest) or "model_args" in rest):
        raise UserError(
            f"{path}: not a checkpoint of this project (needs ['config', 'model']), of nanoGPT, "
            "build-nanogpt or llm.c"
        )
    state = rest.pop("model", None)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{path}: its `model` is not a table of tensors")
    state = strip_prefixes(state)
    if foreign.is_nanogpt(rest):
        config, state, rest = foreign.from_nanogpt(state, rest, path)
    else:
        if rest.get("format") == FORMAT and zipfile.is_zipfile(path):
            check_sums(path)
        settings = rest.pop("config")
        if not isinstance(settings, dict) or not all(
            isinstance(value, int | float) or name in SWITCH_NAMES
            for name, value in settings.items()
        ):
            raise UserError(f"{path}: its `config` is not a table of numbers")
        config = GPT2Config.from_dict(settings)
    check_finite(state, path)
    return config, state, rest


def check_finite(state: dict[str, Tensor], path: Path):
    """Raises UserError for weights that are not numbers."""
    odd = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if odd:
        raise UserError(f"{path}: NaN or infinity in {odd[0]} ({len(odd)} tensors in all)")


def load_into(model: nn.Module, state: dict[str, Tensor], source: str | Path):
    """Gives a model the tensors of a state dict, which must fit exactly.

    Raises:
        UserError: names and shapes that are missing, unexpected or different.
    """
    own = model.state_dict()
    state = {n: t for n, t in state.items() if n != "lm_head.weight"}  # tied: stored as wte
    problems = [f"missing {n}" for n in own if n not in state]
    problems += [f"unexpected {n}" for n in state if n not in own]
    problems += [
        f"{n} is {tuple(state[n].shape)} instead of {tuple(own[n].shape)}"
        for n in own
        if n in state and own[n].shape != state[n].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source} does not fit the model: {', '.join(problems[:3])}{more}")
    state = {n: parallel.like(t, own[n]) for n, t in state.items()}
    model.load_state_dict(state, assign=any(t.is_meta for t in own.values()))


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what torch.compile, DDP and FSDP put into them, in any mix."""
    return {WRAPPER_PREFIX.sub("", name): tensor for name, tensor in state.items()}


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


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _torch_load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_stand_ins(path)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, it is damaged or holds more than tensors and plain values "
            f"({first_line(error)})"
        ) from None
    except Exception as error:  # noqa: BLE001 - on damaged bytes the unpickler raises anything
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error)})") from None


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    """Our empty class in place of any GPTConfig that a pickle names, such as build-nanogpt's."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001 - on damaged bytes the unpickler raises anything
        return []  # torch.load will say what is wrong
    return [(foreign.GPTConfig, name) for name in named if name.endswith(".GPTConfig")]
