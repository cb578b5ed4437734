#!/usr/bin/env bash
# mlx-lm 0.32.2 with MLX 0.32.4: a draft model takes the prompt away from every penalty. `draft_model` in
# `stream_generate` and `generate` (`--draft-model` on the command line) is speculative decoding: a small network
# proposes words, the large one checks them, and the text is the large one's, only sooner. A logits processor, such
# as `repetition_penalty`, gets the tokens so far and the scores. Without a draft the tokens begin with the prompt.
# With one they begin with the prompt's last word: the prompt is read ahead of the loop (`_prefill`), and only what
# the loop reads is kept for the processors. So words of the prompt go unpunished, and a processor that forbids
# words, or looks for a place in the prompt, is given another text. Nothing warns. The documentation describes
# `logits_processors` in the same words for both loops. Without a processor, or with `logit_bias`, which does not
# look at tokens, the draft changes nothing.
#
# A penalty is set against answers that repeat the question, and a draft to save time; who turns the draft on gets
# other answers, and a comparison of speed or quality with and without it is one of two penalties.
# `mlx_lm.server` hands processors and draft to the same loop (read in its source). The way out is a
# processor that puts the prompt before the tokens itself.
#
# Seen on Python 3.11, 2 layers, random weights, 20 prompts of 8 to 19 words, 24 words, greedy; the reference
# scores every word anew without a cache, and penalizes the last 20 words
#   right answers of 20:             no draft  draft  draft, prompt handed over  draft, prompts of one word
#   Llama and GPT-2, no penalty      20        20     20                         20
#   Llama repetition_penalty=1.5     20        3      20                         20
#   Llama frequency_penalty=1.0      20        4      20                         20
#   GPT-2 repetition_penalty=1.5     20        9      20                         20
#   GPT-2 frequency_penalty=1.0      20        8      20                         20
#   all 20 answers with a draft are right if the prompt is taken to be its last word
#   words of the prompt in answers, where a processor forbids every word read: no draft 0 of 480, draft 54 (Llama)
#     and 64 (GPT-2)
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0 numpy
cat > try.py <<'PY'
import os

os.environ["HF_HUB_OFFLINE"] = "1"
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm import stream_generate
from mlx_lm.models import gpt2, llama
from mlx_lm.sample_utils import make_logits_processors
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

VOCABULARY, NEW, PROMPTS = 100, 24, 20
words = {f"w{i}": i for i in range(VOCABULARY)} | {"<end>": VOCABULARY}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<end>")),
    eos_token="<end>",
)


def network(kind: str, noise: float = 0.0):
    """A small network with random weights; noise makes a draft that often agrees with it."""
    mx.random.seed(0)
    if kind == "llama":
        made = llama.Model(
            llama.ModelArgs(
                model_type="llama",
                hidden_size=64,
                num_hidden_layers=2,
                intermediate_size=96,
                num_attention_heads=4,
                rms_norm_eps=1e-5,
                vocab_size=VOCABULARY,
                tie_word_embeddings=False,
            )
        )
    else:
        made = gpt2.Model(
            gpt2.ModelArgs(
                model_type="gpt2",
                n_ctx=128,
                n_embd=64,
                n_head=4,
                n_layer=2,
                n_positions=128,
                layer_norm_epsilon=1e-5,
                vocab_size=VOCABULARY,
            )
        )
    made.update(
        tree_map(
            lambda p: 0.15 * mx.random.normal(p.shape) if p.ndim > 1 else p,
            made.parameters(),
        )
    )
    mx.random.seed(1)
    made.update(
        tree_map(
            lambda p: p + noise * mx.random.normal(p.shape) if p.ndim > 1 else p,
            made.parameters(),
        )
    )
    made.eval()
    return made


def answer(model, prompt: list[int], **how) -> list[int]:
    """The greedy answer of mlx-lm."""
    return [
        r.token
        for r in stream_generate(model, tokenizer, prompt, max_tokens=NEW, **how)
    ]


