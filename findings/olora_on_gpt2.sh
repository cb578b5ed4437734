#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: `LoraConfig(init_lora_weights="olora")` begins with the weights'
# own QR decomposition (OLoRA, arXiv:2406.01775): it takes B A out of the weight and adds it again, so
# a new adapter changes no output. GPT-2's layers (Conv1D) hold their weights transposed. PiSSA and
# "orthogonal" allow for that, OLoRA does not, with `fan_in_fan_out=True` or without. c_attn and c_fc
# are not square: making the adapter ends in "mat1 and mat2 shapes cannot be multiplied". The
# attention's c_proj is square: nothing is said, and the model is another one before its first step.
#
# Seen on Python 3.11, torch 2.13.0; largest change of a logit by a new adapter
#   lora on attn.c_proj 0.000
#   pissa on attn.c_proj 0.000
#   orthogonal on attn.c_proj 0.000
#   olora on attn.c_proj 0.166
#   pissa on c_attn 0.000
#   olora on c_attn: RuntimeError
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==5.24.0 peft==0.21.2
cat > try.py <<'PY'
import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

warnings.filterwarnings("ignore")
logging.set_verbosity_error()
torch.manual_seed(0)
shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 100, "n_positions": 32}
model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
ids = torch.randint(100, (2, 16))


@torch.no_grad()
def change(init: str | bool, target: str) -> float:
    """The largest difference of a logit that a new adapter makes."""
    config = LoraConfig(
        r=4, target_modules=rf".*\.{target}", init_lora_weights=init, fan_in_fan_out=True
    )
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    return (adapted(ids).logits - model(ids).logits).abs().max().item()


found = {}
for init, target in (
    (True, "attn.c_proj"),
    ("pissa", "attn.c_proj"),
    ("orthogonal", "attn.c_proj"),
    ("olora", "attn.c_proj"),
    ("pissa", "c_attn"),
):
    found[init, target] = change(init, target)
    print(f"{'lora' if init is True else init} on {target} {found[init, target]:.3f}")
moved = found.pop(("olora", "attn.c_proj"))
try:
    change("olora", "c_attn")
    refused = False
except RuntimeError as error:
    refused = "mat1 and mat2 shapes" in str(error)
    print("olora on c_attn: RuntimeError")
raise SystemExit(0 if moved > 0.01 and max(found.values()) < 1e-5 and refused else 1)
PY
venv/bin/python try.py
