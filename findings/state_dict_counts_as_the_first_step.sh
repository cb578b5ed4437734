#!/usr/bin/env bash
# torch 2.13.0: asking for the state dict of an optimizer that has not stepped yet changes the training
# that follows. `get_state_dict` and `get_optimizer_state_dict` of torch.distributed.checkpoint, which
# distributed checkpoints begin with, are to read. On a fresh optimizer they take a step: gradients of
# zero, a rate of zero, `step()` (`_init_optim_state`, distributed/checkpoint/state_dict.py, lines 629 to
# 668). No weight moves. But the step is counted, its zeros are averaged, and what an optimizer derives
# from its first rate is derived from zero. A checkpoint that is loaded afterwards overwrites this. In a
# run that begins, none is loaded.
#
# So a checkpoint of step 0 is a checkpoint of step 1. The run that wrote it
# and each run that resumes from it make other updates than a run that wrote none. AdamW's first step is a
# quarter too short, as its correction of bias counts a step that was none; that fades in some twenty
# steps. Adamax' is half as long, SGD's with dampening 0.9 a tenth. ASGD makes none. Rprop takes its first
# step size from the rate, and is left with the smallest. `optimizer.state_dict()` reads only.
#
# Seen on Python 3.11; length of steps 1, 2, 3, 10 and 30 in units of the same run without the call,
# constant gradient, float64; the reference for AdamW is its formula with a step of zeros before
#   AdamW (0.9, 0.95): 0.735, 0.848, 0.899, 0.984, 1.002; the formula gives the same
#   AdamW (0.9, 0.999): 0.744, 0.859, 0.910, 0.995, 1.012; the formula gives the same
#   Adamax 0.526, 0.701, 0.788, 0.949, 0.996; RAdam 0.526, 0.701, 0.788, 1.087, 1.032
#   SGD with momentum and dampening 0.9: 0.100, 0.190, 0.271, 0.651, 0.958
#   ASGD 0 in the first, 1 in the others; Rprop 0.0001 in each
#   Adagrad, SGD with momentum 0.9: 1 in each; with optimizer.state_dict() instead all of them 1
#   step counter before any training: 1
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
cat > try.py <<'PY'
import copy
import io

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

STEPS, SHOWN = 30, (1, 2, 3, 10, 30)
print("torch", torch.__version__)


class Line(torch.nn.Module):
    """One weight for each of 4 numbers; the gradient is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        return (self.weight * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum()


def lengths(kind: type, before: str, **options: object) -> torch.Tensor:
    """Length of each step, after one of four things was done first."""
    model = Line()
    optimizer = kind(model.parameters(), **options)
    if before == "own state_dict":
        optimizer.state_dict()
    elif before in ("get_state_dict", "resumed"):
        weights, state = copy.deepcopy(get_state_dict(model, optimizer))
        if before == "resumed":
            stored = io.BytesIO()
            torch.save((weights, state), stored)
            stored.seek(0)
            weights, state = torch.load(stored)
            model = Line()
            optimizer = kind(model.parameters(), **options)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    found = []
    for _ in range(STEPS):
        old = model.weight.detach().clone()
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        found.append((model.weight.detach() - old).norm())
    return torch.stack(found)


def formula(beta1: float, beta2: float) -> torch.Tensor:
    """AdamW's step on a constant gradient, once with a step of zeros before, over the right one."""
    t = torch.arange(1, STEPS + 1, dtype=torch.float64)
    mean = (1 - beta1**t) / (1 - beta1 ** (t + 1))
    square = (1 - beta2**t) / (1 - beta2 ** (t + 1))
    return mean / square.sqrt()


plain = {"lr": 1e-2}
cases = {
    "AdamW 0.95": (torch.optim.AdamW, plain | {"betas": (0.9, 0.95), "weight_decay": 0.0}),
    "AdamW 0.999": (torch.optim.AdamW, plain | {"betas": (0.9, 0.999), "weight_decay": 0.0}),
    "Adamax": (torch.optim.Adamax, plain),
    "RAdam": (torch.optim.RAdam, plain),
    "SGD, dampening": (torch.optim.SGD, plain | {"momentum": 0.9, "dampening": 0.9}),
    "ASGD": (torch.optim.ASGD, plain),
    "Rprop": (torch.optim.Rprop, plain),
    "Adagrad": (torch.optim.Adagrad, plain),
    "SGD": (torch.optim.SGD, plain | {"momentum": 0.9}),
}
first = {"AdamW 0.95": 0.735, "AdamW 0.999": 0.744, "Adamax": 0.526, "RAdam": 0.526}
first |= {"SGD, dampening": 0.1, "ASGD": 0.0, "Rprop": 1e-4, "Adagrad": 1.0, "SGD": 1.0}
good = True
for name, (kind, options) in cases.items():
    right = lengths(kind, "nothing", **options)
    ratio = lengths(kind, "get_state_dict", **options) / right
    print(name, ", ".join(f"{ratio[step - 1]:.4g}" for step in SHOWN))
    good &= abs(ratio[0] - first[name]) < 2e-3
    good &= torch.allclose(lengths(kind, "resumed", **options) / right, ratio)
    good &= torch.equal(lengths(kind, "own state_dict", **options), right)
    if kind is torch.optim.AdamW:
        good &= torch.allclose(ratio, formula(*options["betas"]), rtol=1e-5)
model = Line()
_, state = get_state_dict(model, torch.optim.AdamW(model.parameters()))
counted = int(state["state"]["weight"]["step"])
print("step counter before any training:", counted)
raise SystemExit(0 if good and counted == 1 else 1)
PY
venv/bin/python try.py
