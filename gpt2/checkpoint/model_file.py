"""`out_ckpt.pt`, a model to use: a dict of `model`, `config`, `step`, `val_loss` and `format`.

`model` holds tensors under GPT-2's names. Checkpoints of nanoGPT, build-nanogpt and llm.c are read
as well (`other_formats.py`). Nothing here unpickles code: `weights_only=True` everywhere.
"""

import contextlib
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config.model import GPT2Config, to_dict
from ..config.switches import SWITCH_NAMES
from ..distributed import fsdp
from ..errors import UserError, first_line
from ..files import committed, sync, why_not_written
from ..model.lora import merged_state
from . import other_formats

FORMAT = 1  # of out_ckpt.pt
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
    if other_formats.is_llmc(path):
        config, state, rest = other_formats.read_llmc(path)
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
    if other_formats.is_nanogpt(rest):
        config, state, rest = other_formats.from_nanogpt(state, rest, path)
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
    state = {n: fsdp.like(t, own[n]) for n, t in state.items()}
    model.load_state_dict(state, assign=any(t.is_meta for t in own.values()))


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what torch.compile, DDP and FSDP put into them, in any mix."""
    return {WRAPPER_PREFIX.sub("", name): tensor for name, tensor in state.items()}


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
    return [(other_formats.GPTConfig, name) for name in named if name.endswith(".GPTConfig")]


def size_of(tree: Any) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        tree = list(tree.values())
    return sum(map(size_of, tree)) if isinstance(tree, list | tuple) else 0


def check_sums(path: Path):
    """Compares the check sums that are in a file of torch.save, which torch.load does not.

    Raises:
        UserError: a part that differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        damaged = first_line(error)
    if damaged:
        raise UserError(f"{path}: damaged ({damaged}); use another checkpoint")
