"""Pieces of long texts: bounded, and with the tokens of the whole text."""

import random
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


@pytest.mark.parametrize("number", range(len(SAMPLES)))
@pytest.mark.parametrize("kind", [Tokenizer, FastTokenizer])
def test_no_token_changes_at_any_cut(number, kind, monkeypatch):
    """Pieces of some ten characters, so that every kind of place is cut."""
    text = joined(SAMPLES[number:] + SAMPLES[:number], 20_000)
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
        assert np.array_equal(kind().encode_documents([text])[0], expected)


@pytest.mark.parametrize("kind", [Tokenizer, FastTokenizer])
def test_ordinary_text_of_some_megabytes(kind, monkeypatch):
    """Sources, prose and Chinese: one document of 3 MB has the tokens that it had."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(path.read_text("utf-8", "replace") for path in sources)[:2_000_000]
    text += joined(SAMPLES, 1_000_000)
    assert len(pieces(text)) >= 15
    expected = whole(text, monkeypatch)
    assert np.array_equal(kind().encode_documents([text])[0], expected)
    assert np.array_equal(kind().encode_documents(["a b", text, "c"])[0][3:-2], expected)


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
