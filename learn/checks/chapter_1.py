"""Tests of the exercises of chapter 1; each takes the function of its name."""

from collections.abc import Callable

from learn.solutions import chapter_1 as solutions

TEXT = list(b"banana bandana, a band of bananas and a ban on bandanas")


def pair_counts(function: Callable) -> None:
    """Counts, with pairs that overlap."""
    found = dict(function([1, 1, 1, 2]))
    assert found == {(1, 1): 2, (1, 2): 1}, f"[1, 1, 1, 2] gives {found}"
    assert dict(function([7])) == {}, "one token has no neighbours"
    found, expected = dict(function(TEXT)), dict(solutions.pair_counts(TEXT))
    for pair in {**expected, **found}:
        right, count = expected.get(pair, 0), found.get(pair, 0)
        assert count == right, f"in 'banana bandana, …' {pair} occurs {right} times, not {count}"


def merge(function: Callable) -> None:
    """Overlaps are merged from the left, and the end of the text is not lost."""
    for ids, expected in (
        ([1, 1, 1], [9, 1]),
        ([1, 1, 1, 1], [9, 9]),
        ([2, 1, 1, 3], [2, 9, 3]),
        ([1], [1]),
    ):
        found = function(list(ids), (1, 1), 9)
        assert found == expected, f"merge({ids}, (1, 1), 9) is {expected}, not {found}"


def learn_merges(function: Callable) -> None:
    """The merges of a text."""
    found, expected = function(list(TEXT), 8), solutions.learn_merges(TEXT, 8)
    assert len(found) == 8, f"8 merges were asked for, {len(found)} came"
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert tuple(a) == b, f"merge {number} is {b}, not {a}"


def encode(function: Callable) -> None:
    """A text that the merges were not learned from."""
    merges = solutions.learn_merges(TEXT, 8)
    word = list(b"a bandit in a cabana")
    found, expected = function(list(word), merges), solutions.encode(word, merges)
    assert found == expected, f"'a bandit in a cabana' is {expected}, not {found}"


def decode(function: Callable) -> None:
    """What was encoded comes back."""
    merges = solutions.learn_merges(TEXT, 8)
    found = function(solutions.encode(TEXT, merges), merges)
    assert found == bytes(TEXT), f"the text came back as {found!r}"
