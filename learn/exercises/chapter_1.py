"""Exercises of chapter 1. Replace each `raise NotImplementedError`; then `python -m learn.check 1`.

`learn/chapter_1_tokens.py` explains what is needed.
"""


def pair_counts(ids: list[int]) -> dict[tuple[int, int], int]:
    """How often each pair of neighbours occurs; [1, 2, 1, 2] has (1, 2) twice, (2, 1) once."""
    raise NotImplementedError


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replaces each occurrence of `pair` by `new`, from left to right: [1, 1, 1] -> [new, 1]."""
    raise NotImplementedError


def learn_merges(ids: list[int], count: int) -> list[tuple[int, int]]:
    """The first `count` merges of a text; merge n makes token 256 + n.

    Take the pair that occurs most often; among equals, the smallest pair.
    """
    raise NotImplementedError


def encode(ids: list[int], merges: list[tuple[int, int]]) -> list[int]:
    """Encodes bytes with learned merges: those learned first come first."""
    raise NotImplementedError


def decode(ids: list[int], merges: list[tuple[int, int]]) -> bytes:
    """The bytes of tokens: `decode(encode(ids, merges), merges) == bytes(ids)`."""
    raise NotImplementedError
