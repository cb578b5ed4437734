#!/usr/bin/env bash
# infini-transformer-pytorch 0.2.1: `InfiniTransformerWrapper.generate` reads the prompt's last segment
# alone. The network reads a text in segments, and packs each of them into a memory that the next ones
# ask (arXiv:2404.07143): a long text is what it is for. `generate` takes "the start of the very last
# segment" as the input (wrapper.py, lines 126 and 127) and calls the network once with it. The memory of the
# segments before is only made while words are written. For those that are prompt nobody makes it. So
# a prompt of 10,000 words with `segment_length=512` is a prompt of its last 272 words. Nothing warns, and
# the README's example has a prompt of one word, which is right, however long the text becomes.
#
# The loss is right, as the wrapper's `forward` hands the memory on from segment to segment. So the
# network learns to look back, and in use it has forgotten. The way out is to run the prompt's whole segments with
# `return_new_memories=True`, and to hand on `past_memories`, as `repaired` does below.
#
# Seen on Python 3.11, torch 2.13.0, 1 layer, segments of 8 words. A text names one of 8 keys in its first
# segment, and asks for it in each later one. 500 prompts that end in the question; chance is 12 %
#   question in segment 2: forward 100 %, generate 12 %, repaired 100 %
#   question in segment 3: forward 100 %, generate 12 %, repaired 100 %
#   question in segment 5: forward 100 %, generate 12 %, repaired 100 %
#   generate writes what the network says behind the last segment alone: 100 %
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy infini-transformer-pytorch==0.2.1 \
    rotary-embedding-torch==0.9.1 einops==0.8.2
cat > try.py <<'PY'
import importlib.metadata
import warnings

warnings.simplefilter("ignore")
import torch
from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

KEYS, NOISE, LENGTH, PLACE, STEPS = 8, 4, 8, 5, 400
QUESTION = KEYS
for package in ("torch", "infini-transformer-pytorch"):
    print(package, importlib.metadata.version(package))
torch.set_num_threads(1)
torch.manual_seed(0)


def texts(rows: int, segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts that name a key in the first segment and answer with it in all others; the keys."""
    key = torch.randint(KEYS, (rows, 1))
    words = torch.randint(KEYS + 1, KEYS + 1 + NOISE, (rows, segments, LENGTH))
    words[:, 0, 1] = key[:, 0]
    words[:, 1:, PLACE] = QUESTION
    words[:, 1:, PLACE + 1] = key
    return words.flatten(1), key[:, 0]


model = InfiniTransformer(num_tokens=KEYS + 1 + NOISE, dim=48, depth=1, dim_head=24, heads=2)
for attention, _ in model.layers:
    # half of each head looks into the memory; from the default of 10 this takes thousands of steps
    torch.nn.init.zeros_(attention.fastweight_mem.head_gates)
wrapper = InfiniTransformerWrapper(model, segment_length=LENGTH, detach_mems_every_num_segments=4)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(STEPS):
    wrapper(texts(64, 3)[0], backward=True)
    optimizer.step()
    optimizer.zero_grad()
wrapper.eval()
greedy = {"temperature": 0.0, "filter_fn": lambda logits, **_: logits, "filter_kwargs": {}}


@torch.no_grad()
def read(words: torch.Tensor) -> torch.Tensor:
    """The likeliest next word, with the memory handed on as in training."""
    memory = None
    for segment in words.split(LENGTH, dim=1):
        logits, _, memory = model(segment, past_memories=memory, return_new_memories=True)
    return logits[:, -1].argmax(-1)


@torch.no_grad()
def repaired(words: torch.Tensor) -> torch.Tensor:
    """The next word, where the whole segments of the prompt are read before the last one."""
    *past, last = words.split(LENGTH, dim=1)
    memory = None
    for segment in past:
        memory = model(segment, past_memories=memory, return_new_memories=True).past_memories
    return model(last, past_memories=memory).logits[:, -1].argmax(-1)


good = True
alone = []
for number in (2, 3, 5):
    words, key = texts(500, number)
    prompt = words[:, : (number - 1) * LENGTH + PLACE + 1]
    made = wrapper.generate(prompt=prompt, seq_len=prompt.shape[1] + 1, **greedy)[:, 0]
    alone.append((made == read(prompt[:, (number - 1) * LENGTH :])).float().mean().item())
    rights = [(word == key).float().mean().item() for word in (read(prompt), made, repaired(prompt))]
    print(f"question in segment {number}: ", end="")
    print("forward {:.0%}, generate {:.0%}, repaired {:.0%}".format(*rights))
    good &= rights[0] > 0.98 and rights[1] < 0.25 and rights[2] > 0.98
print(f"generate writes what the last segment alone says: {min(alone):.0%}")
raise SystemExit(0 if good and min(alone) > 0.99 else 1)
PY
venv/bin/python try.py 2> errors.txt || { cat errors.txt; exit 1; }
