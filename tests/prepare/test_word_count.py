"""The estimate of different words, against a count."""

import random
import re

import pytest

from gpt2.prepare.word_count import WordCount
from gpt2.tokenizer import gpt2_tokenizer

RNG = random.Random(0)


def different(text: str) -> int:
    """Words of several tokens."""
    words = set(re.findall(r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+", text))
    return sum(len(gpt2_tokenizer().encode(word)) > 1 for word in words)


def made_of(letters: str, length: int, space: str, number: int = 30_000) -> str:
    return space.join("".join(RNG.choices(letters, k=length)) for _ in range(number))


@pytest.mark.parametrize(
    ("letters", "length", "space"),
    [
        ("abcdefghijklmnopqrstuvwxyz", 5, " "),
        ("abcdefghijklmnopqrstuvwxyz", 5, "    "),
        ("abcdefghijklmnopqrstuvwxyz", 5, "\xa0 \xa0 "),
        ("abcdefghijklmnopqrstuvwxyz", 5, "\n"),
        ("abcdefghijklmnopqrstuvwxyz", 7, ","),
        ("0123456789", 8, "x"),
        ("!?#-+=*/", 7, "a"),
        ("äöüßéè", 5, " "),
        ("ab", 20, " "),
        ("漢字日本語文私学生人", 5, "。"),
    ],
)
def test_words_that_differ_are_counted(letters, length, space):
    text, count = made_of(letters, length, space), WordCount()
    ids = gpt2_tokenizer().encode_documents([text])[0][1:]
    for _ in range(40):
        count.add(ids)
    assert count.different >= 0.5 * different(text)


def test_words_that_return_are_counted_once():
    count = WordCount()
    ids = gpt2_tokenizer().encode_documents(["xqzj the end, of it: vkwp\nqqx " * 2000])[0][1:]
    for _ in range(100):
        count.add(ids)
    assert count.different <= 32 * 10
    count.add(ids[:1])
    count.add(ids[:0])
