#!/usr/bin/env bash
# torch 2.13.0, torch.optim.Muon, with the GPT-2 of transformers 5.24.0: the MLP's first matrix moves
# half as far in a step as in a GPT-2 of nn.Linear, its second twice as far, q, k and v 0.58 times. The
# two networks compute one function with one gradient. Muon's default (`adjust_lr_fn=None`, which is
# "original") multiplies the rate by √max(1, rows / columns) and takes rows for outputs, as nn.Linear
# has them; transformers' GPT-2 keeps its matrices as Conv1D, (inputs, outputs). Both accept each
# other, nothing warns, and training goes on with rates that nobody chose. `adjust_lr_fn=
# "match_rms_adamw"` depends on max(rows, columns) alone, and gives both networks the same step.
#
# Seen on Python 3.11; distance that a matrix moves, as a share of nn.Linear's
#   original         c_attn 0.577, c_proj 1.000, c_fc 0.500, mlp c_proj 2.000
#   match_rms_adamw  c_attn 1.000, c_proj 1.000, c_fc 1.000, mlp c_proj 1.000
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==5.24.0
cat > try.py <<'PY'
import copy

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

logging.set_verbosity_error()
torch.manual_seed(0)
config = GPT2Config(
    n_layer=1, n_head=2, n_embd=64, n_positions=32, vocab_size=100, bos_token_id=0, eos_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)
conv = GPT2LMHeadModel(config)
linear = copy.deepcopy(conv)
for parent in list(linear.modules()):
    for name, child in list(parent.named_children()):
        if isinstance(child, Conv1D):
            inputs, outputs = child.weight.shape
            own = nn.Linear(inputs, outputs)
            own.weight.data, own.bias.data = child.weight.data.T.contiguous(), child.bias.data
            setattr(parent, name, own)

idx = torch.randint(0, 100, (4, 32))
for model in (conv, linear):
    model(idx, labels=idx).loss.backward()


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """The block's four matrices."""
    block = model.transformer.h[0]
    found = {"c_attn": block.attn.c_attn, "c_proj": block.attn.c_proj}
    found |= {"c_fc": block.mlp.c_fc, "mlp c_proj": block.mlp.c_proj}
    return {name: layer.weight for name, layer in found.items()}


def moved(model: nn.Module, how: str) -> dict[str, torch.Tensor]:
    """What one step of Muon adds to each matrix, (outputs, inputs)."""
    weights = matrices(model)
    before = {name: w.detach().clone() for name, w in weights.items()}
    torch.optim.Muon(weights.values(), lr=0.02, weight_decay=0.0, adjust_lr_fn=how).step()
    steps = {name: w.detach() - before[name] for name, w in weights.items()}
    for name, w in weights.items():
        w.data.copy_(before[name])
    return {name: s.T if model is conv else s for name, s in steps.items()}


for name, w in matrices(linear).items():  # one function, one gradient
    assert torch.allclose(w.grad, matrices(conv)[name].grad.T, atol=1e-6)

wanted = {"original": [0.577, 1.0, 0.5, 2.0], "match_rms_adamw": [1.0] * 4}
as_described = True
for how, shares in wanted.items():
    a, b = moved(conv, how), moved(linear, how)
    found = [(a[name].norm() / b[name].norm()).item() for name in a]
    print(f"{how:16s} " + ", ".join(f"{n} {x:.3f}" for n, x in zip(a, found, strict=True)))
    near = all(abs(x - w) < 0.03 for x, w in zip(found, shares, strict=True))
    as_described = as_described and near
    for name in a:  # the direction is one
        cosine = (a[name] * b[name]).sum() / (a[name].norm() * b[name].norm())
        as_described = as_described and cosine.item() > 0.99
raise SystemExit(0 if as_described else 1)
PY
venv/bin/python try.py
