"""LoRA adapters in the format of `peft`, read and merged into their base.

A folder holds adapter_config.json, which names the base, and adapter_model.safetensors with the
matrices A and B of each adapted layer. `gpt2 finetune --lora_rank=` writes it (`model/lora.py`).
Fields of adapter_config.json that would change the merged weights are refused, unless they have
the value of plain LoRA.

Shapes: `r` rank, `K` in, `N` out.
"""

import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config.finetune import LORA_TARGETS
from ..config.model import GPT2Config
from ..config.parameter_shapes import Shapes, check_fit, parameter_shapes
from ..errors import UserError
from ..huggingface.model_format import our_name
from ..huggingface.safetensors_header import FLOATS, read_header
from ..model.lora import PEFT_PREFIX, base_sample
from ..untrusted.display import shown
from ..untrusted.parsing import load_json, read_json
from .model_file import BASE_SAMPLE, check_finite

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
PART = re.compile(r"\.(lora_[AB])\.weight$")
MAX_RANK = 2**16
ROUNDED = 2.0**-8  # relative difference of weights and their bf16
TINY = 2.0**-24  # difference of small weights and their float16
# Fields of adapter_config.json that change the merged weights; each may only be absent, empty or
# of one of these values.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian"),  # others, such as pissa, also change the base
    **dict.fromkeys(("use_dora", "use_rslora", "use_qalora", "lora_bias", "layer_replication"), ()),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save"), ()),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens", "arrow_config"), ()),
}


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json, checked.

    Raises:
        UserError: it is missing or damaged, or not plain LoRA.
    """
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    odd = {n: values[n] for n, fine in PLAIN.items() if values.get(n) and values[n] not in fine}
    if values.get("peft_type") != "LORA":
        odd["peft_type"] = values.get("peft_type")
    if odd:
        listed = ", ".join(f"{name}={shown(repr(value))}" for name, value in odd.items())
        raise UserError(f"{path}: only plain LoRA is read, which has no {listed}")
    rank, alpha, base = (values.get(n) for n in ("r", "lora_alpha", "base_model_name_or_path"))
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise UserError(f"{path}: r is {shown(repr(rank))}, and must be from 1 to {MAX_RANK:,}")
    if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
        raise UserError(f"{path}: lora_alpha is {shown(repr(alpha))}, and must be a number above 0")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: it does not name its base_model_name_or_path")
    return values


def merged(
    folder: Path,
    settings: dict[str, Any],
    config: GPT2Config,
    state: dict[str, Tensor],
    origin: str,
) -> dict[str, Tensor]:
    """The base's state dict with W + (α / r) B A in place of each adapted W.

    Args:
        folder: of the adapters.
        settings: from `read_settings`.
        config: of the base.
        state: of the base, under our names.
        origin: of the base, for messages.

    Raises:
        UserError: the adapters are missing or damaged, do not fit the base, or were trained on
            other weights than it has.
    """
    path, rank = folder / ADAPTER_FILE, settings["r"]
    found, types = read_header(path)
    if odd := [name for name, kind in types.items() if kind not in FLOATS]:
        raise UserError(
            f"{path}: {shown(odd[0])} holds whole numbers; quantized files are not read"
        )
    if not found:
        raise UserError(f"{path} holds no adapters; train some with `gpt2 finetune --lora_rank=8`")
    names = {name: _our_part(name) for name in found}
    own = _adapter_shapes(config, rank)
    check_fit({n: s for n, s in own.items() if n.rpartition(".")[0] in _layers(names)},
              {names[n]: s for n, s in found.items()}, path)  # fmt: skip
    try:
        tensors = {names[n]: t.float() for n, t in load_file(path).items()}
        with safetensors.safe_open(path, "pt") as file:
            sample = (file.metadata() or {}).get(BASE_SAMPLE, "")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({shown(error)})") from None
    if sample and not _is_base(sample, base_sample(_layers(names), state)):
        raise UserError(
            f"{folder}: these adapters were trained on other weights than {origin} has now; use "
            "the base that they began with, or train them again"
        )
    changed, scale = {}, settings["lora_alpha"] / rank
    for layer in _layers(names):
        a, b = tensors[f"{layer}.lora_A"], tensors[f"{layer}.lora_B"]  # (r, K), (N, r)
        changed[f"{layer}.weight"] = state[f"{layer}.weight"] + scale * (b @ a)
    check_finite(changed, path)
    return state | changed


def _is_base(sample: str, found: list[float]) -> bool:
    """Whether the sample is of these weights, up to rounding to 16 bits.

    A sample that cannot be compared is of no weights.
    """
    try:
        kept = torch.tensor(load_json(sample.encode(), BASE_SAMPLE, list), dtype=torch.float64)
    except (ValueError, TypeError):  # UserError is a ValueError
        return False
    now = torch.tensor(found, dtype=torch.float64)
    if kept.shape != now.shape:
        return False
    # One by one: in a norm over all, the large weights would hide a change of the small ones.
    return bool(((kept - now).abs() <= ROUNDED * now.abs() + TINY).all())


def _our_part(name: str) -> str:
    """ "…h.0.attn.c_attn.lora_A" for peft's name of a matrix."""
    return PART.sub(r".\1", our_name(name.removeprefix(PEFT_PREFIX)))


def _layers(names: dict[str, str]) -> list[str]:
    """The adapted layers, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names.values()))


def _adapter_shapes(config: GPT2Config, rank: int) -> Shapes:
    """Shapes of A and B of every layer that can have adapters."""
    shapes: Shapes = {}
    for name, shape in parameter_shapes(config).items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer.rpartition(".")[2] in LORA_TARGETS:
            shapes[f"{layer}.lora_A"] = (rank, shape[1])
            shapes[f"{layer}.lora_B"] = (shape[0], rank)
    return shapes
