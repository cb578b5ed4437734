#!/usr/bin/env bash
# titans-pytorch 0.5.5: `MemoryAsContextTransformer.sample(use_cache=True)` forgets the segment in which the
# prompt ends, if the prompt is longer than one segment. Attention looks back to the start of the segment;
# what lies before is left to the neural memory. So the keys and values of a segment are dropped when it is
# full. `forward` keeps the last `segment_len + num_longterm_mem_tokens` of them, and drops all if their number is
# that (mac_transformer.py, lines 877 to 882). That is right as long as they come one by one. Behind
# a longer prompt there are always that many, wherever in its segment it ends. So all are dropped.
# The first new word sees the prompt, as the prompt's own run wrote it, and those behind it do not. Segments are
# counted anew from there, so that every later word looks back over another stretch than in training.
#
# Nothing warns. Loss, `forward` and `use_cache=False`, the default, are right, and so is a prompt
# within one segment, or `sliding_window_attn=True`. The ways out are these, or to feed the prompt word by
# word through the cache, as `repaired` does.
#
# Seen on Python 3.11, torch 2.13.0, 2 layers, segments of 8 words, the second four the same as the first
# four. Prompts end in the middle of a segment, and 4 words are written; chance is 6 %
#   prompt of 4 words: without a cache 100 %, with it 100 %, repaired 100 %
#   prompt of 12 words: without a cache 100 %, with it 28 %, repaired 100 %
#   prompt of 20 words: without a cache 100 %, with it 31 %, repaired 100 %
#   prompt of 28 words: without a cache 100 %, with it 28 %, repaired 100 %
#   second to fourth word, with the cache: 6 %
#   keys kept behind 12 words: 0, where 4 are of the segment in progress
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy titans-pytorch==0.5.5
cat > try.py <<'PY'
import importlib.metadata
import warnings

warnings.simplefilter("ignore")
import torch
from titans_pytorch import MemoryAsContextTransformer

WORDS, HALF, STEPS = 16, 4, 90
for package in ("torch", "titans-pytorch"):
    print(package, importlib.metadata.version(package))
torch.set_num_threads(1)
torch.manual_seed(0)


def texts(rows: int) -> torch.Tensor:
    """Four segments, in each of which four words are said twice."""
    half = torch.randint(WORDS, (rows, 4, HALF))
    return torch.cat([half, half], 2).flatten(1)


model = MemoryAsContextTransformer(
    num_tokens=WORDS,
    dim=48,
    depth=2,
    segment_len=2 * HALF,
    heads=2,
    dim_head=24,
    num_persist_mem_tokens=2,
    num_longterm_mem_tokens=2,
    neural_memory_layers=(2,),
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(STEPS):
    loss = model(texts(16), return_loss=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()


def written(prompt: torch.Tensor, use_cache: bool) -> torch.Tensor:
    return model.sample(
        prompt,
        prompt.shape[1] + HALF,
        temperature=0.0,
        filter_fn=lambda logits: logits,
        filter_kwargs={},
        use_cache=use_cache,
        show_progress=False,
    )


def repaired(prompt: torch.Tensor) -> torch.Tensor:
    """The same cache, filled word by word."""
    text, cache = prompt[:, :1], None
    while text.shape[1] < prompt.shape[1] + HALF:
        logits, cache = model(text, disable_flex_attn=True, cache=cache, return_cache=True)
        if logits is not None:  # None behind a long-term memory token
            word = logits[:, -1:].argmax(-1)
            place = text.shape[1]
            text = torch.cat([text, prompt[:, place : place + 1] if place < prompt.shape[1] else word], 1)
    return text[:, prompt.shape[1] :]


good, late = True, []
whole = texts(100)
with torch.no_grad():
    for length in (4, 12, 20, 28):
        prompt, right = whole[:, :length], whole[:, length : length + HALF]
        made = [written(prompt, False), written(prompt, True), repaired(prompt)]
        plain, cached, filled = ((words == right).float().mean().item() for words in made)
        print(f"prompt of {length} words: without a cache {plain:.0%}, with it {cached:.0%}, repaired {filled:.0%}")
        good &= plain > 0.97 and filled > 0.97 and (cached > 0.97 if length == HALF else cached < 0.5)
        if length > HALF:
            late.append((made[1] == right)[:, 1:].float().mean().item())
    _, (_, keys, _) = model(whole[:, :12], disable_flex_attn=True, return_cache=True)
print(f"second to fourth word, with the cache: {sum(late) / len(late):.0%}")
print(f"keys kept behind 12 words: {keys.shape[-2]}, where 4 are of the segment in progress")
raise SystemExit(0 if good and max(late) < 0.2 and keys.shape[-2] == 0 else 1)
PY
venv/bin/python try.py 2> errors.txt || { cat errors.txt; exit 1; }
