#!/usr/bin/env bash
# x-transformers 2.31.10: `DPO` does not train the first word of an answer, and trains a word behind its
# end. Log-probabilities are those of the words 1 to n - 1 of a row. The mask, which says what of the row is
# answer, is cut to the words 0 to n - 2 (dpo.py, line 31, `masked_mean`). So each log-probability is judged
# by the word before it: the answer's first word counts as prompt, and the padding behind the answer counts
# as answer. Nothing warns, and the loss falls.
#
# An answer of one word, such as yes or no, is not trained at all: the loss compares the padding behind
# the two answers. In longer answers the first word is missing, which often decides. Rows without
# padding lose the first word only. The way out is to hand over all masks without their first column,
# which are not cut any more.
#
# Seen on Python 3.11, torch 2.13.0, 2 layers; prompts of 4 words, answers of 1 to 4 words, padded; the
# reference is the same mean over the words of the answer, in float64
#   loss 0.841, reference 0.843; cosine of the gradients 0.25; with the masks cut 0.843 and 1.00
#   gradient of the loss by the logits: of the first word of an answer 0, of the padding behind it 0.050;
#     with the masks cut 0.058 and 0
#   the answer is the prompt's first word, the rejected one the next number; 300 steps; held-out prompts
#     for which the answer is likelier: before 45 %, after 45 % with a loss of 0.000; with the masks cut
#     100 % with a loss of 0.001
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy x-transformers==2.31.10
cat > try.py <<'PY'
import importlib.metadata

import torch
from x_transformers import DPO, Decoder, TransformerWrapper

WORDS, PAD, PROMPT, ANSWER = 16, 0, 4, 4
for package in ("torch", "x-transformers"):
    print(package, importlib.metadata.version(package))
torch.set_num_threads(1)


def new(beta: float) -> DPO:
    """A policy and its reference, two layers."""
    torch.manual_seed(0)
    layers = Decoder(dim=64, depth=2, heads=4, rotary_pos_emb=True)
    return DPO(TransformerWrapper(num_tokens=WORDS, max_seq_len=16, attn_layers=layers), beta=beta)


def masks(ids: torch.Tensor, length: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is prompt, and what is not padding, from column `first` on."""
    place = torch.arange(ids.shape[1]).expand_as(ids)
    return (place < PROMPT)[:, first:], (place < PROMPT + length[:, None])[:, first:]


def rows(count: int, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts with two answers, padded."""
    prompt = torch.randint(1, WORDS, (count, PROMPT))
    answers = torch.randint(1, WORDS, (2, count, ANSWER))
    answers[0, :, 0], answers[1, :, 0] = prompt[:, 0], prompt[:, 0] % (WORDS - 1) + 1
    answers[:, torch.arange(ANSWER)[None] >= length[:, None]] = PAD
    return *(torch.cat([prompt, answer], 1) for answer in answers), length


def library(dpo: DPO, good, bad, length, first: int = 0) -> torch.Tensor:
    """The library's loss; `first=1` cuts the masks."""
    prompt, kept = masks(good, length, first)
    return dpo(good, bad, prompt_mask=prompt, preferred_seq_mask=kept, unpreferred_seq_mask=kept)


def reference(dpo: DPO, good, bad, length) -> torch.Tensor:
    """The loss by its formula, with a loop over rows and words."""
    ratios = []
    for model in (dpo.policy_model, dpo.ref_model):
        sums = []
        for ids in (good, bad):
            chances = model(ids[:, :-1]).double().log_softmax(-1)
            for row, size in enumerate(length.tolist()):
                places = range(PROMPT, PROMPT + size)
                sums.append(sum(chances[row, at - 1, ids[row, at]] for at in places) / size)
        ratios.append(torch.stack(sums).view(2, -1))
    margin = (ratios[0] - ratios[1].detach()) * dpo.beta
    return -torch.nn.functional.logsigmoid(margin[0] - margin[1]).mean()


def slope(dpo: DPO, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of all weights in one vector."""
    parts = torch.autograd.grad(loss, list(dpo.policy_model.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None]).double()


def at_places(dpo: DPO, batch, first: int) -> tuple[float, float]:
    """Gradients of the preferred rows' logits: of an answer's first word, and of the word behind it."""
    seen = []
    hook = dpo.policy_model.register_forward_hook(lambda *told: seen.append(told[2]))
    loss = library(dpo, *batch, first)
    hook.remove()
    steps = torch.autograd.grad(loss, seen[0])[0].norm(dim=-1)
    short = batch[2] < ANSWER
    behind = (PROMPT - 1 + batch[2])[short]
    return steps[:, PROMPT - 1].max().item(), steps[short].gather(1, behind[:, None]).max().item()


dpo = new(1.0)
batch = rows(16, torch.arange(16) % ANSWER + 1)
with torch.no_grad():
    for weight in dpo.policy_model.parameters():
        weight += 0.05 * torch.randn_like(weight)
true = reference(dpo, *batch)
found = []
for name, first in (("the masks as they are", 0), ("the masks cut", 1)):
    loss = library(dpo, *batch, first)
    cosine = torch.cosine_similarity(slope(dpo, loss), slope(dpo, reference(dpo, *batch)), dim=0)
    found.append((loss.item(), cosine.item(), *at_places(dpo, batch, first)))
    print(
        f"{name}: loss {found[-1][0]:.4f}, reference {true.item():.4f}, cosine {found[-1][1]:.2f}; "
        f"gradient of the first word {found[-1][2]:.3f}, behind the answer {found[-1][3]:.3f}"
    )

held_out = rows(500, torch.ones(500, dtype=torch.long))
shares = []
for first in (0, 1):
    dpo = new(1.0)
    optimizer = torch.optim.AdamW(dpo.parameters(), lr=1e-3)
    for step in range(301):
        if step in (0, 300):
            with torch.no_grad():
                scores = dpo.policy_model(held_out[0][:, :PROMPT])[:, -1]
            words = (scores.gather(1, ids[:, PROMPT, None]) for ids in held_out[:2])
            shares.append((next(words) > next(words)).float().mean().item())
        optimizer.zero_grad()
        loss = library(dpo, *rows(64, torch.ones(64, dtype=torch.long)), first)
        loss.backward()
        optimizer.step()
    print(
        f"masks from column {first}: loss at the end {loss.item():.3f}, "
        f"answer likelier before {shares[-2]:.0%}, after {shares[-1]:.0%}"
    )
good = abs(found[0][0] - true.item()) > 5e-4 and found[0][1] < 0.5 and found[0][2] == 0 < found[0][3]
good &= abs(found[1][0] - true.item()) < 1e-5 and found[1][1] > 0.999 and found[1][2] > 0 == found[1][3]
good &= abs(shares[1] - shares[0]) < 0.2 and shares[3] > 0.95
raise SystemExit(0 if good else 1)
PY
venv/bin/python try.py
