#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint stores a matrix that two modules share once for each of
# its names, where torch.save stores the shared storage once. A GPT-2 of 124M in float32, whose head
# is its token embedding, takes 652 MB instead of 498: 31 % more to write at every checkpoint, and to
# read at every start. `get_model_state_dict`, the function that is recommended for the purpose, keeps
# both names too; the optimizer's state has one. Nothing warns. A state dict without the head's name
# is as small as torch.save's file, and `strict=False` (StateDictOptions) reads it; the tie fills the
# head.
#
# Seen on Python 3.11, with the embedding and the blocks' matrices of GPT-2 124M:
#   parameters 497.3 MB, torch.save 497.3, dcp.save 651.7 (state_dict), 651.7 (get_model_state_dict)
#   without the name of the head 497.3; read back into a tied model: equal
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
cat > try.py <<'PY'
import os
import pathlib
import shutil
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

warnings.filterwarnings("ignore")


class Network(nn.Module):
    """The matrices of GPT-2 124M, with a head that is the token embedding."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        self.blocks = nn.Linear(768, 12 * 12 * 768, bias=False)
        self.head = nn.Linear(768, 50257, bias=False)
        self.head.weight = self.wte.weight
        for p in self.parameters():
            nn.init.normal_(p, std=std)


def stored(state: dict) -> int:
    """Bytes of a checkpoint."""
    shutil.rmtree("checkpoint", ignore_errors=True)
    dcp.save(state, checkpoint_id="checkpoint", no_dist=True)
    return sum(path.stat().st_size for path in pathlib.Path("checkpoint").glob("*"))


model = Network(0.02)
ideal = sum(4 * p.numel() for p in model.parameters())
torch.save(model.state_dict(), "model.pt")
whole = os.path.getsize("model.pt")
plain, recommended = stored(model.state_dict()), stored(get_model_state_dict(model))
fewer = {name: t for name, t in model.state_dict().items() if name != "head.weight"}
once = stored(fewer)

other = Network(0.5)
read = {name: torch.empty_like(t) for name, t in fewer.items()}
dcp.load(read, checkpoint_id="checkpoint", no_dist=True)
set_model_state_dict(other, read, options=StateDictOptions(strict=False))
equal = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
equal = equal and other.head.weight is other.wte.weight

mb = [f"{n / 1e6:.1f}" for n in (ideal, whole, plain, recommended, once)]
print(f"parameters {mb[0]} MB, torch.save {mb[1]}, dcp.save {mb[2]} (state_dict), {mb[3]} ", end="")
print(f"(get_model_state_dict)\nwithout the name of the head {mb[4]}; ", end="")
print(f"read back into a tied model: {'equal' if equal else 'not equal'}")
tied = 4 * 50257 * 768
twice = all(abs(n - ideal - tied) < 1e5 for n in (plain, recommended))
small = all(abs(n - ideal) < 1e5 for n in (whole, once))
raise SystemExit(0 if twice and small and equal else 1)
PY
venv/bin/python try.py
