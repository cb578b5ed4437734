"""Mutations of files: a value of another kind, a missing or renamed key, other bytes."""

import copy
import json
import math
from random import Random
from typing import Any

import torch

DEEP: list = []
for _ in range(40):
    DEEP = [DEEP]
ODD = (  # of JSON
    *(None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 2**70, 10**250, -0.5, 1e-9, 1e300),
    *(math.nan, math.inf, -math.inf),
    *("", "x", "0", "\x1b[2J", "../x", "/etc/hosts", "a\nb", "\ud800", "\0", "é" * 1000, "1/1"),
    *([], {}, [[]], [1, 2], {"a": {}}, {"": None}, ["x"] * 5, DEEP),
)
TENSORS = (  # of a file of torch.save
    *(torch.zeros(0), torch.ones(2, 3), torch.tensor(3.5), torch.tensor(float("nan"))),
    *(torch.arange(3), torch.tensor([True]), torch.zeros(5, dtype=torch.uint8)),
    *(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(4, 4).t(), torch.zeros(1).expand(9)),
)


def mutate(tree: Any, rng: Random, odd: tuple = ODD) -> Any:
    """A copy of nested dicts and lists with one to three changes at random places."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return rng.choice(odd)
        holder, key = rng.choice(places)
        change = rng.randrange(6)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[rng.choice(["x", "\x1b[2J", f"{key}x", "name", "step"])] = holder.pop(key)
        elif change == 2:
            other, its_key = rng.choice(places)
            if its_key in (other if isinstance(other, dict) else range(len(other))):
                holder[key] = copy.deepcopy(other[its_key])
        else:
            holder[key] = copy.deepcopy(rng.choice(odd))
    return tree


def _places(tree: Any):
    """(dict or list, key) of every value."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Other, more or fewer bytes at a random place."""
    at = rng.randrange(len(data) + 1)
    new = rng.randbytes(rng.choice((0, 1, 2, 4, 8, 100)))
    if rng.random() < 0.1:
        return data[:at]
    keep = at + rng.choice((0, len(new), len(new), 1, 50))
    return data[:at] + new + data[keep:]


def to_json(value: Any) -> bytes:
    """As Python writes it: with NaN, and with lone surrogates as escapes."""
    return json.dumps(value).encode()
