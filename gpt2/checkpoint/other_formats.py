"""Checkpoints of nanoGPT, build-nanogpt and llm.c, converted to our names and layout.

nanoGPT's `ckpt.pt` is a dict with `model` and `model_args`. build-nanogpt's `model_00250.pt` is a
dict with `model` and `config`, an instance of a class GPTConfig. Both projects use GPT-2's
parameter names and (out, in) matrices, as we do. llm.c's `.bin` is a header of 256 int32, then each
parameter stacked over the blocks. Only `safe_load.py` unpickles.
"""

import re
import struct
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.model import GPT2_VOCAB_SIZE, GPT2Config
from ..config.parameter_shapes import Shapes, check_fit, check_size, parameter_shapes
from ..errors import UserError
from ..huggingface.model_format import check_tied, is_mask
from ..untrusted.parsing import named

NANOGPT_VOCAB_SIZE = 50304  # 50,257 padded to a multiple of 64; no token uses the added rows
WTE, TABLE = "transformer.wte.weight", re.compile(r"\.(wte|wpe)\.weight$")
NEEDED = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
LLMC_MAGIC, LLMC_HEADER_BYTES = 20240326, 1024
LLMC_DTYPES: dict[int, np.dtype] = {
    3: np.dtype("<f4"),
    5: np.dtype("<i2"),
}  # version 5 is bf16, read as its bits
LLMC_BLOCK = (  # parameters of a block: (name, shape in units of C)
    *(("ln_1.weight", (1,)), ("ln_1.bias", (1,))),
    *(("attn.c_attn.weight", (3, 1)), ("attn.c_attn.bias", (3,))),
    *(("attn.c_proj.weight", (1, 1)), ("attn.c_proj.bias", (1,))),
    *(("ln_2.weight", (1,)), ("ln_2.bias", (1,))),
    *(("mlp.c_fc.weight", (4, 1)), ("mlp.c_fc.bias", (4,))),
    *(("mlp.c_proj.weight", (1, 4)), ("mlp.c_proj.bias", (1,))),
)


class GPTConfig:
    """Replaces foreign classes of this name when unpickling; it has attributes and no methods."""


def is_nanogpt(content: dict[str, Any]) -> bool:
    """Whether an unpickled dict comes from nanoGPT or build-nanogpt."""
    return "model_args" in content or isinstance(content.get("config"), GPTConfig)


def from_nanogpt(
    state: dict[str, Tensor], content: dict[str, Any], path: Path
) -> tuple[GPT2Config, dict[str, Tensor], dict[str, Any]]:
    """Converts a checkpoint of nanoGPT or build-nanogpt.

    GPT-2's tanh GELU replaces nanoGPT's exact GELU; the two differ by at most 0.0005. Missing
    biases (nanoGPT's `bias=False`) become zeros, which compute an equal function. The padding rows
    of a vocabulary of 50,304 are removed.

    Args:
        state: the state dict, without prefixes of wrappers.
        content: the other entries of the file.
        path: the file, for error messages.

    Returns:
        (config, state dict, {origin, notes, step, val_loss}); notes has a line for each change.

    Raises:
        UserError: the settings or tensors do not describe a GPT-2.
    """
    nano = "model_args" in content
    settings = content["model_args"] if nano else vars(content["config"])
    if not isinstance(settings, dict) or not set(NEEDED) <= set(settings):
        raise UserError(f"{path}: does not say its {', '.join(NEEDED)}")
    shape = {name: settings[name] for name in NEEDED} | {"dropout": settings.get("dropout", 0.0)}
    if not all(isinstance(value, int | float) for value in shape.values()):
        raise UserError(f"{path}: its sizes are not numbers")
    with named(path):
        config = GPT2Config(**shape)
    check_size(config, path.stat().st_size, path)
    own, found = parameter_shapes(config), {n: t for n, t in state.items() if not is_mask(n)}
    found.pop("lm_head.weight", None)
    if settings.get("bias") is False:
        own = {n: s for n, s in own.items() if not n.endswith(".bias")}
    check_fit(own, shapes(found), path)
    check_tied(state, WTE, path)
    state = {n: t.float() for n, t in found.items()}
    notes = []
    if nano:
        notes.append(
            "nanoGPT computes GELU by erf, GPT-2 and this network by tanh: logits differ by about "
            "0.001"
        )
    if shape["vocab_size"] == NANOGPT_VOCAB_SIZE and WTE in state:
        shape["vocab_size"] = GPT2_VOCAB_SIZE
        state[WTE] = state[WTE][:GPT2_VOCAB_SIZE].clone()
        notes.append("47 rows that pad the vocabulary to 50,304 are cut off")
    if settings.get("bias") is False:
        for name in [n for n in state if n.endswith(".weight") and not TABLE.search(n)]:
            zeros = torch.zeros(state[name].shape[0])
            state.setdefault(name.removesuffix("weight") + "bias", zeros)
        notes.append("it has no biases: here they are zeros, which training will move")
    step, val_loss = (
        number_of(next((content[name] for name in names if name in content), None))
        for names in (("step", "iter_num"), ("val_loss", "best_val_loss"))
    )
    origin = "nanoGPT" if nano else "build-nanogpt"
    rest = {"origin": origin, "notes": notes, "step": step, "val_loss": val_loss}
    return replace(config, vocab_size=shape["vocab_size"]), state, rest


