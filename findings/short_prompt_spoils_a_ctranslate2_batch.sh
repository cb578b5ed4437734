#!/usr/bin/env bash
# CTranslate2 4.8.5 (a GPT-2 of transformers 5.24.0): one prompt of a batch changes the answers of all
# others. `include_prompt_in_result=False`, which the documentation advises for speed, should return the new
# tokens alone. If one prompt of the batch has a single token, every other prompt gets its own words back,
# without the first, and they count for `max_length`: a short prompt gets too few new tokens, a long one
# none. An answer without a new token has the score 0.00, the logarithm of certainty. Nothing warns. For
# GPT-2 a text without a prompt is a single token, <|endoftext|>; so is a one-word prompt behind a
# `static_prompt`. Greedy, sampling and beam search do it alike. The cause: the start of all prompts, as
# long as the shortest less one token, is run ahead of the loop, and only if that start is not empty is the
# loop told to keep prompts out of the results. The sources of 3.10.0, the first with the option, 3.16.1,
# 4.0.0 and 4.8.1 have it so.
#
# The same start is hidden from `repetition_penalty` and `no_repeat_ngram_size`. How much of a prompt they
# count therefore depends on the shortest neighbour: all but the first token beside a prompt of two tokens,
# only the last token in a call of its own. So greedy answers change with the batch. The documentation says
# that only a part is run ahead, as a matter of speed, not that answers change. A server that joins the
# requests of several users, or a sweep over prompts, mixes them up so.
#
# Two ways out. Prompts of one token go into a call of their own. With a penalty: leave the prompts in the
# results and cut them off, which agrees with transformers' `generate`, in any batch.
#
# Seen on Python 3.11 with torch 2.13.0, random weights, 31 prompts of 12 to 31 tokens, 8 new tokens
#   right answers: 31 of 31, beside a prompt of one token 0; with max_batch_size=8 24
#   right answers, prompts of one token in a call of their own: 32 of 32
#   answers that a neighbour of two tokens changes: repetition_penalty=1.3 24, no_repeat_ngram_size=2 2
#   the same with the prompts in the results: 0 and 0
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==5.24.0 ctranslate2==4.8.5
cat > try.py <<'PY'
import random
import warnings

import ctranslate2
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

warnings.filterwarnings("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
words = ["<|endoftext|>", *(f"w{i}" for i in range(1, 100))]
number = {word: i for i, word in enumerate(words)}
tokenizer = Tokenizer(models.WordLevel(number, unk_token=words[0]))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), words[0])
PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained("gpt2")
torch.manual_seed(0)
shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 100}
ends = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
model = GPT2LMHeadModel(GPT2Config(**shape, **ends)).eval()
model.save_pretrained("gpt2")
ctranslate2.converters.TransformersConverter("gpt2").convert("ct2")
generator = ctranslate2.Generator("ct2", compute_type="float32")

NEW = 8
random.seed(0)
prompts = [[0, *random.choices(range(1, 100), k=random.randint(11, 30))] for _ in range(31)]
short = [[0]]  # one token: a text without a prompt


def right(prompt: list[int], **how: float) -> list[int]:
    """What transformers answers, without the end token."""
    ids = torch.tensor([prompt])
    known = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    answer = model.generate(ids, **known, max_new_tokens=NEW, do_sample=False, **how)[0]
    answer = answer[len(prompt) :].tolist()
    return answer[: answer.index(0)] if 0 in answer else answer


def answers(batch: list[list[int]], **how: float) -> list[ctranslate2.GenerationResult]:
    """One call for all prompts, which should return the new tokens alone."""
    texts = [[words[i] for i in prompt] for prompt in batch]
    only_new = {"include_prompt_in_result": False, "return_scores": True}
    return generator.generate_batch(texts, max_length=NEW, **only_new, **how)


def cut(batch: list[list[int]], **how: float) -> list[list[int]]:
    """The way out for the penalties: prompts in the result, cut off here."""
    texts = [[words[i] for i in prompt] for prompt in batch]
    longest = max(map(len, batch)) - 1 + NEW
    results = generator.generate_batch(texts, max_length=longest, **how)
    return [r.sequences_ids[0][len(p) - 1 :][:NEW] for r, p in zip(results, batch, strict=True)]


def equal(found: list[list[int]], expected: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(found, expected, strict=True))


def new(results: list[ctranslate2.GenerationResult]) -> list[list[int]]:
    return [result.sequences_ids[0] for result in results]


expected = [right(prompt) for prompt in prompts]
without, beside = answers(prompts), answers(prompts + short)
sorted_out = new(answers(prompts)) + new(answers(short))
print("a prompt         ", prompts[0][: NEW + 3], "...")
print("its answer       ", expected[0])
print("in a batch of 31 ", new(without)[0], f"score {without[0].scores[0]:.2f}")
print("beside one token ", new(beside)[0], f"score {beside[0].scores[0]:.2f}")
counts = equal(new(without), expected), equal(new(beside)[:-1], expected)
echoes = sum(a == p[1 : NEW + 1] for a, p in zip(new(beside), prompts))
eights = equal(new(answers(prompts + short, max_batch_size=8))[:-1], expected)
print(f"right answers: {counts[0]} of 31, beside a prompt of one token {counts[1]}; ", end="")
print(f"with max_batch_size=8 {eights}")
print(f"answers that are the prompt's own tokens: {echoes}")
apart = equal(sorted_out, [*expected, right(short[0])])
print(f"right answers, prompts of one token in a call of their own: {apart} of 32")
as_described = counts == (31, 0) and eights < 31 and echoes == 31 and apart == 32

for name, value in (("repetition_penalty", 1.3), ("no_repeat_ngram_size", 2)):
    how = {name: value}
    expected = [right(prompt, **how) for prompt in prompts]
    alone = [new(answers([prompt], **how))[0] for prompt in prompts]
    beside = new(answers([*prompts, [0, 1]], **how))[:-1]
    whole = cut([*prompts, [0, 1]], **how)[:-1]
    whole_alone = [cut([prompt], **how)[0] for prompt in prompts]
    changed, whole_changed = 31 - equal(alone, beside), 31 - equal(whole_alone, whole)
    print(f"{name}={value}: answers that a neighbour of two tokens changes {changed} of 31, ", end="")
    print(f"with the prompts in the results {whole_changed}")
    right_alone, right_beside, right_whole = (equal(a, expected) for a in (alone, beside, whole))
    print(f"  as transformers': alone {right_alone}, beside it {right_beside}, ", end="")
    print(f"with the prompts in the results {right_whole}")
    as_described = as_described and changed > 0 and whole_changed == 0 and right_whole == 31
print("as described" if as_described else "the behaviour has changed")
raise SystemExit(0 if as_described else 1)
PY
venv/bin/python try.py
