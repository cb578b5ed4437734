#!/usr/bin/env bash
# lm-eval 0.4.13: the log-likelihood of an answer is that of other words, if the same call asks about a
# longer answer to the same text. Requests whose context and answer, but for the last word, are the same
# words are run through the network once (`logits_cache=True`, the default). The longest answer is run, as it
# has the most predictions. A shorter one should take the last of these, as it begins later. It takes the
# first. Beside "the | brown fox jumps", the answer of "the brown fox | jumps" is scored at the place of
# "brown": it gets the probability of "jumps" behind "the". Nothing warns. Whether an answer is the greedy
# one is right, since a correction of 2025 (lm-evaluation-harness 2987, which ended a crash of such
# requests) cuts the words for that; it left the log-likelihood. `logits_cache=False` is right, and so are
# two calls.
#
# That happens wherever a text is cut at several places: the rest of a sentence behind each of its words,
# a question asked once more with the first word of the answer given, twins as in Winogrande. Choices of one
# question have one context, and are right. But the other questions that are asked in the same call
# decide, so that the accuracy of a task depends on what else is in it.
#
# Seen on Python 3.11, torch 2.13.0, transformers 4.57.6, GPT-2 of 2 layers, random weights; the reference
# runs each request alone
#   40 sentences of 8 words, the rest behind each word: wrong 240 of 280, error up to 7.0
#     logits_cache=False, and a call for each place of the cut: wrong 0 of 280
#   200 questions of 4 choices with the first word given, alone: choice right 200 of 200
#     beside the same questions without it: right 130 of 200, logits_cache=False 200
#   is_greedy: right in all
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==4.57.6 lm-eval==0.4.13 accelerate
cat > try.py <<'PY'
import logging
import os
import random
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

logging.disable(logging.ERROR)
torch.set_num_threads(1)
END = "<|endoftext|>"
WORDS = [f"w{number}" for number in range(30)]
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([END, *WORDS])}, unk_token=END))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=END, eos_token=END, pad_token=END)
torch.manual_seed(0)
shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
config = GPT2Config(vocab_size=len(WORDS) + 1, **shape, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config).eval()
for weight in model.parameters():
    weight.data += 0.25 * torch.randn_like(weight)
random.seed(0)


def ask(requests: list[tuple[str, str]], **options) -> list[tuple[float, bool]]:
    """What lm-eval says of (context, answer): log-likelihood, and whether it is the greedy answer."""
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, **options)
    asked = [Instance("loglikelihood", {}, request, i) for i, request in enumerate(requests)]
    return harness.loglikelihood(asked, disable_tqdm=True)


@torch.no_grad()
def alone(context: str, answer: str) -> tuple[float, bool]:
    start, ids = len(context.split()), tokenizer(context + answer)["input_ids"]
    table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    rest = range(start, len(ids))
    greedy = all(table[i - 1].argmax().item() == ids[i] for i in rest)
    return sum(table[i - 1, ids[i]].item() for i in rest), greedy


def wrong(told: list, exact: list) -> tuple[int, float]:
    errors = [abs(a - b) for (a, _), (b, _) in zip(told, exact, strict=True)]
    assert all(a == b for (_, a), (_, b) in zip(told, exact, strict=True)), "is_greedy"
    return sum(error > 1e-3 for error in errors), max(errors)


def cut(sentence: list[str], place: int) -> tuple[str, str]:
    return " ".join(sentence[:place]), " " + " ".join(sentence[place:])


sentences = [random.choices(WORDS, k=8) for _ in range(40)]
requests = [cut(sentence, place) for sentence in sentences for place in range(1, 8)]
exact = [alone(*request) for request in requests]
told = ask(requests)
count, error = wrong(told, exact)
print(f"the rest of a sentence: wrong {count} of {len(requests)}, error up to {error:.1f}")
assert count == 40 * 6 and error > 5
assert wrong(ask(requests, logits_cache=False), exact)[0] == 0
apart = [ask([cut(sentence, place) for sentence in sentences]) for place in range(1, 8)]
assert wrong([apart[i % 7][i // 7] for i in range(len(requests))], exact)[0] == 0
print(f"  logits_cache=False, and a call for each place: wrong 0 of {len(requests)}")
for sentence in range(40):  # what is told of the last word behind all others: its place is the first
    text = sentences[sentence]
    first, _ = alone(text[0], " " + text[-1])
    assert abs(told[7 * sentence + 6][0] - first) < 1e-3

given, open_questions = [], []
for _ in range(200):
    text = random.choices(WORDS, k=6)
    for choice in random.sample(WORDS, 4):
        given.append((" ".join(text), " " + choice))
        open_questions.append((" ".join(text[:-1]), f" {text[-1]} {choice}"))


def choices(told: list) -> list[int]:
    scores = [score for score, _ in told[: len(given)]]
    return [max(range(4), key=scores[i : i + 4].__getitem__) for i in range(0, len(given), 4)]


best = choices([alone(*request) for request in given])
right = {}
for name, asked, options in (
    ("alone", given, {}),
    ("beside the same questions without the word", given + open_questions, {}),
    ("the same, logits_cache=False", given + open_questions, {"logits_cache": False}),
):
    right[name] = sum(a == b for a, b in zip(choices(ask(asked, **options)), best, strict=True))
    print(f"questions with the first word given, {name}: choice right {right[name]} of 200")
assert [count > 190 for count in right.values()] == [True, False, True]
assert right["alone"] == right["the same, logits_cache=False"] == 200
assert right["beside the same questions without the word"] < 150
PY
venv/bin/python try.py 2>/dev/null
