"""Pieces of long texts: bounded, and with the tokens of the whole text."""

import os
import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from gpt2 import tokenizer
from gpt2.prepare import fast_tokenizer
from gpt2.prepare.fast_tokenizer import FastTokenizer
from gpt2.tokenizer import Tokenizer
from gpt2.untrusted import long_text
from gpt2.untrusted.long_text import PIECE, LongWord, beginning, has_long_word, pieces

from ..conftest import ROOT
from ..memory import PEAK

SAMPLES = [
    "It's 3pm, 'tis the_end... don't! x='s' 12,5e-3\n\n\tdef f(x):\n    return {'a': 1}\n",
    "今日は、世界。これは２つ目の文です！漢字とカナ，한국어 텍스트.\u3000次",
    "naïve Übergröße — «être» … №5 ½ x² \u00a0\u2003y\u2028z \x1c's \x85 a\u200bb",
    "base64: QUJDREVGR0g9PQ== 'll 've 're 'LL I'm\r\n\r\n  ??!!''s''t",
]


def joined(samples, characters) -> str:
    rng, text = random.Random(0), []
    while sum(map(len, text)) < characters:
        text.append(rng.choice(samples))
    return "".join(text)


def whole(text, monkeypatch) -> np.ndarray:
    """The tokens by tiktoken at once."""
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "pieces", lambda text: [text])
        return Tokenizer().encode_documents([text])[0]


@pytest.fixture(scope="module")
def tokenizers():
    return Tokenizer(), FastTokenizer()


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_no_token_changes_at_any_cut(number, tokenizers, monkeypatch):
    """Pieces of some ten characters, so that every kind of place is cut."""
    text = joined(SAMPLES[number:] + SAMPLES[:number], 6000)
    expected = whole(text, monkeypatch)
    for size in (40, 61, 200):
        monkeypatch.setattr(long_text, "PIECE", size)
        monkeypatch.setattr(fast_tokenizer, "PIECE", size)
        try:
            cut = pieces(text)
        except LongWord:
            assert size < 100
            continue
        assert "".join(cut) == text
        assert len(cut) >= len(text) / size
        assert max(map(len, cut)) <= size
        for one in tokenizers:
            assert np.array_equal(one.encode_documents([text])[0], expected)


def test_ordinary_text_of_some_megabytes(tokenizers, monkeypatch):
    """Sources, prose and Chinese: one document of 1.2 MB has the tokens that it had."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(path.read_text("utf-8", "replace") for path in sources[:60])[:800_000]
    text += joined(SAMPLES, 400_000)
    assert len(pieces(text)) >= 6
    expected = whole(text, monkeypatch)
    for one in tokenizers:
        found = one.encode_documents(["a b", text, "c"])[0]
        assert np.array_equal(found[3:-2], expected)


@pytest.mark.parametrize("sign", ["a", "=", "1", "é", "😀", "漢"])
def test_a_word_without_end_is_refused(sign):
    text = sign * (2 * PIECE)
    assert has_long_word(f"x {text} y")
    with pytest.raises(LongWord, match="a word of over 200,000 characters"):
        Tokenizer().encode(text)
    assert not has_long_word(text[:PIECE])
    assert not has_long_word(f"{text[: PIECE // 2]} {text[: PIECE // 2]}")


@pytest.mark.parametrize("text", ["ab, cd " * 200_000, "a" * 199_999 + " b" * 200_000])
def test_the_beginning_has_the_tokens_of_the_whole(text):
    start = beginning(text, 1000)
    assert 1000 <= len(start) <= 1000 + PIECE
    assert text.startswith(start)
    ids = Tokenizer().encode(start)
    assert Tokenizer().encode(text)[: len(ids)] == ids
    assert beginning("abc", 1) == "abc"


STRANGE = (
    PEAK
    + """
import os, random, resource, sys, time
from gpt2.prepare.fast_tokenizer import tokenizer_class
rng = random.Random(0)
letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4_000_000))
KINDS = {  # name -> a part that is repeated, or the text itself
    "one letter": "a" * 199_000 + " ",
    "one sign": "=" * 199_000 + " ",
    "one digit": "7" * 199_000 + " ",
    "other letters": letters[:199_000] + " ",
    "apostrophes": "'s" * 1000 + "'",
    "spaces": " " * 99_000 + "a",
    "many spaces": " " * 300_000 + "a",
    "line breaks": "\\n \\t" * 30_000 + "a",
    "spaces and signs": " ! ?",
    "other words": " ".join(letters[i : i + 5] for i in range(0, 4_000_000, 5)),
    "other words, wide spaces": "    ".join(letters[i : i + 5] for i in range(0, 4_000_000, 5)),
    "Chinese": "漢字" * 60_000 + "。",
    "emoji": "😀" * 60_000 + " ",
    "marks": "e\\u0301" * 60_000 + " ",
    "null": "\\0" * 199_000 + " ",
    "surrogates": "\\ud800a ",
    "letters of new Unicode": "\\U0001e000\\U00010d40 ",
}
tokenizer = tokenizer_class(sys.argv[1])()
tokenizer.encode_documents(["a \\ud800", "a \\U0001e000"])
for name, part in KINDS.items():
    if not os.fork():
        before, seconds = peak(), []
        for characters in (1_000_000, 4_000_000):
            text = (part * (characters // len(part) + 1))[:characters]
            began = time.process_time()
            for _ in range(2):  # the second text shows what is kept of the first
                tokenizer.encode_documents([text])
            seconds.append(time.process_time() - began)
        print(name, *(f"{s:.2f}" for s in seconds), f"{peak() - before:.0f}", sep="\t", flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.fault(29, "texts of one sign, one letter, one word, other words, spaces, emoji, marks")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows")
@pytest.mark.parametrize("tokenizer", ["gigatoken", "tiktoken"])
def test_text_of_any_kind_takes_linear_time_and_little_memory(tokenizer, record_property):
    """Four times the text takes at most eight times as long, and 600 MB."""
    child = [sys.executable, "-c", STRANGE, tokenizer]
    answer = subprocess.run(child, capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [line.split("\t") for line in answer.stdout.splitlines()]
    for name, short, long, extra_mb in lines:
        assert float(long) <= 8 * float(short) + 0.5, name
        assert float(extra_mb) <= 600, name
    slowest, largest = (max(float(line[column]) for line in lines) for column in (2, 3))
    record_property(
        "survived",
        f"{tokenizer}, {len(lines)} kinds: 8 MB within {slowest:.1f} s and {largest:.0f} MB",
    )
