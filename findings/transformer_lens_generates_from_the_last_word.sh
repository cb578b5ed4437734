#!/usr/bin/env bash
# TransformerLens 4.3.0 with transformers 5.24.0: `generate` forgets the prompt. Each new word comes
# from the word before it alone, at the right position. `forward`, `run_with_cache` and the loss are
# right. So a network that is well trained writes badly, and an intervention that is judged by what
# the network writes is judged wrongly. Nothing warns.
#
# Since 5.24 transformers calls the argument that hands keys and values to a layer `cache`. The
# attention of `TransformerBridge` looks for the names of before, `past_key_values` and
# `layer_past` (model_bridge/generalized_components/attention.py, line 433). It finds none, keeps
# nothing, and attends to the new word alone. The cache stays empty. `generate` uses it by default,
# `hf_generate` too, and `return_type="logits_and_cache"` returns it with length 0. GPT-2 and Llama
# are touched, GPT-NeoX is right. The package asks for transformers 5.9 or later; 5.23.0 is right. The
# other way out is `use_past_kv_cache=False`.
#
# Seen on Python 3.11, torch 2.13.0, 2 layers; each word is the sum of the two before it, modulo 13;
# 100 prompts of 8 words, 12 words written greedily; the reference calls the network without a cache
#   loss of the network and of the bridge: 0.001
#   words that are right: the reference 100 %, use_past_kv_cache=False 100 %, generate 14 %,
#     hf_generate 14 %
#   words that equal what the last word alone predicts at its position: generate 100 %
#   length of the cache behind 8 words: 0
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==5.24.0 transformer-lens==4.3.0
cat > try.py <<'PY'
import copy
import importlib.metadata
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS, READ, NEW = 13, 8, 12
for package in ("torch", "transformers", "transformer-lens"):
    print(package, importlib.metadata.version(package))
torch.set_num_threads(1)
torch.manual_seed(0)


def texts(rows: int) -> torch.Tensor:
    """Rows in which each word is the sum of the two before it."""
    rows = [torch.randint(0, WORDS, (rows,)), torch.randint(1, WORDS, (rows,))]
    while len(rows) < READ + NEW:
        rows.append((rows[-1] + rows[-2]) % WORDS)
    return torch.stack(rows, 1)


names = {f"w{i}": i for i in range(WORDS)} | {"<end>": WORDS}
inner = Tokenizer(models.WordLevel(names, unk_token="<end>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
marks = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<end>")
PreTrainedTokenizerFast(tokenizer_object=inner, **marks).save_pretrained("words")
tokenizer = AutoTokenizer.from_pretrained("words")

rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": WORDS + 1, "n_positions": 32}
model = GPT2LMHeadModel(GPT2Config(**shape, **rates, bos_token_id=WORDS, eos_token_id=WORDS))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(400):
    ids = texts(64)
    logits = model(ids).logits[:, 1:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()
bridge = TransformerBridge.boot_transformers(
    "gpt2", hf_model=copy.deepcopy(model), tokenizer=tokenizer
)

with torch.no_grad():
    whole = texts(100)
    prompt, right = whole[:, :READ], whole[:, READ:]
    losses = [
        torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), whole[:, 2:].flatten())
        for logits in (model(whole).logits, bridge(whole))
    ]
    told = prompt
    for _ in range(NEW):
        told = torch.cat([told, model(told).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False, "verbose": False}
    options |= {"return_type": "tokens", "prepend_bos": False}
    made = {
        "the reference": told,
        "use_past_kv_cache=False": bridge.generate(prompt, use_past_kv_cache=False, **options),
        "generate": bridge.generate(prompt, **options),
        "hf_generate": bridge.hf_generate(prompt, max_new_tokens=NEW, do_sample=False),
    }
    alone = model(prompt).logits[:, -1:].argmax(-1)  # the first word sees the prompt
    for place in range(READ, READ + NEW - 1):
        logits = model(alone[:, -1:], position_ids=torch.full((100, 1), place)).logits
        alone = torch.cat([alone, logits.argmax(-1)], 1)
    _, cache = bridge(prompt, use_cache=True, return_type="logits_and_cache")

shares = {name: (ids[:, READ:] == right).float().mean().item() for name, ids in made.items()}
blind = (made["generate"][:, READ:] == alone).float().mean().item()
print("loss of the network and of the bridge: {:.3f} {:.3f}".format(*losses))
print("right:", ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
print(f"generate as by the last word alone {blind:.0%}; length of the cache {cache.get_seq_length()}")
good = max(losses) < 0.02 and blind == 1 and cache.get_seq_length() == 0
good &= shares["the reference"] > 0.99 and shares["use_past_kv_cache=False"] > 0.99
good &= shares["generate"] < 0.4 and shares["hf_generate"] < 0.4
raise SystemExit(0 if good else 1)
PY
venv/bin/python try.py 2> errors.txt || { cat errors.txt; exit 1; }
