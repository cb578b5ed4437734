"""Text that is larger than it looks: bounded memory, and rows left out are counted."""

import gzip
import json
import lzma
import os
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.cli import main
from gpt2.data import parquet_pages, text_files
from gpt2.data.parquet_pages import Pages, pages_of
from gpt2.data.shards import read_manifest
from gpt2.data.text_files import TooLong, read_items, read_rows
from gpt2.errors import DamagedFile, UserError

from ..conftest import ROOT
from ..memory import PEAK

MB = 10**6
BUDGET_MB = 600
PREPARE = (
    PEAK
    + """
import resource, sys, time
from gpt2.cli import main
import gigatoken, pyarrow.parquet, pyarrow.compute
from gpt2.prepare.fast_tokenizer import FastTokenizer
FastTokenizer().encode_documents(["a"])
try:  # the imports took more for a moment
    before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
except OSError:
    before = peak()
began = time.process_time()
code = main(["prepare", *sys.argv[1:], "--shard_tokens=1000000", "--num_workers=2"])
print(f"\\n{peak() - before:.0f} {time.process_time() - began:.1f} {code}")
"""
)


def rows(path, **options):
    return [text for text, _ in read_rows(path, **options)]


def compressed(path, parts):
    """Writes parts of bytes, compressed as the name of the file says."""
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            for part in parts:
                file.write(part)
    else:
        opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opened(path, "wb") as file:
            for part in parts:
                file.write(part)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_a_line_over_the_limit_is_left_out(tmp_path, suffix):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in ("a", "b" * 5000, "c")]
    path = compressed(tmp_path / f"x.jsonl{suffix}", [*lines, b"\n", b'{"text": "' + b"d" * 9000])
    assert rows(path, limit=1000) == ["a", "", "c", ""]
    found = rows(path, limit=1000)
    assert [isinstance(text, TooLong) for text in found] == [False, True, False, True]
    assert rows(path, start=2, limit=1000) == ["c", ""]
    assert rows(path) == ["a", "b" * 5000, "c", None]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_a_text_file_over_the_limit_is_left_out(tmp_path, suffix):
    path = compressed(tmp_path / f"x.txt{suffix}", [b"a" * 1000])
    assert rows(path, limit=1000) == ["a" * 1000]
    assert isinstance(rows(path, limit=999)[0], TooLong)


@pytest.mark.parametrize("dictionary", [True, False])
def test_values_of_parquet_over_the_limit_are_left_out(tmp_path, dictionary):
    texts = ["a", "b" * 5000, None, "c", ""] * 700
    pq.write_table(
        pa.table({"id": range(3500), "text": texts}), tmp_path / "x.parquet",
        use_dictionary=dictionary, row_group_size=1000,
    )  # fmt: skip
    expected = [(text or None) if len(text or "") <= 1000 else "" for text in texts]
    assert rows(tmp_path / "x.parquet", limit=1000) == expected
    assert rows(tmp_path / "x.parquet", start=1003, limit=1000) == expected[1003:]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_the_largest_page_is_found(tmp_path, compression, version, dictionary, monkeypatch):
    path = tmp_path / "x.parquet"
    texts = ["a" * 3000, "b" * 10_000, "c" * 50_000] * 20
    pq.write_table(
        pa.table({"text": texts, "more": [["x" * 200_000]] * 60}), path, compression=compression,
        data_page_version=version, use_dictionary=dictionary, write_page_checksum=True,
    )  # fmt: skip
    group = pq.ParquetFile(path).metadata.row_group(0)
    held = (3000 + 10_000 + 50_000) * (1 if dictionary else 20)
    found = pages_of(path, group, MB * 100, "text")
    page, other = found.largest, found.dictionary
    page, other = (other, page) if dictionary else (page, other)
    assert held <= page <= held + 1000
    assert other < 1000
    everything = pages_of(path, group, MB * 100)
    held += 200_000 * (1 if dictionary else 60)
    assert held <= everything.dictionary + everything.total <= held + 3000
    with pytest.raises(UserError, match=r"a page of .* bytes; pages of up to 1,000 are"):
        pages_of(path, group, 1000)
    monkeypatch.setattr(parquet_pages, "MAX_VALUES", 59)
    with pytest.raises(UserError, match="a row group of over 59 values"):
        pages_of(path, group, MB * 100)
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    with pytest.raises(OSError, match="the header of a page cannot be read"):
        pages_of(path, group, MB * 100, "text")


def test_batches_are_small_where_one_long_value_may_be_in_each_row():
    assert Pages(dictionary=0, largest=10, total=500).rows_at_once(1000) == 500
    assert Pages(dictionary=0, largest=10, total=5000).rows_at_once(1000) == 100
    assert Pages(dictionary=100, largest=10, total=500).rows_at_once(1000) == 10
    assert Pages(dictionary=100, largest=500, total=500).rows_at_once(1000) == 5
    assert Pages(dictionary=100, largest=500, total=500).rows_at_once(1000, True) == 500
    assert Pages(dictionary=10**9, largest=10, total=500).rows_at_once(1000) == 1


def test_a_list_that_repeats_one_long_value_is_refused(tmp_path, monkeypatch):
    """A file of 1 KB: one value of the dictionary, 3,000 times in a list, and rows beside it."""
    lists = [["a" * 10_000] * 3000, [], ["b"], None, ["c" * 10_000] * 9]
    rows = [{"messages": [{"content": text} for text in row or []]} for row in lists]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [item for _, item in read_items(path)] == rows
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", MB)
    with pytest.raises(UserError, match="a row is longer than 1,000,000 bytes"):
        list(read_items(path))
    pq.write_table(pa.Table.from_pylist(rows[1:] * 30), path)
    assert [item for _, item in read_items(path)] == rows[1:] * 30


