#!/usr/bin/env bash
# transformers 5.24.0: documents in one row, told apart by position_ids that begin anew at 0 (what
# DataCollatorWithFlattening makes), are separate with eager and sdpa attention as long as
# `use_cache=False`. With the default, `use_cache=True`, every document sees those before it, although
# the cache that the call makes is empty and is thrown away: a mask for packed documents is built only
# where there is no cache object. `model.train()` changes nothing, and nothing warns. `Trainer` sets
# use_cache to False; a training loop of one's own, and an evaluation, do not. The loss stays plausible.
# Llama does the same as GPT-2, so it is the mask that both share.
#
# Seen on Python 3.11, torch 2.13.0; largest difference of a logit of the second of two documents from
# the document alone
#   gpt2 eager use_cache=False 0.000, default 0.071, default in training 0.071
#   gpt2 sdpa use_cache=False 0.000, default 0.071, default in training 0.071
#   llama eager use_cache=False 0.000, default 0.137, default in training 0.137
#   llama sdpa use_cache=False 0.000, default 0.137, default in training 0.137
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==5.24.0
cat > try.py <<'PY'
import warnings

import torch
from transformers import (
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

warnings.filterwarnings("ignore")
logging.set_verbosity_error()
torch.manual_seed(0)
first, second = (torch.randint(5, 100, (n,)).tolist() for n in (9, 7))
batch = DataCollatorWithFlattening()([{"input_ids": first}, {"input_ids": second}])
assert batch["position_ids"].tolist() == [[*range(9), *range(7)]]


def network(name: str, attention: str) -> torch.nn.Module:
    """A small network without dropout."""
    torch.manual_seed(0)
    shared = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0}
    shared["attn_implementation"] = attention
    if name == "gpt2":
        rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(**shape, **rates, **shared))
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **shared))


@torch.no_grad()
def difference(model: torch.nn.Module, **how: bool) -> float:
    """How far the second document's logits are from those of the document alone."""
    packed = model(**batch, **how).logits[0, len(first) :]
    alone = model(input_ids=torch.tensor([second]), use_cache=False).logits[0]
    return (packed - alone).abs().max().item()


as_described = True
for name in ("gpt2", "llama"):
    for attention in ("eager", "sdpa"):
        model = network(name, attention).eval()
        apart, default = difference(model, use_cache=False), difference(model)
        training = difference(model.train())
        print(f"{name} {attention} use_cache=False {apart:.3f}, ", end="")
        print(f"default {default:.3f}, default in training {training:.3f}")
        as_described = as_described and apart < 1e-5 and min(default, training) > 0.01
raise SystemExit(0 if as_described else 1)
PY
venv/bin/python try.py
