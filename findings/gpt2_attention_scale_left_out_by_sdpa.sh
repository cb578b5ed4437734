#!/usr/bin/env bash
# transformers 4.42 to 5.3: GPT-2's default attention (SDPA) leaves out two fields of config.json that
# set the factor of the attention scores, `scale_attn_by_inverse_layer_idx` and
# `scale_attn_weights=False`. It computes as if neither were set, without an error or a warning, also
# in training. attn_implementation="eager" obeys both. From 5.4 on both do. So a checkpoint with such a
# field, trained under 5.3 by default, gives other logits after an upgrade, and one from elsewhere gave
# wrong logits before it. Shown by 5.3.0 and 5.4.0; that 4.42.4 to 5.3.0 are alike and 5.4.0 to 5.24.0
# too was read in the sources of some versions between.
#
# Seen on Python 3.11, torch 2.13.0, a network of four layers with weights of N(0, 0.2); greatest
# difference of logits
#   5.3.0 scale_attn_by_inverse_layer_idx=True: SDPA and eager 2.04, SDPA with and without it 0.00
#   5.3.0 scale_attn_weights=False: SDPA and eager 3.80, SDPA with and without it 0.00
#   5.4.0 scale_attn_by_inverse_layer_idx=True: SDPA and eager 0.00, SDPA with and without it 2.04
#   5.4.0 scale_attn_weights=False: SDPA and eager 0.00, SDPA with and without it 3.80
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
cat > try.py <<'PY'
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

warnings.simplefilter("error")  # a warning would end the program
ignored = transformers.__version__ == "5.3.0"
shape = dict(n_layer=4, n_head=4, n_embd=64, n_positions=32, vocab_size=100, initializer_range=0.2)
ids = torch.arange(32)[None]


def logits(attention, **fields):
    torch.manual_seed(0)
    model = GPT2LMHeadModel._from_config(GPT2Config(**shape, **fields), attn_implementation=attention)
    return model.eval()(ids).logits.detach()


found = []
for field, value in {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}.items():
    by_default = logits(None, **{field: value})
    beside_eager = (by_default - logits("eager", **{field: value})).abs().max().item()
    without = (by_default - logits(None)).abs().max().item()
    assert torch.equal(by_default, logits("sdpa", **{field: value}))  # SDPA is the default
    print(f"{transformers.__version__} {field}={value}: SDPA and eager {beside_eager:.2f},"
          f" SDPA with and without it {without:.2f}")
    found.append((beside_eager > 0.5, without == 0))
raise SystemExit(0 if found == [(ignored, ignored)] * 2 else 1)
PY
for version in 5.3.0 5.4.0; do
  venv/bin/pip install --quiet torch==2.13.0 numpy "transformers==$version"
  venv/bin/python try.py
done
