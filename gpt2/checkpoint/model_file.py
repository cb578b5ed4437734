"""`out_ckpt.pt`, a model for inference: `model`, `config`, `step`, `val_loss` and `format`.

The file is a dict, and `model` is a state dict with GPT-2's parameter names. Checkpoints of
nanoGPT, build-nanogpt and llm.c are also read (`other_formats.py`). Reading executes no code
(`safe_load.py`). A run resumes from a training state (`training_state.py`), which also holds the
optimizer state.
"""

from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config.model import GPT2Config, to_dict
from ..config.parameter_shapes import check_fit, check_size, parameter_shapes
from ..config.registry import check_known, plugins, warnings_of_changes
from ..config.switches import SWITCH_NAMES
from ..distributed import fsdp
from ..errors import UserError
from ..files import replacing_file, replacing_folder
from ..huggingface.kept_tokenizer import to_store
from ..huggingface.model_format import WRAPPER_PREFIX, with_table
from ..model.lora import merged_state
from ..paths import check_utf8
from ..report import console
from ..tokenizer import Tokenizer
from ..untrusted.display import shown
from ..untrusted.parsing import named
from . import other_formats
from .other_formats import number_of, shapes
from .safe_load import check_sums, in_memory, torch_load
from .write_errors import bytes_of, write_errors

FORMAT = 1  # of out_ckpt.pt
BASE_SAMPLE = "base_sample"  # see `lora.base_sample`, in the header of adapter_model.safetensors


# ---- writing ------------------------------------------------------------------------------------


def save_model(path: Path, model: Any, step: int, val_loss: float | None) -> None:
    """Writes a checkpoint of a model, with LoRA adapters merged into the weights.

    Raises:
        UserError: no space or no permission; an older file stays.
    """
    own = getattr(model, "own_tokenizer", None)
    write_model(path, model.config, merged_state(model), step, val_loss, own_tokenizer=own)


