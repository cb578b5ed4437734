#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: `generate` puts the tuned prompt in front of every new token, not only
# in front of the text. Prompt tuning, p-tuning and prefix tuning are right in training and in `forward`, and
# their `generate` writes something else with its default, `use_cache=True`. The cause is a name: transformers
# 5.24 calls the argument `past_key_values` `cache`. peft looks for the old name to learn whether the prompt
# has been read already, finds nothing, and takes each step for the first. So all virtual tokens stand
# again between any two words of the answer, in the cache as well. Prefix tuning ends otherwise: its prefix goes
# by the old name, which is ignored once the new one is there, and only its length is left, in the positions.
# GPT-2 answers untuned and with shifted positions, Llama untuned.
#
# A user sees a low loss in training and a bad model in use. Scores that are made with `generate` measure
# nothing. Prompt tuning and p-tuning warn of nothing; prefix tuning gets a FutureWarning that the old name
# is ignored. peft sets no upper bound for transformers. With 5.23.0 all three are right. A way out with 5.24.0
# is `use_cache=False`, except for prefix tuning of Llama, which it does not help. LoRA is not concerned.
#
# Seen on Python 3.11, torch 2.13.0, 2 layers, random weights, 20 prompts of 7 tokens, 5 virtual tokens, 8 new
# tokens; right answers of 20, by default and with use_cache=False; the reference is `forward`, word by word
#   5.24.0 gpt2 prompt tuning 0 and 20, p-tuning 0 and 20, prefix tuning 0 and 20
#   5.24.0 llama prompt tuning 0 and 20, p-tuning 0 and 20, prefix tuning 0 and 1
#   5.24.0 prefix tuning as untuned: gpt2 with positions from 5 on 20, llama 20
#   5.23.0 gpt2 prompt tuning 20 and 20, p-tuning 20 and 20, prefix tuning 20 and 20
#   5.23.0 llama prompt tuning 20 and 20, p-tuning 20 and 20, prefix tuning 20 and 0, an error
#   length of the cache after 7 tokens read and 7 written: 5.24.0 54, 5.23.0 19
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
cat > try.py <<'PY'
import copy
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from peft import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
ROWS, NEW, VIRTUAL = 20, 8, 5
torch.manual_seed(0)
common = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
models = {
    "gpt2": GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, initializer_range=0.3, **common)
    ).eval(),
    "llama": LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            hidden_size=32,
            head_dim=16,
            intermediate_size=64,
            initializer_range=0.3,
            **common,
        )
    ).eval(),
}
methods = {
    "prompt tuning": (PromptTuningConfig, {}),
    "p-tuning": (PromptEncoderConfig, {"encoder_hidden_size": 16}),
    "prefix tuning": (PrefixTuningConfig, {}),
}
ids = torch.randint(1, 100, (ROWS, 7))
mask = torch.ones_like(ids)
length = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False}


@torch.no_grad()
def by_forward(model: torch.nn.Module, shift: int = 0) -> torch.Tensor:
    """Greedy search with one `forward` of the whole text for each word."""
    text = ids
    for _ in range(NEW):
        more = {"position_ids": torch.arange(text.shape[1])[None] + shift} if shift else {}
        logits = model(input_ids=text, attention_mask=torch.ones_like(text), **more).logits[:, -1]
        logits[:, 0] = -torch.inf  # min_new_tokens: no end
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    return text


def equal(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a == b).all(1).sum())


found, told = {}, []
for name, base in models.items():
    untuned = by_forward(base, VIRTUAL if name == "gpt2" else 0)
    for method, (config, extra) in methods.items():
        tuned = get_peft_model(
            copy.deepcopy(base), config(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **extra)
        ).eval()
        torch.manual_seed(1)
        for weight in tuned.parameters():  # as if trained
            if weight.requires_grad:
                weight.data += 0.5 * torch.randn_like(weight)
        right = by_forward(tuned)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = tuned.generate(
                input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **length
            )
        if any("past_key_values" in str(w.message) and "ignoring" in str(w.message) for w in caught):
            told.append(f"{name} {method}")
        warnings.simplefilter("ignore")
        try:
            slow = tuned.generate(input_ids=ids, attention_mask=mask, use_cache=False, **length)
        except RuntimeError:  # Llama, prefix tuning, 5.23.0: a prefix without a cache
            slow = torch.zeros_like(right)
        found[name, method] = (
            equal(out.sequences, right),
            equal(slow, right),
            equal(out.sequences, untuned),
        )
        if (name, method) == ("gpt2", "prompt tuning"):
            cache = out["cache"] if "cache" in out else out["past_key_values"]
            found["cache"] = cache.get_seq_length()
    print(
        transformers.__version__,
        name,
        ", ".join(f"{m} {found[name, m][0]} and {found[name, m][1]}" for m in methods),
    )
print(
    transformers.__version__,
    "prefix tuning as untuned:",
    ", ".join(f"{name} {found[name, 'prefix tuning'][2]}" for name in models),
)
print(transformers.__version__, "length of the cache", found["cache"], "warned of an ignored name:", told)
if sys.argv[1] == "wrong":
    good = all(found[n, m][0] <= 3 for n in models for m in methods)
    good &= all(found[n, m][1] == ROWS for n in models for m in methods if (n, m) != ("llama", "prefix tuning"))
    good &= found["llama", "prefix tuning"][1] <= 3
    good &= all(found[n, "prefix tuning"][2] == ROWS for n in models)
    good &= found["cache"] == 7 + VIRTUAL + (NEW - 1) * (1 + VIRTUAL)
    good &= not any("prefix" not in name for name in told)
else:
    good = all(found[n, m][0] == ROWS for n in models for m in methods)
    good &= all(found[n, m][1] == ROWS for n in models for m in methods if (n, m) != ("llama", "prefix tuning"))
    good &= found["cache"] == 7 + VIRTUAL + NEW - 1
raise SystemExit(0 if good else 1)
PY
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==5.24.0 peft==0.21.2
venv/bin/python try.py wrong
venv/bin/pip install --quiet transformers==5.23.0
venv/bin/python try.py right
