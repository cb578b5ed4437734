"""Hugging Face names and layouts, both ways.

Modules have the same names there and here. Hugging Face's GPT-2 keeps its four matrices a block as
(in, out) ("Conv1D"), ours are (out, in) as in torch.nn.Linear; it stores the tied head a second
time as `lm_head.weight`, and old files hold causal masks as buffers.
"""

import re

from torch import Tensor

TRANSPOSED = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
MASK = re.compile(r"\.attn\.(masked_)?bias$")


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
