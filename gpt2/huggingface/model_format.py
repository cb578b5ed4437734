"""Hugging Face names, layouts and settings, both ways.

Modules have the same names there and here. Hugging Face's GPT-2 keeps its four matrices a block as
(in, out) ("Conv1D"), ours are (out, in) as in torch.nn.Linear; it stores the tied head a second
time as `lm_head.weight`, and old files hold causal masks as buffers.
"""

import json
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config.model import GPT2Config
from ..errors import UserError
from ..tokenizer import END_OF_TEXT

TRANSPOSED = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
MASK = re.compile(r"\.attn\.(masked_)?bias$")
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # of weights in several files
# What config.json may say of the network beyond its shape, and GPT-2's only answer.
SETTLED: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function
# Fields of the shape: ours, Hugging Face's, and its second name for the same.
SHAPE_FIELDS = (
    ("block_size", "n_positions", "max_position_embeddings"),
    ("vocab_size", "vocab_size", "vocab_size"),
    ("n_layer", "n_layer", "num_hidden_layers"),
    ("n_head", "n_head", "num_attention_heads"),
    ("n_embd", "n_embd", "hidden_size"),
)
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of GPT2LMHeadModel or GPT2Model, under our names and layout."""
    ours = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" or MASK.search(name):
            continue
        full = name if name.startswith("transformer.") else f"transformer.{name}"
        ours[full] = tensor.t().contiguous() if TRANSPOSED.search(name) else tensor
    return ours


def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names and layout of GPT2LMHeadModel."""
    theirs = {
        name: tensor.t().contiguous() if TRANSPOSED.search(name) else tensor
        for name, tensor in state.items()
    }
    theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    return theirs


def is_mask(name: str) -> bool:
    """Whether a tensor is a causal mask that was stored as a buffer, and no parameter."""
    return bool(MASK.search(name))


def check_tied(state: dict[str, Tensor], embedding: str, path: Path) -> None:
    """Raises UserError when the head is there and is not the token embedding."""
    head, table = state.get("lm_head.weight"), state.get(embedding)
    if head is not None and table is not None and not torch.equal(head, table):
        raise UserError(
            f"{path}: lm_head.weight differs from {embedding}; a GPT-2 has one table for both"
        )


def config_from_hf(values: dict[str, Any], path: Path) -> GPT2Config:
    """The shape that a config.json describes.

    Dropout is taken over where the three kinds agree, and is 0 otherwise.

    Raises:
        UserError: another kind of network, naming the field that makes it so.
    """
    if values.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type {values.get('model_type')!r} is not gpt2")
    odd = {n: values[n] for n, only in SETTLED.items() if values.get(n, only) != only}
    odd |= {n: values[n] for n in ("quantization_config", "pruned_heads") if values.get(n)}
    if values.get("activation_function", TANH_GELUS[0]) not in TANH_GELUS:
        odd["activation_function"] = values["activation_function"]
    shape = {}
    for ours, name, second in SHAPE_FIELDS:
        default = getattr(GPT2Config, ours)  # what transformers takes too for a missing field
        shape[ours] = values.get(name, values.get(second, default))
    config = GPT2Config(**shape, dropout=_common_dropout(values))
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        odd["n_inner"] = values["n_inner"]
    if odd:
        listed = ", ".join(f"{name}={value!r}" for name, value in odd.items())
        raise UserError(f"{path}: not GPT-2's network, which has no {listed}")
    return config


def config_to_hf(config: GPT2Config) -> dict[str, Any]:
    """What config.json says, for transformers, vLLM and llama.cpp (which reads n_ctx)."""
    shape = {name: getattr(config, ours) for ours, name, _ in SHAPE_FIELDS}
    end = END_OF_TEXT if config.vocab_size > END_OF_TEXT else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **shape,
        "n_ctx": config.block_size,
        "n_inner": None,
        "activation_function": TANH_GELUS[0],
        **dict.fromkeys(DROPOUTS, config.dropout),
        **SETTLED,
        "initializer_range": 0.02,
        "bos_token_id": end,
        "eos_token_id": end,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "float32",
    }


def read_folder(folder: Path) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The model in a folder of config.json and safetensors, whole or in several files.

    Returns:
        (config, state dict under our names, float32, on the CPU).

    Raises:
        UserError: what is missing, damaged, or not GPT-2's.
    """
    values = read_json(folder / CONFIG_FILE)
    config = config_from_hf(values, folder / CONFIG_FILE)
    state: dict[str, Tensor] = {}
    for name in weight_files(folder):
        try:
            state |= load_file(folder / name)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{folder / name}: missing or damaged ({error})") from None
    whole = [n for n, t in state.items() if not (t.is_floating_point() or is_mask(n))]
    if whole:
        raise UserError(f"{folder}: {whole[0]} holds whole numbers; quantized files are not read")
    prefix = "transformer." if any(n.startswith("transformer.") for n in state) else ""
    check_tied(state, f"{prefix}wte.weight", folder)
    return config, {name: t.float() for name, t in from_hf(state).items()}


def weight_files(folder: Path) -> list[str]:
    """Names of a folder's safetensors.

    Raises:
        UserError: there are none, or an index that is damaged or points out of the folder.
    """
    if (folder / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    if not (folder / INDEX_FILE).exists():
        pickled = " (pytorch_model.bin is a pickle and is not read)"
        pickled = pickled if list(folder.glob("pytorch_model*.bin")) else ""
        raise UserError(
            f"{folder} holds no {WEIGHTS_FILE}{pickled}; save_pretrained of transformers makes one"
        )
    return index_files(folder / INDEX_FILE)


def index_files(path: Path) -> list[str]:
    """Names of the files that an index lists; raises UserError when it is damaged."""
    table = read_json(path).get("weight_map")
    names = sorted(set(table.values())) if isinstance(table, dict) else []
    if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
        raise UserError(f"{path}: its weight_map is not a table of files beside it")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises UserError when it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def _common_dropout(values: dict[str, Any]) -> float:
    found = {values.get(name, 0.1) for name in DROPOUTS}  # 0.1 is transformers' default
    return float(found.pop()) if len(found) == 1 else 0.0