def write_model(
    path: Path,
    config: GPT2Config,
    tensors: dict[str, Tensor],
    step: int,
    val_loss: float | None,
    *,
    own_tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a checkpoint of a state dict. The tensors must not change during the write.

    Args:
        path: the file to write; a missing parent folder is created.
        config: the network's config.
        tensors: the state dict, on any device.
        step: optimizer steps done.
        val_loss: nats per token, if known.
        own_tokenizer: of a model that does not speak GPT-2's vocabulary.

    Raises:
        UserError: no space or no permission, or a name that is not UTF-8; an older file stays.
    """
    check_utf8(path)
    content = {
        "format": FORMAT,
        "model": on_cpu(tensors),
        "config": to_dict(config),
        "step": step,
        "val_loss": val_loss,
    }
    if parts := plugins():
        content["plugins"] = parts
    if own_tokenizer:
        content["tokenizer"] = to_store(own_tokenizer)
    with write_errors(path, bytes_of(tensors)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as temporary:
            torch.save(content, temporary)


def write_adapter(
    folder: Path, tensors: dict[str, Tensor], settings: bytes, sample: str = ""
) -> None:
    """Writes LoRA adapters in the format of `peft`.

    Args:
        folder: the folder to write; an existing one is replaced.
        tensors: the adapters' state dict, from `lora.to_peft`.
        settings: the content of adapter_config.json, from `lora.to_peft`.
        sample: of the base, from `lora.to_peft`; kept in the header of the file of tensors.

    Raises:
        UserError: no space or no permission; an older folder stays.
    """
    header = {"format": "pt"} | ({BASE_SAMPLE: sample} if sample else {})
    with write_errors(folder, bytes_of(tensors)), replacing_folder(folder) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", metadata=header)
        (temporary / "adapter_config.json").write_bytes(settings)


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with contiguous tensors in host memory, which safetensors requires."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


# ---- reading ------------------------------------------------------------------------------------


def load_model(path: str | Path) -> tuple[GPT2Config, dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint that `save_model` wrote, or one of nanoGPT, build-nanogpt or llm.c.

    Returns:
        (config, state dict on the CPU, other entries). The other entries include `step` and
        `val_loss`. A file of another project adds `origin`, the name of the project, and `notes`,
        one line for each change of the weights.

    Raises:
        UserError: the file is missing, damaged or of an unknown kind, would run code, or holds NaN
            or infinity.
    """
    path = Path(path)
    if other_formats.is_llmc(path):
        config, state, rest = other_formats.read_llmc(path)
        check_finite(state, path)
        return config, state, rest
    rest = torch_load(path)
    if not isinstance(rest, dict) or not ({"model", "config"} <= set(rest) or "model_args" in rest):
        bare = rest and isinstance(rest, dict) and all(isinstance(t, Tensor) for t in rest.values())
        hint = "; weights alone do not say how many heads: save_pretrained of transformers does"
        raise UserError(
            f"{path}: not a checkpoint of this project (needs ['config', 'model']), of nanoGPT, "
            f"build-nanogpt or llm.c{hint if bare else ''}"
        )
    state = rest.pop("model", None)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{path}: its `model` is not a table of tensors")
    state = strip_prefixes(state)
    state = with_table(state, state) if "transformer.wpe.weight" in state else state
    if odd := [n for n, t in state.items() if not t.is_floating_point()]:
        raise UserError(
            f"{path}: {shown(odd[0])} holds whole numbers; quantized files are not read"
        )
    if other_formats.is_nanogpt(rest):
        config, state, rest = other_formats.from_nanogpt(state, rest, path)
    else:
        if number_of(rest.get("format")) == FORMAT:
            check_sums(path)
        config = config_of(rest["config"], path, rest.get("plugins"))
        for warning in warnings_of_changes(rest.get("plugins"), path):
            console.warn(warning)
        check_size(config, path.stat().st_size, path)
        theirs = {n: t for n, t in state.items() if n != "lm_head.weight"}
        check_fit(parameter_shapes(config), shapes(theirs), path)
        numbers = {n: number_of(rest.get(n)) for n in ("format", "step", "val_loss")}
        rest = numbers | {n: rest[n] for n in ("tokenizer",) if n in rest}
    check_finite(state, path)
    return config, in_memory(state), rest


def config_of(settings: Any, path: Path, found: Any = None) -> GPT2Config:
    """The config in a checkpoint, with its plugins; raises UserError unless it is a network's."""
    if not isinstance(settings, dict) or not all(
        isinstance(value, int | float) or name in SWITCH_NAMES for name, value in settings.items()
    ):
        raise UserError(f"{path}: its `config` is not a table of numbers")
    with named(path):
        check_known(settings, found)
        return GPT2Config.from_dict(settings)


def check_finite(state: dict[str, Tensor], path: Path) -> None:
    """Raises UserError if a tensor holds NaN or infinity."""
    # `aminmax` makes no tensor of the size of its input, and NaN wins over numbers.
    odd = [n for n, t in state.items() if t.numel() and not all(map(isfinite, t.aminmax()))]
    if odd:
        raise UserError(f"{path}: NaN or infinity in {odd[0]} ({len(odd)} tensors in all)")


def load_into(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copies a state dict into a model. All names and shapes must match.

    Under FSDP each tensor is sharded like its parameter. Parameters on the meta device are replaced
    by the tensors of the state dict.

    Args:
        model: the network, on any device.
        state: the state dict.
        source: name of the file or folder, for error messages.

    Raises:
        UserError: a name is missing or unexpected, or a shape differs.
    """
    own = model.state_dict()
    state = {n: t for n, t in state.items() if n != "lm_head.weight"}  # tied to wte
    check_fit(shapes(own), shapes(state), source)
    state = {n: fsdp.like(t, own[n]) for n, t in state.items()}
    model.load_state_dict(state, assign=any(t.is_meta for t in own.values()))


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes of torch.compile, DDP and FSDP from names, in any combination."""
    return {WRAPPER_PREFIX.sub("", name): tensor for name, tensor in state.items()}
