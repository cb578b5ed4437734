"""The page as a file; tests/test_inspect_browser.py opens it."""

import json
import math
import re

import pytest
import torch

from gpt2.errors import UserError
from gpt2.interpret import html_page
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer


def test_attention_survives_its_byte():
    torch.manual_seed(0)
    weights = (3 * torch.randn(2, 9, 9)).masked_fill(~torch.ones(9, 9).bool().tril(), -math.inf)
    weights = weights.softmax(-1)
    raw = html_page.pack_attention(weights)
    assert len(raw) == html_page.map_bytes(1, 2, 9)
    values = iter(raw)
    for h in range(2):
        for q in range(9):
            for k in range(q + 1):
                assert abs((next(values) / 255) ** 2 - weights[h, q, k]) < 0.004


def test_names_of_tokens():
    encode = gpt2_tokenizer().encode
    assert html_page.token_name(encode(" the")[0]) == " the"
    assert html_page.token_name(END_OF_TEXT) == "<|endoftext|>"
    assert html_page.token_name(60_000) == "[60000]"
    assert html_page.token_name(encode("🙂")[0]) == list("🙂".encode()[:2])


@pytest.mark.parametrize(
    "text", ["plain words\n", "a 🙂🙃 b", "日本語の文", "e\u0301 \u202e x", "🙂"]
)
def test_pieces_join_to_the_text(text):
    ids = gpt2_tokenizer().encode(text)
    pieces = html_page.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert pieces[0]


def test_a_character_cut_off_is_marked():
    ids = gpt2_tokenizer().encode("a🙂")[:2]
    assert html_page.pieces(ids) == ["a", "\ufffd"]


@pytest.mark.parametrize("text", ["</script><b>", "<!--<script>", "\u2028\u2029", "\udcff"])
def test_json_cannot_leave_its_element(text):
    written = html_page._json_for_html({"x": text})
    assert not re.search("[<\u2028\u2029]", written)
    assert json.loads(written)["x"] == text.replace("\udcff", "?")


def test_only_pages_are_overwritten(tmp_path):
    html_page.check_page_path(tmp_path / "new.html")
    ours, other = tmp_path / "ours.html", tmp_path / "other.html"
    ours.write_text(f"<html>{html_page.MARK}</html>", encoding="utf-8")
    html_page.check_page_path(ours)
    other.write_text("my thesis", encoding="utf-8")
    for path, message in (
        (other, "is there and no page"),
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "no" / "a.html", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            html_page.check_page_path(path)