def test_a_large_dictionary_is_refused_before_it_is_made(tmp_path):
    """An .xz file asks for memory; `xz -9` for 64 MB."""
    path = tmp_path / "x.txt.xz"
    for size, readable in ((2**26, True), (2**28, False)):
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": size}]
        path.write_bytes(lzma.compress(b"abc", filters=filters))
        if readable:
            assert rows(path) == ["abc"]
        else:
            with pytest.raises(DamagedFile, match="damaged or unreadable after row 0"):
                rows(path)


def test_xz_files_of_several_streams_and_cut_ones(tmp_path):
    path, one = tmp_path / "x.txt.xz", lzma.compress(b"abc" * 9000)
    for content, expected in ((one, 1), (one + one, 2), (one + one + b"\0" * 8, 2)):
        path.write_bytes(content)
        assert rows(path) == ["abc" * 9000 * expected]
    for damaged in (one[:-20], b"", b"no xz at all"):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile):
            rows(path)


def test_items_are_bounded_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", 100)
    path = compressed(tmp_path / "x.jsonl.gz", [b'{"a": 1}\n', b'{"a": "' + b"b" * 5000])
    with pytest.raises(UserError, match="row 2 is longer than 100 bytes"):
        list(read_items(path))
    path.write_bytes(gzip.compress(b"[" * 5000))
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", 10_000)
    with pytest.raises(UserError, match="row 1 is JSON that is nested too deeply"):
        list(read_items(path))


def prepared(tmp_path, source, *argv):
    out = tmp_path / "out"
    return main(["prepare", f"--source={source}", f"--out_dir={out}", *argv]), out


def test_rows_left_out_are_counted_and_said(tmp_path, capsys):
    texts = ["hello world, " * 50, "x" * 300_000, "a b " * 400_000, None, "y"]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, out = prepared(tmp_path, path, "--max_document_mb=1", "--num_workers=1")
    assert code == 0
    manifest = read_manifest(out)
    assert (manifest["documents"], manifest["skipped_rows"], manifest["too_long_rows"]) == (2, 1, 2)
    said = capsys.readouterr().out
    assert "1 rows without a text were skipped, 2 of over 1 MB (--max_document_mb), or" in said
    assert prepared(tmp_path, path, "--max_document_mb=1")[0] == 0
    assert prepared(tmp_path, path, "--max_document_mb=2")[0] == 2
    assert "made with max_document_mb=1, not 2" in capsys.readouterr().err


def jsonl(path, texts):
    return compressed(path, (json.dumps({"text": t}).encode() + b"\n" for t in texts))


def other_words(number, space):
    """Documents of 100,000 words each, nearly all different, of five letters."""
    rng = random.Random(0)
    for _ in range(number // 100_000):
        letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=500_000)
        yield space.join("".join(letters[i : i + 5]) for i in range(0, 500_000, 5))


def parquet(path, texts, **options):
    pq.write_table(pa.table({"text": texts}), path, compression="zstd", **options)
    return path


LARGEST = 50 * MB - 20  # bytes of a line that is read
SHORT = b'{"text": "' + b"b c " * 100 + b'"}\n'
LARGE_TEXTS = {  # harmless in size: each is far above the budget if it is read or encoded at once
    "a line of 900 MB": lambda p: compressed(
        p / "x.jsonl.xz", [b'{"text": "', *[b"a" * MB] * 900, b'"}\n', SHORT]
    ),
    "a text of 900 MB": lambda p: compressed(p / "x.txt.gz", [b"a b " * (MB // 4)] * 900),
    "lists in a line": lambda p: compressed(
        p / "x.jsonl.gz", [b'{"a": [', b"[]," * (16 * MB), b"1]}\n", SHORT]
    ),
    "emoji, as long as a line may be": lambda p: compressed(
        p / "x.jsonl.gz", [b'{"text": "' + "😀 ".encode() * (LARGEST // 5) + b'"}\n']
    ),
    "other words": lambda p: jsonl(p / "x.jsonl.gz", other_words(12_000_000, " ")),
    "other words, wide spaces": lambda p: jsonl(p / "x.jsonl.gz", other_words(6_000_000, "     ")),
    "ten long documents": lambda p: jsonl(p / "x.jsonl.gz", ["word and " * 1_000_000] * 10),
    "a dictionary of parquet": lambda p: parquet(p / "x.parquet", ["ab " * 300_000] * 300),
    "row groups of parquet": lambda p: parquet(
        p / "x.parquet", [f"{n} " + "ab " * 300 for n in range(200_000)],
        use_dictionary=False, row_group_size=200_000,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.fault(29, "compressed lines, documents, lists, dictionaries and row groups")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="resource is missing on Windows")
@pytest.mark.parametrize("tokenizer", ["gigatoken", "tiktoken"])
@pytest.mark.parametrize("name", LARGE_TEXTS)
def test_text_takes_little_memory(tmp_path, name, tokenizer, record_property):
    path = LARGE_TEXTS[name](tmp_path)
    child = [sys.executable, "-c", PREPARE, f"--source={path}", f"--tokenizer={tokenizer}"]
    child += [f"--out_dir={tmp_path / 'out'}"]
    answer = subprocess.run(child, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "Traceback" not in answer.stderr
    extra_mb, seconds, code = answer.stdout.splitlines()[-1].split()
    assert int(code) in (0, 2), answer.stdout + answer.stderr
    assert int(extra_mb) <= BUDGET_MB
    record_property(
        "survived", f"{name}, {tokenizer}: {extra_mb} MB above the imports, {seconds} s"
    )