def by_hand(
    model, prompt: list[int], penalty: float, bonus: float, skip: int = 0
) -> list[int]:
    """The greedy answer without a cache; each of the last 20 words behind `skip` is penalized as documented."""
    text = list(prompt)
    for _ in range(NEW):
        scores = np.array(model(mx.array([text]))[0, -1]).astype(np.float64)
        read = text[skip:][-20:]
        for word in set(read):
            scores[word] = (
                scores[word] * penalty if scores[word] < 0 else scores[word] / penalty
            )
        for word in read:
            scores[word] -= bonus
        text.append(int(scores.argmax()))
    return text[len(prompt) :]


def ban(tokens, logits):
    """Forbids every word that has been read."""
    logits[:, tokens] = -float("inf")
    return logits


def with_prompt(processors, prompt):
    """The processors, given what the draft's loop keeps from them."""
    rest = mx.array(prompt[:-1], mx.uint32)
    return [
        lambda t, x, f=f: f(mx.concatenate([rest, t.astype(mx.uint32)]), x)
        for f in processors
    ]


random = np.random.default_rng(0)
prompts = [
    random.integers(0, VOCABULARY, int(n)).tolist()
    for n in random.integers(8, 20, PROMPTS)
]
as_described = True
for kind in ("llama", "gpt2"):
    model, draft = network(kind), network(kind, 0.02)
    taken = [
        r.from_draft
        for p in prompts
        for r in stream_generate(model, tokenizer, p, max_tokens=NEW, draft_model=draft)
    ]
    print(
        f"{kind}: {100 * sum(taken) / len(taken):.0f} % of the words come from the draft"
    )
    for name, penalty, bonus, options in (
        ("no penalty", 1.0, 0.0, {}),
        ("repetition_penalty", 1.5, 0.0, {"repetition_penalty": 1.5}),
        ("frequency_penalty", 1.0, 1.0, {"frequency_penalty": 1.0}),
    ):
        made = make_logits_processors(**options)
        exact = [by_hand(model, p, penalty, bonus) for p in prompts]
        alone = [answer(model, p, logits_processors=made) for p in prompts]
        both = [
            answer(model, p, logits_processors=made, draft_model=draft) for p in prompts
        ]
        blind = [by_hand(model, p, penalty, bonus, len(p) - 1) for p in prompts]
        shown = [
            answer(model, p, logits_processors=with_prompt(made, p), draft_model=draft)
            for p in prompts
        ]
        last = [p[-1:] for p in prompts]
        one = [
            answer(model, p, logits_processors=made, draft_model=draft) for p in last
        ]
        one_exact = [by_hand(model, p, penalty, bonus) for p in last]

        def same(got, wanted):
            return sum(a == b for a, b in zip(got, wanted, strict=True))

        counts = [
            same(alone, exact),
            same(both, exact),
            same(both, blind),
            same(shown, exact),
        ]
        counts.append(same(one, one_exact))
        print(
            f"  {name}: right answers of {PROMPTS}: without a draft {counts[0]}, with it {counts[1]}, ",
            end="",
        )
        print(
            f"with the prompt handed over {counts[3]}, prompts of one word {counts[4]}; ",
            end="",
        )
        print(f"as if the prompt were its last word: {counts[2]}")
        as_described &= (
            counts[0] == counts[3] == counts[4] == PROMPTS and counts[2] == PROMPTS
        )
        as_described &= (
            counts[1] == PROMPTS if not options else counts[1] <= PROMPTS // 2
        )
    repeats = []
    for how in ({}, {"draft_model": draft}):
        texts = [answer(model, p, logits_processors=[ban], **how) for p in prompts]
        repeats.append(
            sum(w in p for p, t in zip(prompts, texts, strict=True) for w in t)
        )
    print(
        f"  words of the prompt in the answers, though forbidden: {repeats[0]}, with a draft {repeats[1]}",
        end="",
    )
    print(f" of {PROMPTS * NEW}")
    as_described &= repeats[0] == 0 and repeats[1] > 20
raise SystemExit(0 if as_described else 1)
PY
venv/bin/python try.py
