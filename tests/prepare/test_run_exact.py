"""`gpt2 prepare` with gigatoken and with tiktoken: the same bytes, whatever the text."""

import json
import random
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.config.commands import PrepareConfig
from gpt2.data.shards import find_shards, read_manifest
from gpt2.prepare import run as run_module
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer

from .test_fast_tokenizer import DOCUMENTS

HUGE = 50_000_000  # bytes


def run(source, out_dir, tokenizer, **options):
    config = PrepareConfig(source=str(source), out_dir=str(out_dir), tokenizer=tokenizer, **options)
    assert run_module.run(config) == 0
    return {path.name: path.read_bytes() for path in out_dir.iterdir()}


def huge_text():
    words = ["time", " person", " possible", " 1984", "\n", " <|endoftext|>"]
    text = "".join(random.Random(0).choices(words, k=100_000))
    return (text * (HUGE // len(text) + 1))[:HUGE]


def test_both_tokenizers_make_the_same_bytes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]  # surrogates as JSON spells them
    (source / "a.jsonl").write_text("\n".join([*lines, "", "null", "[", "{}"]), "utf-8")
    valid = [text.encode("utf-8", "replace").decode() for text in DOCUMENTS]
    pq.write_table(pa.table({"text": [None, "", *valid, "a" * 200_000]}), source / "b.parquet")
    broken = pa.array([b"\xff\xfe", b"\xed\xa0\x80", b"whole"], pa.binary())
    pq.write_table(pa.table({"text": broken}), source / "c.parquet")
    fast = run(source, tmp_path / "fast", "gigatoken", shard_tokens=40_000)
    assert len(fast) > 3
    assert fast == run(source, tmp_path / "slow", "tiktoken", shard_tokens=40_000, num_workers=3)
    manifest = read_manifest(tmp_path / "fast")
    assert manifest["skipped_rows"] == 7  # "", null, [ and {} of a; null, "" and "" of b
    surrogates = sum(text != text.encode("utf-8", "replace").decode() for text in DOCUMENTS)
    assert manifest["repaired_rows"] == surrogates + 2 > 2
    assert manifest["literal_rows"] == 2 * sum("<|endoftext|>" in text for text in DOCUMENTS) > 0
    assert manifest["documents"] == 2 * (len(DOCUMENTS) - 1) + 1 + 3


@pytest.mark.slow
def test_a_document_of_50_megabytes(tmp_path):
    text = huge_text()
    source = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["first", text, "last"]}), source)
    fast = run(source, tmp_path / "fast", "gigatoken", shard_tokens=4_000_000)
    assert fast == run(source, tmp_path / "slow", "tiktoken", shard_tokens=4_000_000)
    shards = [*find_shards(tmp_path / "fast", "val"), *find_shards(tmp_path / "fast", "train")]
    stream = np.concatenate([shard.read(0, shard.tokens) for shard in shards])
    begins = np.flatnonzero(stream == END_OF_TEXT)
    assert len(begins) == 3  # and none for the literal ones
    document = stream[begins[1] + 1 : begins[2]]
    assert gpt2_tokenizer().bytes_per_token()[document].sum() == HUGE
    assert gpt2_tokenizer().decode(document[:1000].tolist()) in text


def test_what_is_said_where_gigatoken_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.txt").write_text("some words " * 100)
    fast = run(tmp_path / "x.txt", tmp_path / "fast", "auto")
    assert "gigatoken" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if not installed
    assert run(tmp_path / "x.txt", tmp_path / "slow", "auto") == fast
    assert 'pip install -e ".[fast]"' in capsys.readouterr().out
