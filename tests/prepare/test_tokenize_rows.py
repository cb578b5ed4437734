"""Threads that encode: order, positions, the check against tiktoken, and the end of them."""

import json
import threading

import numpy as np
import pytest

from gpt2.errors import UserError
from gpt2.prepare import fast_tokenizer, tokenize_rows
from gpt2.prepare.sources import Part, Source
from gpt2.prepare.tokenize_rows import Position, encode_rows
from gpt2.tokenizer import gpt2_tokenizer

from .test_fast_tokenizer import UNICODE_17


def source_of(*texts):
    return Source("x", "", tuple(Part(f"{i}.txt", len(t), text=t) for i, t in enumerate(texts)))


def write_jsonl(path, lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return Source("x", "", (Part(path.name, path.stat().st_size, path=path),))


def encoded(source, start=None, num_workers=2, choice="auto"):
    """(tokens, lengths, places) of all batches together."""
    batches = list(encode_rows(source, start or Position(), num_workers, choice))
    return (
        np.concatenate([tokens for _, tokens, _ in batches]).tolist(),
        np.concatenate([lengths for _, _, lengths in batches]).tolist(),
        [place for batch, _, _ in batches for place in batch.places],
    )


@pytest.mark.parametrize("num_workers", [0, 1, 2, 7])
@pytest.mark.parametrize("choice", ["gigatoken", "tiktoken"])
def test_rows_come_in_order(monkeypatch, num_workers, choice):
    monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", 3)
    texts = [f"document {i} " * (i % 7 * 100 + 1) for i in range(100)]
    tokens, lengths, places = encoded(source_of(*texts), num_workers=num_workers, choice=choice)
    expected, expected_lengths = gpt2_tokenizer().encode_documents(texts)
    assert tokens == expected.tolist()
    assert lengths == expected_lengths.tolist()
    assert places == [(i, 0) for i in range(100)]


def test_rows_without_a_text_keep_their_places(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", ['{"text": "a"}', "[1]", '{"text": ""}',
                                                '{"text": "b c"}'])  # fmt: skip
    _, lengths, places = encoded(source)
    assert lengths == [2, 0, 0, 3]
    assert places == [(0, 0), (0, 1), (0, 2), (0, 3)]
    tokens, lengths, places = encoded(source, Position(row=2))
    assert (lengths, places) == ([0, 3], [(0, 2), (0, 3)])
    assert tokens == gpt2_tokenizer().encode_documents(["b c"])[0].tolist()


def test_a_stream_that_is_left_early_leaves_no_thread(monkeypatch):
    monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", 1)
    before = threading.active_count()
    stream = encode_rows(source_of(*["text"] * 100), Position(), 3, "auto")
    next(stream)
    assert threading.active_count() == before + 3
    stream.close()
    assert threading.active_count() == before


def test_few_batches_are_under_way(monkeypatch):
    monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", 1)
    source, read = source_of(*["text"] * 100), []
    rows = Source.rows
    monkeypatch.setattr(Source, "rows", lambda *args: read.append(args) or rows(*args))
    for number, _ in enumerate(encode_rows(source, Position(), 2, "auto"), 1):
        assert len(read) <= number + 2 * 2


# ---- the check against tiktoken; the two libraries are known to differ on this text


@pytest.fixture
def differing(monkeypatch):
    monkeypatch.setattr(fast_tokenizer, "_is_settled", lambda text: True)
    monkeypatch.setattr(tokenize_rows, "CHECK_EVERY", 10)


def differing_source(tmp_path, row):
    lines = ['{"text": "fine"}', "[]"] * 50
    lines[row] = json.dumps({"text": UNICODE_17})
    return write_jsonl(tmp_path / "x.jsonl", lines)


@pytest.mark.parametrize("row", [0, 10, 40])
@pytest.mark.parametrize("batch_rows", [1, 3, 1000])
def test_a_difference_stops_with_one_line(tmp_path, differing, monkeypatch, row, batch_rows):
    monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", batch_rows)
    message = rf"x\.jsonl, row {row}: gigatoken and tiktoken .*use --tokenizer=tiktoken"
    with pytest.raises(UserError, match=message) as error:
        encoded(differing_source(tmp_path, row))
    assert "\n" not in str(error.value)


def test_the_first_document_of_a_thread_is_checked_too(tmp_path, differing):
    with pytest.raises(UserError, match="row 1: gigatoken and tiktoken"):
        encoded(differing_source(tmp_path, 1), Position(row=1), num_workers=1)


def test_only_a_sample_is_checked(tmp_path, differing):
    encoded(differing_source(tmp_path, 3), num_workers=1)


def test_tiktoken_is_not_checked_against_itself(tmp_path, differing):
    tokens, _, _ = encoded(differing_source(tmp_path, 10), choice="tiktoken")
    assert gpt2_tokenizer().encode(UNICODE_17)[0] in tokens
