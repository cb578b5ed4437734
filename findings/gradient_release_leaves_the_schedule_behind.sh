#!/usr/bin/env bash
# torch-optimi 0.3.3: with `gradient_release=True`, a training that resumes from a checkpoint keeps the learning rate of
# that checkpoint for good. A step inside the backward pass knows its parameter alone. So the optimizer stores
# each parameter's group, the dictionary with the rate, in that parameter's state (optimizer.py, `__init__`), and
# reads the rate from there (`state["group"]` in `step` of each optimizer). `load_state_dict` of torch gives the
# optimizer new groups, and states with copies of the old ones. A scheduler sets the rate of the new groups;
# `param_groups` and `get_last_lr()` show it. The steps are made with the copies, which nobody changes anymore.
# The documentation calls gradient release fully compatible with existing schedulers and training frameworks.
#
# A run that is interrupted in its warmup never warms up, one that is interrupted at its peak never decays. A rate
# or weight decay that is set by hand has no effect either. Nothing warns. Without `gradient_release`, the resumed
# run is the uninterrupted one. Each copied group also lists the parameters, so an optimizer's checkpoint
# contains all weights, and loading it keeps those alive for as long as the optimizer is.
# The way out is to store the groups anew after `load_state_dict`, as `repaired` does.
#
# Seen on Python 3.11, torch 2.13.0, a network that predicts the next of 32 words, AdamW, warmup of 30 of 300 steps
# to 0.01, then a cosine to 0; loss above the entropy of the text at the end of the run
#   uninterrupted: 0.036, with gradient release and without
#   resumed at 1: without gradient release 0.036; with it 0.209, rate used at the end 0.0007, shown 0
#   resumed at 15: without gradient release 0.036; with it 0.060, rate used at the end 0.0053, shown 0
#   resumed at 30: without gradient release 0.036; with it 0.075, rate used at the end 0.0100, shown 0
#   all three repaired: 0.036, weights equal to those of the uninterrupted run
#   Adam, Adan, Lion, RAdam, Ranger, SGD and StableAdamW have the same fault
#   checkpoint of the optimizer: 3.2 times the weights with gradient release, 2.1 without
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy packaging torch-optimi==0.3.3
cat > try.py <<'PY'
import importlib.metadata
import io
import math

import optimi
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

WORDS, STEPS, WARMUP, RATE = 32, 300, 30, 0.01
OTHERS = ("Adam", "Adan", "Lion", "RAdam", "Ranger", "SGD", "StableAdamW")
for package in ("torch", "torch-optimi"):
    print(package, importlib.metadata.version(package))
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
FOLLOWS = (torch.randn(WORDS, WORDS) * 2).softmax(-1)
ENTROPY = -(FOLLOWS * FOLLOWS.log()).sum(-1).mean().item()


def share(step: int) -> float:
    """Share of the greatest rate at a step."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))


class Run:
    """Model, optimizer and schedule, made anew as a script does when it starts."""

    def __init__(self, name: str, release: bool) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Embedding(WORDS, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, WORDS))
        kind = getattr(optimi, name)
        self.optimizer = kind(self.model.parameters(), lr=RATE, weight_decay=0.0, gradient_release=release)
        if release:
            optimi.prepare_for_gradient_release(self.model, self.optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
        self.parts = self.model, self.optimizer, self.schedule

    def train(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            draw = torch.Generator().manual_seed(step)
            word = torch.randint(0, WORDS, (256,), generator=draw)
            target = torch.multinomial(FOLLOWS[word], 1, generator=draw)[:, 0]
            cross_entropy(self.model(word), target).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self.parts], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO, repaired: bool) -> None:
        for part, state in zip(self.parts, torch.load(file), strict=True):
            part.load_state_dict(state)
        if repaired:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter]["group"] = group

    @torch.no_grad()
    def excess(self) -> float:
        scores = self.model(torch.arange(WORDS)).log_softmax(-1)
        return -(FOLLOWS * scores).sum(-1).mean().item() - ENTROPY

    def weights(self) -> torch.Tensor:
        return parameters_to_vector(self.model.parameters()).detach().clone()


def resumed(name: str, release: bool, at: int, repaired: bool = False) -> Run:
    first = Run(name, release)
    first.train(0, at)
    file = first.save()
    second = Run(name, release)
    second.load(file, repaired)
    second.train(at, STEPS)
    return second


whole = {}
for release in (False, True):
    whole[release] = Run("AdamW", release)
    whole[release].train(0, STEPS)
print(f"AdamW, loss above the entropy: uninterrupted {whole[False].excess():.3f}, released {whole[True].excess():.3f}")
good = bool(torch.allclose(whole[False].weights(), whole[True].weights(), atol=1e-9))
least = whole[True].excess()
for at in (1, 15, 30):
    plain, wrong, right = (resumed("AdamW", *how) for how in ((False, at), (True, at), (True, at, True)))
    parameter = next(wrong.model.parameters())
    used, shown = wrong.optimizer.state[parameter]["group"]["lr"], wrong.schedule.get_last_lr()[0]
    print(
        f"  resumed at {at}: without gradient release {plain.excess():.3f}; with it {wrong.excess():.3f}, "
        f"rate used at the end {used:.4f}, shown {shown:.4f}; repaired {right.excess():.3f}"
    )
    good &= abs(used - RATE * share(at)) < 1e-12 and shown < 1e-9 and wrong.excess() > least + 0.01
    good &= all(torch.allclose(run.weights(), whole[True].weights(), atol=1e-9) for run in (plain, right))
for name in OTHERS:
    full = Run(name, True)
    full.train(0, STEPS)
    runs = [resumed(name, True, 30, repaired) for repaired in (False, True)]
    moved = [(run.weights() - full.weights()).abs().max().item() for run in runs]
    print(f"  {name}: greatest difference of a weight {moved[0]:.4f}, repaired {moved[1]:.4f}")
    good &= moved[0] > 1e-3 and moved[1] < 1e-9
sizes = {}
for release, run in whole.items():
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    sizes[release] = file.getbuffer().nbytes / (8 * run.weights().numel())
print(f"checkpoint of the optimizer over the weights: {sizes[True]:.1f}, without gradient release {sizes[False]:.1f}")
good &= sizes[True] > sizes[False] + 0.8
raise SystemExit(0 if good else 1)
PY
venv/bin/python -W ignore::UserWarning try.py
