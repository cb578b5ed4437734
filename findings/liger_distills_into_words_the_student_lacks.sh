#!/usr/bin/env bash
# liger-kernel 0.8.5: `LigerFusedLinearJSDLoss` gives the student words that it does not have. A teacher's
# vocabulary is often padded: GPT-2's 50,257 words are 50,304 in nanoGPT. The
# loss allows for a larger teacher and appends logits to the student's. It appends 0
# (chunked_loss/fused_linear_distillation.py, lines 129 to 136), and a logit of 0 is a word like others.
# Softmax knows differences alone: where the student's logits lie far below 0, the missing words take
# all of its probability. Nothing warns.
#
# So the loss of a student that equals its teacher is the greatest there is, ln 2 for the default
# `beta=0.5`, and its gradient does not lead to the teacher. The same student with a constant added to
# all of its logits, which changes no probability, has another loss. A student whose logits are
# around 0 loses little. The hard loss is right. A way out is to cut the teacher's head to the student's
# words.
#
# Seen on Python 3.11, torch 2.13.0; the teacher's head has 47 rows of padding, whose probability is below
# 1e-15; the reference has float64, and probability 0 for what the student lacks; s is added to all
# logits; the noisy student has noise in its head
#   s = 0: loss of the equal student 0.000 (reference 0.000); of the noisy one 0.072 (0.072), cosine of
#     the gradients 1.00
#   s = -10: 0.380 (0.000); 0.369 (0.072), 0.06
#   s = -30: 0.693 (0.000); 0.693 (0.072), -0.10
#   s = -30, divergence of the noisy student from its teacher after 30 steps of AdamW: with this loss
#     0.072, with the reference 0.007, with this loss and the teacher cut 0.007
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy liger-kernel==0.8.5
cat > try.py <<'PY'
import importlib.metadata
import math

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

WORDS, PADDED, WIDTH, PLACES = 50_257, 50_304, 64, 64
for package in ("torch", "liger-kernel"):
    print(package, importlib.metadata.version(package))
torch.set_num_threads(1)
torch.manual_seed(0)
hidden = torch.randn(PLACES, WIDTH)
hidden[:, -2:] = 1  # the last two columns of a head are the same for all states, like a bias
labels = torch.randint(0, WORDS, (PLACES,))
liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)


def heads(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's head, and that of a student of the same words."""
    torch.manual_seed(1)
    teacher = torch.randn(PADDED, WIDTH) / 4
    teacher[:, -2], teacher[:, -1] = 0, shift
    teacher[WORDS:, :-2], teacher[WORDS:, -2] = 0, -40  # words that no text has
    return teacher, teacher[:WORDS].clone()


def jsd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The divergence in float64."""
    p = (hidden.double() @ teacher.double().T).softmax(-1)
    q = (hidden.double() @ student.double().T).softmax(-1)
    q = torch.cat([q, q.new_zeros(PLACES, PADDED - WORDS)], 1)
    m = (p + q) / 2
    parts = (torch.special.xlogy(x, (x / m).clamp(min=1e-300)) for x in (p, q))
    return sum(parts).sum() / 2 / PLACES


def gradient(loss, student: torch.Tensor, teacher: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The loss and its gradient."""
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    return value.item(), torch.autograd.grad(value, student)[0].flatten().double()


def by_liger(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return liger(hidden, student, hidden, teacher, labels)


def trained(loss, student: torch.Tensor, teacher: torch.Tensor) -> float:
    """The divergence from the teacher after 30 steps."""
    weight = student.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=3e-3, weight_decay=0)
    for _ in range(30):
        optimizer.zero_grad()
        loss(weight, teacher).backward()
        optimizer.step()
    return jsd(weight.detach(), teacher).item()


good, found = True, {}
for shift in (0.0, -10.0, -30.0):
    teacher, equal = heads(shift)
    noisy = equal.clone()
    noisy[:, :-2] += 0.1 * torch.randn(WORDS, WIDTH - 2)
    unlikely = (hidden @ teacher.T).softmax(-1)[:, WORDS:].sum(1).max().item()
    same = by_liger(equal, teacher).item(), abs(jsd(equal, teacher).item())
    (loss, slope), (true, right) = (gradient(way, noisy, teacher) for way in (by_liger, jsd))
    cosine = torch.cosine_similarity(slope, right, dim=0).item()
    print(
        f"s = {shift:.0f}: padding has {unlikely:.0e}; equal student {same[0]:.3f} ({same[1]:.3f}), "
        f"noisy {loss:.3f} ({true:.3f}), cosine {cosine:.2f}"
    )
    found[shift] = *same, loss, true, cosine
    good &= unlikely < 1e-15 and same[1] < 1e-6 and abs(true - found[0.0][3]) < 1e-4
ways = {"liger": by_liger, "reference": jsd, "liger, teacher cut": lambda s, t: by_liger(s, t[:WORDS])}
after = {name: trained(loss, noisy, teacher) for name, loss in ways.items()}
told = ", ".join(f"{name} {value:.4f}" for name, value in after.items())
print("divergence of the noisy student after 30 steps:", told)
good &= found[0.0][0] < 0.01 and found[0.0][4] > 0.99
good &= found[-10.0][0] > 0.1 and abs(found[-30.0][0] - math.log(2)) < 1e-3 and found[-30.0][4] < 0.5
good &= after["liger"] > 0.8 * found[-30.0][3]
good &= max(after["reference"], after["liger, teacher cut"]) < 0.3 * found[-30.0][3]
raise SystemExit(0 if good else 1)
PY
venv/bin/python try.py
