#!/usr/bin/env bash
# torchao 0.18.0, transformers 5.24.0, torch 2.13.0: `quantize_(model, Int8WeightOnlyConfig())`, which
# should make the matrices of a model a quarter as large, makes GPT-2 larger. It looks for nn.Linear,
# and all four matrices of a GPT-2 block are transformers' Conv1D, so not one of them changes. The head
# is an nn.Linear: it gets an int8 copy, and the token embedding, with which it had shared its float32
# weight, stays beside it. Neither call warns, and the model still answers. What was one weight are
# two: training the embedding no longer trains the head.
#
# Seen on Python 3.11, GPT-2 of 124M parameters with new weights
#   before: 497.8 MB, head is embedding: True
#   after: 536.6 MB, head is embedding: False
#   int8: 0 of 48 matrices of the blocks, and the head
#   warnings: none
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==5.24.0 torchao==0.18.0
cat > try.py <<'PY'
import logging
import warnings

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import GPT2Config, GPT2LMHeadModel


def size(t: torch.Tensor) -> int:
    """Bytes of a tensor, or of the tensors that one of torchao consists of."""
    if type(t) in (torch.Tensor, torch.nn.Parameter):
        return t.numel() * t.element_size()
    return sum(size(getattr(t, name)) for name in t.__tensor_flatten__()[0])


def show(when: str) -> float:
    """Megabytes of all different parameters."""
    total = sum(size(p.data) for p in model.parameters()) / 1e6
    tied = model.lm_head.weight is model.transformer.wte.weight
    print(f"{when}: {total:.1f} MB, head is embedding: {tied}")
    return total


class Kept(logging.Handler):
    """Keeps what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        said.append(record.getMessage())


torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config()).eval()
before, said = show("before"), []
logging.getLogger().addHandler(Kept())
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    quantize_(model, Int8WeightOnlyConfig())
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()
after = show("after")
matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
changed = sum(type(p.data) is not torch.Tensor for p in matrices)
print(f"int8: {changed} of {len(matrices)} matrices of the blocks, and the head")
said += [str(w.message) for w in warned if "quant" in str(w.message).lower()]
print(f"warnings: {'; '.join(said) or 'none'}")
assert type(model.lm_head.weight.data).__name__ == "Int8Tensor"
raise SystemExit(0 if after > before and not changed and not said else 1)
PY
venv/bin/python try.py
