#!/usr/bin/env bash
# rotary-embedding-torch 0.9.1: in bf16, words beyond position 256 share their rotation with other
# words. `rotate_queries_or_keys` counts the positions in the type of the queries
# (rotary_embedding_torch.py, lines 173 to 186). bf16 has 8 bits: from 256 on every second number is
# missing, from 512 on three of four, from 1,024 on seven of eight. Angles are float32, but of a
# rounded position. Queries and keys are bf16 in every training under autocast, as they come out of
# a linear layer. The module turns autocast off for the angles, which is too late. Nothing warns.
#
# So attention cannot tell a word from its neighbours, and learns this as the way the text is. At
# position 1,000 four words in a row have one rotation. A network that was trained in float32 and is
# evaluated under autocast loses the place as well. Rounded angles are kept: a later call in float32
# through the same module gets them too. `.float()` before the rotation is right, and
# `rotate_queries_with_cached_keys` needs it as well. fp16 is exact up to 2,048.
#
# Seen on Python 3.11, torch 2.13.0; the reference rotates the same bf16 numbers in float64
#   1,024 positions have 513 rotations in bf16, 1,024 in float32
#   greatest error of a score in units of the scores' deviation: bf16 4.1, `.float()` first and back
#     to bf16 after it 0.02; float32 after a call in bf16 4.1, float32 alone 0.0001
#   one layer that names the word before, in 1,024 words; right at positions 1 to 255, 256 to 511,
#     512 to 1,023: trained under autocast 99, 72 and 53 %; with `.float()` 100, 100 and 100 %, and
#     that network without it 100, 36 and 40 %
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy rotary-embedding-torch==0.9.1
cat > try.py <<'PY'
import importlib.metadata

import torch
from rotary_embedding_torch import RotaryEmbedding

WORDS, LENGTH, WIDTH = 16, 1024, 32
for package in ("torch", "rotary-embedding-torch"):
    print(package, importlib.metadata.version(package))
torch.set_num_threads(1)
torch.manual_seed(0)


def exact(x: torch.Tensor) -> torch.Tensor:
    """Each pair of channels turned by position times frequency, in float64."""
    frequencies = 10_000 ** -(torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    turns = torch.polar(torch.ones(()).double(), torch.arange(LENGTH).double()[:, None] * frequencies)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


def scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores of all queries and keys."""
    return queries.double() @ keys.double().mT


def rotated(x: torch.Tensor, rotary: RotaryEmbedding, wide: bool) -> torch.Tensor:
    """The library's rotation, after `.float()` if `wide`."""
    return rotary.rotate_queries_or_keys(x.float() if wide else x).to(x.dtype)


class Layer(torch.nn.Module):
    """One layer of attention, which is to name the word before."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = torch.nn.Embedding(WORDS, 64), torch.nn.Linear(64, WORDS)
        self.project = torch.nn.Linear(64, 192)

    def forward(self, ids: torch.Tensor, wide: bool) -> torch.Tensor:
        rotary = RotaryEmbedding(WIDTH)  # has no weights
        parts = self.project(self.words(ids)).unflatten(-1, (3, 2, WIDTH))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        q, k = rotated(q, rotary, wide), rotated(k, rotary, wide)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))[:, 1:].float()


def trained(wide: bool) -> Layer:
    """400 steps of AdamW under autocast."""
    torch.manual_seed(0)
    layer = Layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=5e-3)
    for _ in range(400):
        ids = torch.randint(0, WORDS, (4, LENGTH))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = layer(ids, wide)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer


@torch.no_grad()
def right(layer: Layer, wide: bool) -> list[float]:
    """Shares of words named right, by position."""
    ids = torch.randint(0, WORDS, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hits = (layer(ids, wide).argmax(-1) == ids[:, :-1]).float()
    return [hits[:, a:b].mean().item() for a, b in ((0, 255), (255, 511), (511, 1023))]


kinds = {}
for dtype in (torch.bfloat16, torch.float32):
    same = RotaryEmbedding(WIDTH).rotate_queries_or_keys(torch.ones(1, 1, LENGTH, WIDTH, dtype=dtype))
    kinds[dtype] = len(same[0, 0].unique(dim=0))
    print(dtype, kinds[dtype], "rotations of", LENGTH, "positions")
q, k = torch.randn(2, 1, 1, LENGTH, WIDTH).bfloat16()
true = scores(exact(q), exact(k))
used = RotaryEmbedding(WIDTH)
errors = {
    "bf16": scores(rotated(q, used, False), rotated(k, used, False)),
    "float32 after bf16": scores(rotated(q.float(), used, True), rotated(k.float(), used, True)),
}
for name, x in (("float() first", (q, k)), ("float32", (q.float(), k.float()))):
    errors[name] = scores(*(rotated(y, RotaryEmbedding(WIDTH), True) for y in x))
errors = {name: ((x - true).abs().max() / true.std()).item() for name, x in errors.items()}
print("errors of scores:", ", ".join(f"{name} {error:.2g}" for name, error in errors.items()))
narrow, wide = trained(False), trained(True)
shares = right(narrow, False), right(wide, True), right(wide, False)
for name, share in zip(("autocast", "with float()", "that one without"), shares, strict=True):
    print(name, ", ".join(f"{x:.1%}" for x in share))
good = kinds == {torch.bfloat16: 513, torch.float32: LENGTH}
good &= min(errors["bf16"], errors["float32 after bf16"]) > 2
good &= errors["float() first"] < 0.2 and errors["float32"] < 1e-2
good &= shares[0][2] < 0.8 and min(shares[1]) > 0.99 and shares[2][0] > 0.99 > 0.7 > shares[2][2]
raise SystemExit(0 if good else 1)
PY
venv/bin/python try.py
