"""`out_ckpt.pt`, a model for use: a dict of `model`, `config`, `step`, `val_loss` and `format`.

`model` is a state dict with GPT-2's parameter names. Checkpoints of nanoGPT, build-nanogpt and
llm.c are read too (`other_formats.py`). Reading never executes code (`safe_load.py`). A run resumes
from a training state instead, which also has the optimizer state (`training_state.py`).
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config.model import GPT2Config, to_dict
from ..config.switches import SWITCH_NAMES
from ..distributed import fsdp
from ..errors import UserError
from ..files import replacing_file, replacing_folder
from ..model.lora import merged_state
from . import other_formats
from .safe_load import check_sums, torch_load
from .write_errors import bytes_of, write_errors

FORMAT = 1  # of out_ckpt.pt
# Parts of names that come from wrappers: torch.compile, DistributedDataParallel, FSDP.
WRAPPER_PREFIX = re.compile(r"(^|(?<=\.))(_orig_mod|module|_fsdp_wrapped_module)\.")


# ---- writing ------------------------------------------------------------------------------------


def save_model(path: Path, model: Any, step: int, val_loss: float | None) -> None:
    """Writes a checkpoint of a model, LoRA adapters merged into its weights.

    Raises:
        UserError: no space or no permission; an older file is still there.
    """
    write_model(path, model.config, merged_state(model), step, val_loss)


def write_model(
    path: Path, config: GPT2Config, tensors: dict[str, Tensor], step: int, val_loss: float | None
) -> None:
    """Writes a checkpoint of a state dict; its tensors must not change during the write.

    Args:
        path: the file; its folder is made if it is missing.
        config: of the network.
        tensors: the state dict, on any device.
        step: optimizer steps done.
        val_loss: nats per token, if it is known.

    Raises:
        UserError: no space or no permission; an older file is still there.
    """
    content = {
        "format": FORMAT,
        "model": on_cpu(tensors),
        "config": to_dict(config),
        "step": step,
        "val_loss": val_loss,
    }
    with write_errors(path, bytes_of(tensors)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as temporary:
            torch.save(content, temporary)


def write_adapter(folder: Path, tensors: dict[str, Tensor], settings: bytes) -> None:
    """Writes LoRA adapters as `peft` reads them.

    Args:
        folder: replaced if it is there.
        tensors: the adapters' state dict, from `lora.to_peft`.
        settings: the content of adapter_config.json, from `lora.to_peft`.

    Raises:
        UserError: no space or no permission; an older folder is still there.
    """
    with write_errors(folder), replacing_folder(folder) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_bytes(settings)


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with contiguous tensors in host memory, as file formats want them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


# ---- reading ------------------------------------------------------------------------------------


def load_model(path: str | Path) -> tuple[GPT2Config, dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint that `save_model` wrote, or one of nanoGPT, build-nanogpt or llm.c.

    Returns:
        (config, state dict on the CPU, everything else in the file). The last is a dict with `step`
        and `val_loss`. For the other projects' files it also has `origin`, the project's name, and
        `notes`, the changes that were made to the weights.

    Raises:
        UserError: the file is missing, damaged, of an unknown kind, would run code, or holds NaN or
            infinity.
    """
    path = Path(path)
    if other_formats.is_llmc(path):
        config, state, rest = other_formats.read_llmc(path)
        check_finite(state, path)
        return config, state, rest
    rest = torch_load(path)
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


def check_finite(state: dict[str, Tensor], path: Path) -> None:
    """Raises UserError if a tensor holds NaN or infinity."""
    odd = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if odd:
        raise UserError(f"{path}: NaN or infinity in {odd[0]} ({len(odd)} tensors in all)")


def load_into(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copies a state dict into a model. All names and shapes must match.

    Under FSDP each tensor is sharded like the parameter that it becomes. Parameters on the meta
    device are replaced by the given tensors.

    Args:
        model: the network, on any device.
        state: tensors by name.
        source: where they come from, for the message.

    Raises:
        UserError: names or shapes that are missing, unexpected or different.
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
    """Removes the parts of names that torch.compile, DDP and FSDP add, in any combination."""
    return {WRAPPER_PREFIX.sub("", name): tensor for name, tensor in state.items()}
