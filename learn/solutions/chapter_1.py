"""Answers to the exercises of chapter 1."""

from collections import Counter
from itertools import pairwise


def pair_counts(ids: list[int]) -> dict[tuple[int, int], int]:
    """How often each pair of neighbours occurs."""
    return Counter(pairwise(ids))


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replaces each occurrence of `pair` by `new`, from left to right."""
    out: list[int] = []
    at = 0
    while at < len(ids):
        found = tuple(ids[at : at + 2]) == pair
        out.append(new if found else ids[at])
        at += 2 if found else 1
    return out


def learn_merges(ids: list[int], count: int) -> list[tuple[int, int]]:
    """The first `count` merges of a text."""
    merges: list[tuple[int, int]] = []
    while len(merges) < count:
        counts = pair_counts(ids)
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        ids = merge(ids, best, 256 + len(merges))
        merges.append(best)
    return merges


def encode(ids: list[int], merges: list[tuple[int, int]]) -> list[int]:
    """Encodes bytes with learned merges."""
    for number, pair in enumerate(merges):
        ids = merge(ids, pair, 256 + number)
    return ids


def decode(ids: list[int], merges: list[tuple[int, int]]) -> bytes:
    """The bytes of tokens."""
    pieces = [bytes([i]) for i in range(256)]
    for a, b in merges:  # a merge only uses tokens that are older than its own
        pieces.append(pieces[a] + pieces[b])
    return b"".join(pieces[i] for i in ids)
