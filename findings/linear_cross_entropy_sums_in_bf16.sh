#!/usr/bin/env bash
# torch 2.13.0: with `options=LinearCrossEntropyOptions()`, F.linear_cross_entropy is the head and the
# loss of a language model in one call, without the logits in memory. For bf16 hidden states on a CPU
# (as under autocast) its loss is bf16, and so is the running sum over its chunks of rows. With GPT-2's
# vocabulary the chunks are small, and once the sum is 8 each of them adds less than half of its last
# bit. So a new model's 10.83 becomes 8.00, whatever the number of tokens from 512 on. Nothing warns.
# Gradients are right: a log, early stopping and a comparison of runs are wrong, the training is not.
# `options=None`, float32 and a `batch_chunk_size` of an eighth of the rows give the loss.
# Documented as equivalent to `cross_entropy(linear(input, linear_weight), target)`, which under
# autocast returns float32. 2.14.1 does the same.
#
# Seen on Python 3.11, 512 tokens, 64 channels, 50,257 classes, weights N(0, 0.02)
#   exact 10.834
#   options=None torch.float32 10.834 gradient off by 0.003
#   chunks torch.bfloat16 8.000 gradient off by 0.003
#   chunks of 64 rows torch.bfloat16 10.875 gradient off by 0.003
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
cat > try.py <<'PY'
import torch
import torch.nn.functional as F
from torch.nn import LinearCrossEntropyOptions

ROWS, CHANNELS, CLASSES = 512, 64, 50257
torch.manual_seed(0)
layer = torch.nn.Linear(CHANNELS, CHANNELS)
head = torch.randn(CLASSES, CHANNELS) * 0.02
x, target = torch.randn(ROWS, CHANNELS), torch.randint(CLASSES, (ROWS,))

weight = head.double().requires_grad_()
exact = F.cross_entropy(layer.double()(x.double()) @ weight.T, target)
exact.backward()
wanted = weight.grad
layer.float()
print(f"exact {exact.item():.3f}")

losses = []
for name, options in {
    "options=None": None,
    "chunks": LinearCrossEntropyOptions(),
    "chunks of 64 rows": LinearCrossEntropyOptions(batch_chunk_size=64),
}.items():
    weight = head.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.linear_cross_entropy(layer(x), weight, target, options=options)
    loss.backward()
    off = ((weight.grad - wanted).norm() / wanted.norm()).item()
    print(f"{name} {loss.dtype} {loss.item():.3f} gradient off by {off:.3f}")
    assert off < 0.02
    losses.append(loss.item() - exact.item())
whole, chunked, larger = losses
raise SystemExit(0 if abs(whole) < 0.01 and chunked < -2 and abs(larger) < 0.1 else 1)
PY
venv/bin/python try.py
