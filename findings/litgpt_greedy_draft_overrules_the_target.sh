#!/usr/bin/env bash
# litgpt 0.5.13: speculative decoding with `temperature=0` does not write the text of the large network. A
# small network proposes words, and the large one takes or refuses them. Whatever is taken, the text
# should be the large network's own; the paper that the docstring names (arXiv:2211.17192) proves it, for
# greedy search too: each network's distribution is then certain of its likeliest word. litgpt draws that
# word, but tests it with the softmax of the scores, as if it had been sampled. So a proposal stands if
# the large network gives it as much probability as the small one does, even if it likes another word
# better. A refusal is no better: the word that follows is the one with the greatest difference of
# the two softmaxes. `top_p=0`, which the docstring calls the same, does the same. Nothing warns. Sampling
# with temperature 1 has the right distribution.
#
# So greedy answers change with the draft, and a benchmark of a checkpoint measures a mixture of two
# networks. The share of accepted words, by which a draft is chosen, is too high as well. The
# correction of litgpt 2238, by which `temperature=0` draws the likeliest word at all, left the test as it
# was. The way out is a temperature close to 0, such as 1e-5, at which the softmax is as certain as the
# choice.
#
# Two further gaps of the same function: the first new word is left out of the answer (a known issue,
# litgpt 2307), which is allowed for below. And `stop_tokens` takes a flat list; lists of words, as its
# annotation and litgpt's `generate_fn` have them, never stop a text.
#
# Seen on Python 3.11, torch 2.13.0, random weights, 60 prompts of 6 words, 16 words, 3 proposals each
#   the large network by `generate`, word by word: right 60 of 60
#   untrained draft, temperature 0 and top_p 0: right 1 of 60, accepted 0.25; words that are the
#     draft's likeliest 39 %, the large network's 56 %
#   similar draft, temperature 0 and top_p 0: right 0 of 60, accepted 0.74; 80 % and 61 %
#   temperature 1e-5: right 60 of 60 with both, accepted 0.00 and 0.28
#   temperature 1, 3 words of 4: distance from the exact probabilities 0.04 (total variation)
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy litgpt==0.5.13
cat > try.py <<'PY'
import collections
import itertools
import warnings

warnings.simplefilter("ignore")
import torch
from litgpt.config import Config
from litgpt.generate.base import generate
from litgpt.generate.speculative_decoding import generate as speculate
from litgpt.model import GPT

torch.set_num_threads(1)
LENGTH, NEW = 6, 16


def network(seed: int, layers: int, spread: float, words: int = 32) -> GPT:
    torch.manual_seed(seed)
    width = {"n_head": 2, "n_embd": 32, "intermediate_size": 64, "rotary_percentage": 1.0}
    sizes = {"block_size": 64, "vocab_size": words, "padded_vocab_size": words}
    model = GPT(Config(name="tiny", n_layer=layers, **width, **sizes)).eval()
    for weight in model.parameters():
        weight.data += spread * torch.randn_like(weight)
    return model


@torch.no_grad()
def likeliest(model: GPT, text: list[int]) -> list[int]:
    """The network's choice for each new word of a text, behind the words before it."""
    model.clear_kv_cache()
    return model(torch.tensor([text]))[0, LENGTH - 1 : -1].argmax(-1).tolist()


def write(function, models: list[GPT], prompt: torch.Tensor, length: int, **options):
    for model in models:
        model.clear_kv_cache()
        model.max_seq_length = 64
        model.set_kv_cache(batch_size=1)
    return function(*models, prompt, length, **options)


target = network(0, 2, 0.15)
drafts = {"untrained": network(1, 1, 0.0), "similar": network(0, 2, 0.15)}
torch.manual_seed(1)
for weight in drafts["similar"].parameters():
    weight.data += 0.03 * torch.randn_like(weight)
torch.manual_seed(2)
prompts = torch.randint(0, 32, (60, LENGTH))
wanted = []
for prompt in prompts:
    text = prompt.tolist()
    for _ in range(NEW):
        text += [likeliest(target, [*text, 0])[-1]]
    wanted.append(text)
    assert write(generate, [target], prompt, LENGTH + NEW, temperature=0.0).tolist() == text
print("generate, temperature 0: right 60 of 60")

for name, draft in drafts.items():
    for options in ({"temperature": 0.0}, {"top_p": 0.0}, {"temperature": 1e-5}):
        right, of_draft, of_target, shares = 0, [], [], []
        for prompt, text in zip(prompts, wanted, strict=True):
            torch.manual_seed(0)
            told, share = write(
                speculate, [draft, target], prompt, LENGTH + NEW, speculative_k=3, **options
            )
            # The first new word is not told: it is the target's, by its own choice.
            full = [*prompt.tolist(), text[LENGTH], *told[LENGTH:].tolist()][: LENGTH + NEW]
            right += full == text
            shares.append(share)
            new = full[LENGTH + 1 :]
            of_draft += [a == b for a, b in zip(new, likeliest(draft, full)[1:], strict=True)]
            of_target += [a == b for a, b in zip(new, likeliest(target, full)[1:], strict=True)]
        accepted = sum(shares) / len(shares)
        by = [sum(hits) / len(hits) for hits in (of_draft, of_target)]
        print(
            f"draft {name}, {options}: right {right} of 60, accepted {accepted:.2f}, "
            f"words the draft's likeliest {by[0]:.0%}, the target's {by[1]:.0%}"
        )
        if options == {"temperature": 1e-5}:
            assert right == 60
        else:
            assert right < 20 and by[1] < 0.95

text = wanted[0]
stop = text[LENGTH + 2]
for tokens, stops in (([stop], True), (([stop],), False)):
    told, _ = write(
        speculate, [target, target], prompts[0], LENGTH + NEW, temperature=0.0, speculative_k=3, stop_tokens=tokens
    )
    assert (stop not in told[LENGTH:].tolist()) == stops
print("stop_tokens as a list of lists: does not stop")

small = network(3, 2, 0.3, words=4), network(4, 1, 0.3, words=4)
prompt, draws = torch.tensor([0, 1, 2, 3, 0, 1]), 3000


@torch.no_grad()
def chances(text: list[int]) -> torch.Tensor:
    small[0].clear_kv_cache()
    return small[0](torch.tensor([text]))[0, -1].double().softmax(-1)


exact = collections.defaultdict(float)
for new in itertools.product(range(4), repeat=4):
    chance = 1.0
    for i, word in enumerate(new):
        chance *= chances([*prompt.tolist(), *new[:i]])[word].item()
    exact[new[1:]] += chance  # the first new word is not told
seen = collections.Counter()
torch.manual_seed(0)
for _ in range(draws):
    told, _ = write(speculate, [small[1], small[0]], prompt, LENGTH + 4, speculative_k=3)
    seen[tuple(told[LENGTH : LENGTH + 3].tolist())] += 1
distance = sum(abs(seen[new] / draws - chance) for new, chance in exact.items()) / 2
print(f"temperature 1: distance from the exact probabilities {distance:.3f}")
assert distance < 0.08
PY
venv/bin/python try.py
