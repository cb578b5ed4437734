#!/usr/bin/env bash
# transformers 5.24.0 with tokenizers 0.23.3: of a GPT-2 folder that holds config.json and weights but
# no tokenizer file, as `save_pretrained` of a model alone leaves it, `AutoTokenizer.from_pretrained`
# makes a tokenizer with one token. "Hello world" becomes no ids at all, and ids become the empty text,
# without an error or a warning. A model that is sampled, evaluated or trained through it sees empty
# input.
#
# Seen on Python 3.11: tokens 1, ids of "Hello world" [], text of 15496 and 995 ''
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.24.0 tokenizers==0.23.3
cat > try.py <<'PY'
import contextlib, io, os

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import AutoTokenizer, GPT2Config

GPT2Config(vocab_size=50257).save_pretrained("folder")
told = io.StringIO()
with contextlib.redirect_stderr(told):
    tokenizer = AutoTokenizer.from_pretrained("folder")
ids, text = tokenizer("Hello world")["input_ids"], tokenizer.decode([15496, 995])
print(f"tokens {len(tokenizer)}, ids of 'Hello world' {ids}, text of 15496 and 995 {text!r}")
print("said:", told.getvalue().strip() or "nothing")
raise SystemExit(0 if (len(tokenizer), ids, text) == (1, [], "") else 1)
PY
venv/bin/python try.py
