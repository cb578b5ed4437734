"""The tokenizer's files, read by the library that they are for."""

import json

import pytest
import transformers

from gpt2 import tokenizer
from gpt2.huggingface.tokenizer_files import tokenizer_files, tokenizer_json
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer

TEXTS = ("Hello world", "  def f(x):\n\treturn x  ", "naïve 漢字 🦄", "I'll 123")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(64).items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_ours(theirs, text):
    assert theirs.encode(text) == gpt2_tokenizer().encode(text)
    assert theirs.decode(theirs.encode(text)) == text


def test_end_of_text_is_their_special_token(theirs):
    assert theirs.eos_token_id == theirs.bos_token_id == END_OF_TEXT
    assert theirs.encode("<|endoftext|>") == [END_OF_TEXT]
    as_text = theirs.encode("<|endoftext|>", split_special_tokens=True)
    assert as_text == gpt2_tokenizer().encode("<|endoftext|>")
    assert theirs.model_max_length == 64


def test_changed_merges_are_not_written(tmp_path, monkeypatch):
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / name).write_bytes((tokenizer.merges_folder() / name).read_bytes())
    with open(tmp_path / "vocab.bpe", "ab") as file:
        file.write(b"x y\n")
    monkeypatch.setattr("gpt2.huggingface.tokenizer_files.merges_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"(?i)hash"):
        tokenizer_json()


def test_merges_of_the_file_are_gpt2s():
    content = json.loads(tokenizer_json())
    assert len(content["model"]["merges"]) == 50_000
    assert content["model"]["merges"][0] == "Ġ t"
    assert content["added_tokens"] == []
