"""Hugging Face's names, layouts and settings of GPT-2, both ways.

Module names are equal in both projects. Hugging Face's GPT-2 has four matrices per block in the
layout (in, out), called Conv1D; ours are (out, in) as in torch.nn.Linear. Hugging Face stores the
tied head a second time as `lm_head.weight`, or under this name alone, as safetensors does with
shared tensors. Old files store causal masks as buffers. torch.compile, DDP and FSDP add prefixes.
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
FILES_OF_WEIGHTS = (WEIGHTS_FILE, INDEX_FILE, "pytorch_model.bin")
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"
# Prefixes that torch.compile, DistributedDataParallel and FSDP add to parameter names.
WRAPPER_PREFIX = re.compile(r"(^|(?<=\.))(_orig_mod|module|_fsdp_wrapped_module)\.")
# Fields of config.json that change the network, with the one value that GPT-2 has.
SETTLED: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "add_cross_attention": False,
}
# Fields whose other value computes an equal function: in float32 what the first orders anew, and
# with queries that are divided when they are read (`divide_queries`).
EQUAL = {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False}
# Names of one function in transformers, which computes GELU by tanh, and of the exact one, by erf.
TANH_GELUS = (
    *("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("gelu_fast", "gelu_accurate"),
)
ERF_GELUS = ("gelu", "gelu_python")
ERF_NOTE = (
    "its GELU is computed by erf, GPT-2's and this network's by tanh; they differ by at most "
    "0.0005, so logits differ a little"
)
QUERY_NOTE = (
    "scores are divided by the number of the layer: its queries were, so that the function is equal"
)
# Shape fields: our name, Hugging Face's name, its other names.
SHAPE_FIELDS = (
    ("block_size", "n_positions", ("max_position_embeddings", "n_ctx")),
    ("vocab_size", "vocab_size", ()),
    ("n_layer", "n_layer", ("num_hidden_layers",)),
    ("n_head", "n_head", ("num_attention_heads",)),
    ("n_embd", "n_embd", ("hidden_size",)),
)
GPT2_KEYS = {"n_layer", "n_head", "n_embd"}  # of configs from before there was a model_type
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the state_dict of a GPT2LMHeadModel or GPT2Model to our names and layout."""
    ours = {}
    for theirs, tensor in state.items():
        name = our_name(theirs)
        if name != HEAD and not MASK.search(name):
            ours[name] = tensor.t().contiguous() if TRANSPOSED.search(name) else tensor
    return with_table(ours, {our_name(name): tensor for name, tensor in state.items()})


def our_name(name: str) -> str:
    """Our name of a tensor of GPT2LMHeadModel or GPT2Model, without prefixes of wrappers."""
    name = WRAPPER_PREFIX.sub("", name)
    return name if name.startswith("transformer.") or name == HEAD else f"transformer.{name}"


def with_table(ours: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Takes the head of `state` for the token embedding, where that is stored as the head alone."""
    return ours if TABLE in ours or HEAD not in state else ours | {TABLE: state[HEAD]}


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
    kind = values.get("model_type", "gpt2" if values.keys() >= GPT2_KEYS else None)
    if kind != "gpt2":
        raise UserError(f"{path}: model_type {shown(repr(kind))} is not gpt2")
    odd = {n: values[n] for n, only in SETTLED.items() if values.get(n, only) != only}
    odd |= {n: values[n] for n in EQUAL if not isinstance(values.get(n, False), bool)}
    odd |= {n: values[n] for n in ("quantization_config", "pruned_heads") if values.get(n)}
    if values.get("activation_function", TANH_GELUS[0]) not in TANH_GELUS + ERF_GELUS:
        odd["activation_function"] = values["activation_function"]
    shape = {}
    for ours, name, others in SHAPE_FIELDS:
        given = {n: values[n] for n in (name, *others) if values.get(n) is not None}
        if len(set(map(repr, given.values()))) > 1:
            listed = ", ".join(f"{n}={shown(repr(value))}" for n, value in given.items())
            raise UserError(f"{path}: {listed} are names of one size, and differ")
        default = getattr(GPT2Config, ours)  # equal to transformers' default
        shape[ours] = next(iter(given.values()), default)
    with named(path):
        config = GPT2Config(**shape, dropout=_common_dropout(values))
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        odd["n_inner"] = values["n_inner"]
    if odd:
        listed = ", ".join(f"{name}={shown(repr(value))}" for name, value in odd.items())
        raise UserError(f"{path}: not GPT-2's network, which has no {listed}")
    return config


def notes_on(values: dict[str, Any]) -> tuple[str, ...]:
    """What is done with a model whose config.json says more than `config_from_hf` keeps."""
    by_erf = values.get("activation_function") in ERF_GELUS
    divided = values.get("scale_attn_by_inverse_layer_idx") is True
    return ((ERF_NOTE,) if by_erf else ()) + ((QUERY_NOTE,) if divided else ())


def divide_queries(state: dict[str, Tensor], config: GPT2Config) -> None:
    """Divides the queries of layer i by i + 1, as `scale_attn_by_inverse_layer_idx` does scores.

    Args:
        state: under our names; changed in place.
        config: of the network.
    """
    for layer in range(config.n_layer):
        for kind in ("weight", "bias"):
            name = f"transformer.h.{layer}.attn.c_attn.{kind}"
            scale = torch.ones(3 * config.n_embd)
            scale[: config.n_embd] /= layer + 1
            state[name] = state[name] * (scale[:, None] if kind == "weight" else scale)


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
        **{n: SETTLED[n] for n in ("layer_norm_epsilon", "scale_attn_weights")},
        **EQUAL,
        "add_cross_attention": False,
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
    check_tied({our_name(name): tensor for name, tensor in state.items()}, TABLE, folder)
    ours = {name: t.float() for name, t in from_hf(state).items()}
    if values.get("scale_attn_by_inverse_layer_idx"):
        divide_queries(ours, config)
    return config, ours


def check_headers(files: list[Path], config: GPT2Config, folder: Path) -> None:
    """Compares the headers of safetensors files with a config, before tensors are read.

    Raises:
        UserError: damaged headers, or other tensors than the config describes.
    """
    found: Shapes = {}
    heads: Shapes = {}
    for path in files:
        shapes, types = read_header(path)
        whole = [n for n, kind in types.items() if kind not in FLOATS and not is_mask(n)]
        if whole:
            raise UserError(
                f"{folder}: {shown(whole[0])} holds whole numbers; quantized files are not read"
            )
        for theirs, shape in shapes.items():
            name = our_name(theirs)
            if name == HEAD:
                heads[name] = shape
            elif not is_mask(name):
                found[name] = shape[::-1] if TRANSPOSED.search(name) else shape
    check_size(config, sum(path.stat().st_size for path in files), folder)
    check_fit(parameter_shapes(config), with_table(found, heads), folder)


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
