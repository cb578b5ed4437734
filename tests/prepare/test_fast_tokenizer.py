"""gigatoken against tiktoken: equal ids on every text."""

import random
import sys
import sysconfig
from pathlib import Path

import gigatoken
import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.errors import UserError
from gpt2.prepare import fast_tokenizer
from gpt2.prepare.fast_tokenizer import FastTokenizer, tokenizer_class
from gpt2.tokenizer import Tokenizer, gpt2_tokenizer

from ..test_tokenizer import NASTY, pieces

UNICODE_17 = "\U000323b6怂"  # the first is a letter since Unicode 17, which tiktoken has not got
DOCUMENTS = [
    *NASTY.values(),
    "before<|endoftext|>after",
    "<|endoftext|>",
    "lone \ud800 surrogates \udfff",
    UNICODE_17,
    "new \u088f\u0c5c\ua7ce letters",
]


@pytest.fixture(scope="module")
def fast():
    return FastTokenizer()


def assert_same(fast, texts):
    ours, lengths = fast.encode_documents(texts)
    expected, expected_lengths = gpt2_tokenizer().encode_documents(texts)
    assert (ours.dtype, lengths.dtype) == (np.uint16, np.int64)
    assert np.array_equal(lengths, expected_lengths)
    assert np.array_equal(ours, expected)


def test_fast_tokens_are_the_same_on_nasty_text(fast):
    assert_same(fast, [])
    assert_same(fast, [*DOCUMENTS, "a" * 200_000])
    for text in DOCUMENTS:
        assert_same(fast, [text])


def test_fast_tokens_are_the_same_on_real_text(fast):
    root = Path(sysconfig.get_path("stdlib"))
    assert_same(fast, [f.read_text("utf-8", errors="replace") for f in sorted(root.glob("*.py"))])


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text() | pieces.map("".join), max_size=5))
def test_fast_tokens_are_the_same_on_any_text(fast, texts):
    assert_same(fast, texts)


def classes_of_tiktoken(characters):
    """Class -> its characters; a match of the pattern is all that tiktoken encodes."""
    ranks = {bytes([i]): i for i in range(256)}
    found = {}
    for name, pattern in {"letter": r"\p{L}", "number": r"\p{N}", "space": r"\s"}.items():
        encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        found[name] = set(encoding.decode(encoding.encode_ordinary("".join(characters))))
    return found


def classes_of_gigatoken(characters):
    """Class -> its characters, from what each of them makes one word with."""
    text = "".join(f"!{c}a!{c}1" for c in characters)
    words = set(gigatoken.pretokenizer(text.encode()))
    found = {"letter": {c for c in characters if f"{c}a".encode() in words}}
    found["number"] = {c for c in characters if f"{c}1".encode() in words}
    joined = {c: (f"{c}a", f"{c}1", f"!{c}") for c in characters}
    found["space"] = {
        c for c, made in joined.items() if not any(word.encode() in words for word in made)
    }
    return found


@pytest.mark.slow
def test_fast_and_reference_agree_on_every_settled_character(fast):
    """All of Unicode: what the pattern sees of a character is its class."""
    planes = [*range(128, 0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xF0000)]
    beyond_ascii = list(map(chr, planes))  # nothing is assigned on the other planes
    ours, theirs = classes_of_tiktoken(beyond_ascii), classes_of_gigatoken(beyond_ascii)
    assert len(ours["letter"]) > 140_000
    differ = set().union(*(ours[name] ^ theirs[name] for name in ours))
    assert not [c for c in differ if fast_tokenizer._is_settled(c)]
    assert all(map(fast_tokenizer._is_settled, "é漢字한글שלוםあก½“”—…🦄👩🏽‍🚀"))


def test_documents_of_unsettled_characters_go_to_the_reference(fast, monkeypatch):
    text = UNICODE_17
    monkeypatch.setattr(fast_tokenizer, "_is_settled", lambda text: True)
    tokens, _ = fast.encode_documents([text])
    assert fast.differs(text, tokens)  # so the test has teeth
    monkeypatch.undo()
    tokens, _ = fast.encode_documents([text])
    assert not fast.differs(text, tokens)


def test_memory_of_words_is_given_up_now_and_then(fast, monkeypatch):
    monkeypatch.setattr(fast_tokenizer, "FRESH_AFTER", -1)
    fresh = FastTokenizer()
    used = set()
    for _ in range(4):
        assert_same(fresh, ["twelve chars"])
        used.add(fresh._fast)
    assert len(used) == 4


def test_choice_of_the_tokenizer(monkeypatch):
    assert tokenizer_class("tiktoken") is Tokenizer
    assert tokenizer_class("auto") is FastTokenizer
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if not installed
    assert tokenizer_class("auto") is Tokenizer
    with pytest.raises(UserError, match=r"gigatoken: cannot be loaded .*use --tokenizer=tiktoken"):
        tokenizer_class("gigatoken")


def test_the_cache_of_words_is_bounded(monkeypatch):
    """gigatoken keeps every word; the tokenizer is made anew after so many."""
    made, make = [], fast_tokenizer._gigatoken
    monkeypatch.setattr(fast_tokenizer, "_gigatoken", lambda: made.append(1) or make())
    monkeypatch.setattr(fast_tokenizer, "FRESH_AFTER", 20_000)
    tokenizer = FastTokenizer()
    for _ in range(20):  # 800,000 words, 3 of several tokens
        tokenizer.encode_documents(["xqzj the end, of it: vkwp\nqqx " * 5000])
    assert len(made) == 1
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=250_000)
    words = ["".join(letters[i : i + 5]) for i in range(0, 250_000, 5)]
    for _ in range(3):
        tokenizer.encode_documents([" ".join(words)])
    assert len(made) == 3
