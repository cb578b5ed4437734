"""Hugging Face's names, layouts and settings of GPT-2, both ways.

Module names are equal in both projects. Hugging Face's GPT-2 has four matrices per block in the
layout (in, out), called Conv1D; ours are (out, in) as in torch.nn.Linear. Hugging Face stores the
tied head a second time as `lm_head.weight`. Old files store causal masks as buffers.
"""

import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config.model import GPT2Config
from ..config.parameter_shapes import Shapes, check_fit, check_size, parameter_shapes
from ..errors import UserError
from ..paths import below, is_below
from ..tokenizer import END_OF_TEXT
from ..untrusted.display import shown
from ..untrusted.parsing import named, read_json
from .safetensors_header import FLOATS, read_header

TRANSPOSED = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
MASK = re.compile(r"\.attn\.(masked_)?bias$")
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # lists weights in several files
# Fields of config.json that change the network, with the one value that GPT-2 has.
SETTLED: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function
# Shape fields: our name, Hugging Face's name, Hugging Face's alias.
SHAPE_FIELDS = (
    ("block_size", "n_positions", "max_position_embeddings"),
    ("vocab_size", "vocab_size", "vocab_size"),
    ("n_layer", "n_layer", "num_hidden_layers"),
    ("n_head", "n_head", "num_attention_heads"),
    ("n_embd", "n_embd", "hidden_size"),
)
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the state_dict of a GPT2LMHeadModel or GPT2Model to our names and layout."""
    ours = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" or MASK.search(name):
            continue
        ours[our_name(name)] = tensor.t().contiguous() if TRANSPOSED.search(name) else tensor
    return ours


def our_name(name: str) -> str:
    """Our name of a tensor of GPT2LMHeadModel or GPT2Model."""
    return name if name.startswith("transformer.") else f"transformer.{name}"


def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts our state_dict to the names and layout of GPT2LMHeadModel."""
    theirs = {
        name: tensor.t().contiguous() if TRANSPOSED.search(name) else tensor
        for name, tensor in state.items()
    }
    theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    return theirs


def is_mask(name: str) -> bool:
    """Whether a name is that of a causal mask, which old files store as a buffer."""
    return bool(MASK.search(name))


def check_tied(state: dict[str, Tensor], embedding: str, path: Path) -> None:
    """Raises UserError when a head exists and differs from the token embedding."""
    head, table = state.get("lm_head.weight"), state.get(embedding)
    if head is not None and table is not None and not torch.equal(head, table):
        raise UserError(
            f"{path}: lm_head.weight differs from {embedding}; a GPT-2 has one table for both"
        )


def config_from_hf(values: dict[str, Any], path: Path) -> GPT2Config:
    """The GPT2Config that a config.json describes.

    Dropout is 0 unless the three dropout fields agree.

    Raises:
        UserError: another kind of network; names the fields that differ.
    """
    if values.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type {shown(repr(values.get('model_type')))} is not gpt2")
    odd = {n: values[n] for n, only in SETTLED.items() if values.get(n, only) != only}
    odd |= {n: values[n] for n in ("quantization_config", "pruned_heads") if values.get(n)}
    if values.get("activation_function", TANH_GELUS[0]) not in TANH_GELUS:
        odd["activation_function"] = values["activation_function"]
    shape = {}
    for ours, name, second in SHAPE_FIELDS:
        default = getattr(GPT2Config, ours)  # equal to transformers' default
        shape[ours] = values.get(name, values.get(second, default))
    with named(path):
        config = GPT2Config(**shape, dropout=_common_dropout(values))
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        odd["n_inner"] = values["n_inner"]
    if odd:
        listed = ", ".join(f"{name}={shown(repr(value))}" for name, value in odd.items())
        raise UserError(f"{path}: not GPT-2's network, which has no {listed}")
    return config


def config_to_hf(config: GPT2Config, dtype: str = "float32") -> dict[str, Any]:
    """The content of config.json for transformers, vLLM and llama.cpp (which reads n_ctx).

    Args:
        config: shape of the network.
        dtype: of the tensors in the safetensors file, by torch's name.
    """
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
        "torch_dtype": dtype,
    }


def read_folder(folder: Path) -> tuple[GPT2Config, dict[str, Tensor]]:
    """Reads a model from a folder of config.json and safetensors, in one or several files.

    Returns:
        (config, state_dict under our names in float32 on the CPU).

    Raises:
        UserError: a file is missing, damaged, or not of a GPT-2.
    """
    values = read_json(folder / CONFIG_FILE)
    config = config_from_hf(values, folder / CONFIG_FILE)
    files = [below(folder, name) for name in weight_files(folder)]
    check_headers(files, config, folder)
    state: dict[str, Tensor] = {}
    for path in files:
        try:
            state |= load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: missing or damaged ({shown(error)})") from None
    prefix = "transformer." if any(n.startswith("transformer.") for n in state) else ""
    check_tied(state, f"{prefix}wte.weight", folder)
    return config, {name: t.float() for name, t in from_hf(state).items()}


def check_headers(files: list[Path], config: GPT2Config, folder: Path) -> None:
    """Compares the headers of safetensors files with a config, before tensors are read.

    Raises:
        UserError: damaged headers, or other tensors than the config describes.
    """
    found: Shapes = {}
    for path in files:
        shapes, types = read_header(path)
        whole = [n for n, kind in types.items() if kind not in FLOATS and not is_mask(n)]
        if whole:
            raise UserError(
                f"{folder}: {shown(whole[0])} holds whole numbers; quantized files are not read"
            )
        found |= {
            our_name(name): shape[::-1] if TRANSPOSED.search(name) else shape
            for name, shape in shapes.items()
            if name != "lm_head.weight" and not is_mask(name)
        }
    check_size(config, sum(path.stat().st_size for path in files), folder)
    check_fit(parameter_shapes(config), found, folder)


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files in a folder.

    Raises:
        UserError: no safetensors; an index that is damaged or names a file outside the folder.
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
    """Names of the files that an index lists; raises UserError for a damaged index."""
    table = read_json(path).get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else []
    if not names or not all(is_below(name) and "/" not in name for name in names):
        raise UserError(f"{path}: its weight_map is not a table of files beside it")
    return sorted(set(names))


def _common_dropout(values: dict[str, Any]) -> float:
    found = [values.get(name, 0.1) for name in DROPOUTS]  # 0.1 is transformers' default
    first = found[0]
    numbers = all(isinstance(value, int | float) for value in found)
    return float(first) if numbers and found == [first] * len(found) else 0.0