def number_of(value: Any) -> int | float | None:
    """The number in a scalar or one-element tensor; None for other values."""
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    known = isinstance(value, int | float) and (isinstance(value, float) or abs(value) < 2**63)
    return value if known else None


def shapes(state: dict[str, Tensor]) -> Shapes:
    """Shape of each tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def is_llmc(path: Path) -> bool:
    """Whether a file begins with the magic number of llm.c's checkpoints."""
    try:
        if not path.is_file():  # opening a FIFO would wait for ever
            return False
        with open(path, "rb") as file:
            return file.read(4) == struct.pack("<i", LLMC_MAGIC)
    except OSError:
        return False


def read_llmc(path: Path) -> tuple[GPT2Config, dict[str, Tensor], dict[str, Any]]:
    """Reads a `.bin` of llm.c as float32, without the padding rows of the vocabulary.

    Raises:
        UserError: the version is not GPT-2 in fp32 or bf16, or the size of the file is wrong.
    """
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(LLMC_HEADER_BYTES), dtype="<i4")
        if len(header) < 256:
            raise UserError(f"{path}: cut off inside its header")
        version, block_size, vocab, layers, heads, width, padded = map(int, header[1:8])
        if version not in LLMC_DTYPES:
            raise UserError(f"{path}: llm.c's version {version}; versions 3 and 5 are GPT-2's")
        with named(path):
            config = GPT2Config(
                block_size=block_size, vocab_size=vocab, n_layer=layers, n_head=heads, n_embd=width
            )
        dtype = LLMC_DTYPES[version]
        # The size in closed form: a list of the parts could be longer than the memory.
        block = sum(prod(units) * width ** len(units) for _, units in LLMC_BLOCK)
        numbers = (padded + block_size + 2) * width + layers * block
        wanted = LLMC_HEADER_BYTES + dtype.itemsize * numbers
        if (size := path.stat().st_size) != wanted or padded < vocab:
            raise UserError(f"{path}: damaged, {size:,} bytes instead of {wanted:,}")
        state = {}
        for name, shape in _llmc_parts(config, padded):
            values = np.fromfile(file, dtype, int(np.prod(shape))).reshape(shape)
            tensor = torch.from_numpy(values)
            state[name] = (tensor.view(torch.bfloat16) if version == 5 else tensor).float()
    state[WTE] = state[WTE][:vocab].clone()
    return config, state, {"origin": "llm.c"}


def _llmc_parts(config: GPT2Config, padded_rows: int) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each parameter in file order, which goes block by block per parameter."""
    C = config.n_embd
    parts: list[tuple[str, tuple[int, ...]]] = [
        (WTE, (padded_rows, C)),
        ("transformer.wpe.weight", (config.block_size, C)),
    ]
    for name, units in LLMC_BLOCK:
        shape = tuple(n * C for n in units)
        parts += [(f"transformer.h.{layer}.{name}", shape) for layer in range(config.n_layer)]
    return [*parts, ("transformer.ln_f.weight", (C,)), ("transformer.ln_f.bias", (C,))]
