#!/usr/bin/env bash
# transformers 5.24.0: a deep copy of a GPT-2 that has generated with a static cache generates with the
# weights of the original. `generate` keeps the compiled call in the model, as `_compiled_call`.
# `copy.deepcopy` copies the parameters, but only refers to a function, and this one calls the original.
# The copy reads the prompt with its own weights and writes every further token with the other's: a text
# that neither model writes. Nothing warns. A best model that was put aside, or the reference of
# reinforcement learning, samples from the weights in training. It also keeps the original in memory.
#
# torch 2.13.0 does it alone after `model.forward = torch.compile(model.forward)`, a line that many use
# with transformers as the class remains. `AveragedModel`, which starts from a deep copy, then reports
# the loss of the weights in training as that of their average. It averages rightly; it runs the wrong
# model. `torch.compile(model)` and `model.compile()` are copied right.
#
# On a GPU `generate` compiles without being asked. On a CPU it compiles with a switch that transformers
# has for its tests, `_compile_all_devices`, which is used here; `get_compiled_call` needs none. Ways out:
# copy before the first `generate`, `disable_compile=True`, a new model that loads the state dict, and for
# training `model.compile()`.
#
# Seen on Python 3.11, 2 layers, random weights; a copy is made, then the original trains for 20 steps
#   get_compiled_call of the copy: logits are 9.9 away from the copy's, 0 from the original's
#   tokens of the copy, no cache      [35, 85, 74, 92, 92, 92, 92, 92, 60, 75, 74, 85]
#   tokens of the copy, static cache  [35, 76, 53, 76, 4, 25, 7, 8, 27, 50, 69, 96]
#   tokens of the original            [89, 23, 82, 13, 25, 95, 13, 52, 40, 38, 92, 11]
#   loss after model.forward = ...: trained 0.01, AveragedModel 0.01, its weights in a new model 3.55
#   loss after torch.compile(model) and after model.compile(): trained 0.01, AveragedModel 3.55
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==5.24.0
cat > try.py <<'PY'
import copy
from collections.abc import Callable

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CompileConfig, DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

logging.set_verbosity_error()
rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 100, "n_positions": 64}
wide = {"initializer_range": 0.2}  # so that greedy texts vary
config = GPT2Config(**shape, **rates, **wide, bos_token_id=0, eos_token_id=None, pad_token_id=0)
torch.manual_seed(0)
start = GPT2LMHeadModel(config)
prompt, text = torch.randint(1, 100, (2, 8)), torch.randint(1, 100, (4, 32))
compiling = CompileConfig(backend="eager", mode=None)  # no compiler is needed to see this
compiling._compile_all_devices = True  # on a GPU: the default


def train(model: torch.nn.Module, ids: torch.Tensor, after: Callable[[], None] = lambda: None) -> None:
    """Twenty steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        after()


def plain(model: GPT2LMHeadModel) -> list[int]:
    """The first row's greedy tokens, without a cache."""
    made = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False)
    return made[0, 8:].tolist()


def static(model: GPT2LMHeadModel, **more: object) -> list[int]:
    """The same with a static cache."""
    options = {"cache_implementation": "static", "compile_config": compiling, **more}
    return model.generate(prompt, max_new_tokens=12, do_sample=False, **options)[0, 8:].tolist()


@torch.no_grad()
def mixed(reader: GPT2LMHeadModel, writer: GPT2LMHeadModel) -> list[int]:
    """Tokens if one model reads the prompt and another writes."""
    cache = DynamicCache(config=config)
    token = reader(prompt[:1], cache=cache).logits[:, -1:].argmax(-1)
    made = [token.item()]
    while len(made) < 12:  # the cache holds what both have read
        token = writer(token, cache=cache).logits[:, -1:].argmax(-1)
        made.append(token.item())
    return made


def fresh(model: torch.nn.Module) -> GPT2LMHeadModel:
    """A new model with these weights."""
    made = GPT2LMHeadModel(config).eval()
    made.load_state_dict(model.state_dict())
    return made


def averaged(compile_it: Callable[[GPT2LMHeadModel], torch.nn.Module]) -> list[float]:
    """Losses: of the trained weights, of AveragedModel, of AveragedModel's weights in a new model."""
    model = compile_it(copy.deepcopy(start))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    train(model, text, lambda: average.update_parameters(model))
    with torch.no_grad():
        weights = fresh(getattr(average.module, "_orig_mod", average.module))
        return [m(text, labels=text).loss.item() for m in (model, average, weights)]


def forward(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Compile the method in place."""
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def module(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Compile the module in place."""
    model.compile(backend="eager")
    return model


good = True
model = copy.deepcopy(start).eval()
before = copy.deepcopy(model)
good &= static(model) == plain(model)
kept = copy.deepcopy(model)
train(model, text)

with torch.no_grad():
    logits = kept.get_compiled_call(compiling)(prompt).logits
    own, other = (logits - kept(prompt).logits).abs().max(), (logits - model(prompt).logits).abs().max()
print(f"get_compiled_call of the copy: {own:.1f} away from the copy's logits, {other:.1g} from the original's")
good &= own.item() > 1 and other.item() < 1e-4

print("copy, no cache                      ", plain(kept))
print("copy, static cache                  ", static(kept))
print("copy reads, original writes         ", mixed(kept, model))
print("original, no cache                  ", plain(model))
print("copy made before the first generate ", static(before))
print("copy, static, disable_compile=True  ", static(kept, disable_compile=True))
print("copy's state dict in a new model    ", static(fresh(kept)))
good &= static(kept) == mixed(kept, model) and static(kept) not in (plain(kept), plain(model))
good &= plain(kept) == static(before) == static(kept, disable_compile=True) == static(fresh(kept))

ways = {"model.forward": forward, "torch.compile(model)": lambda m: torch.compile(m, backend="eager")}
for name, how in {**ways, "model.compile()": module}.items():
    trained, average, weights = averaged(how)
    print(f"{name}: trained {trained:.2f}, AveragedModel {average:.2f}, its weights {weights:.2f}")
    wrong = abs(average - trained) < 1e-4 and abs(average - weights) > 1
    right = abs(average - weights) < 1e-4 and abs(average - trained) > 1
    good &= wrong if name == "model.forward" else right
print("as described" if good else "the behaviour has changed")
raise SystemExit(0 if good else 1)
PY
venv/bin/python try.py
