#!/usr/bin/env bash
# torch 2.13.0: building a module on the meta device, the way to learn a network's shapes without
# memory or arithmetic, imports the whole compiler (torch._dynamo, torch._inductor, sympy: over 500
# modules, one to four seconds of a process), as soon as one parameter is initialised by `normal_`.
# nn.Linear (uniform_) imports nothing; nn.Embedding (normal_) does: on the meta device that operator
# goes through a decomposition whose wrapper imports torch._dynamo. Nothing is compiled.
#
# Seen on Python 3.11: compiler modules 0 before, 0 after Linear, 529 after Embedding
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
cat > try.py <<'PY'
import sys
import time

import torch


def compiler_modules():
    names = ("torch._dynamo", "torch._inductor", "sympy")
    return sum(name.split(".")[0] in names or ".".join(name.split(".")[:2]) in names for name in sys.modules)


counts = [compiler_modules()]
with torch.device("meta"):
    torch.nn.Linear(2, 2)
    counts.append(compiler_modules())
    began = time.perf_counter()
    torch.nn.Embedding(2, 2)
seconds = time.perf_counter() - began
counts.append(compiler_modules())
print(f"torch {torch.__version__}: compiler modules {counts[0]} before, {counts[1]} after Linear, ", end="")
print(f"{counts[2]} after Embedding, which took {seconds:.1f} s")
raise SystemExit(0 if counts[:2] == [0, 0] and counts[2] > 100 else 1)
PY
venv/bin/python try.py
