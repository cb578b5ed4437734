"""The shard format, against bytes that the tests write themselves."""

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from gpt2 import files
from gpt2.commands.inspect_shards import info
from gpt2.data import shards
from gpt2.data.shards import find_shards, open_shard, read_manifest, write_manifest, write_shard
from gpt2.errors import UserError

from ..conftest import ROOT


def shard_bytes(tokens, magic=20240520, version=1, count=None):
    """A shard as llm.c describes it: 256 int32, then uint16, all little-endian."""
    count = len(tokens) if count is None else count
    header = struct.pack("<256i", magic, version, count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def test_layout_of_a_written_shard(tmp_path):
    tokens = [50256, 0, 1, 255, 256, 50255]
    path = tmp_path / "x_train_000001.bin"
    digest = write_shard(path, np.array(tokens, dtype=np.uint16))
    assert path.read_bytes() == shard_bytes(tokens)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_reads_a_shard_made_by_hand(tmp_path):
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(shard_bytes([50256, 7, 8, 9]))
    shard = open_shard(path)
    assert shard.tokens == 4
    assert shard.read(0, 4).tolist() == [50256, 7, 8, 9]
    assert shard.read(2, 2).tolist() == [8, 9]
    assert shard.read(4, 0).tolist() == []


@pytest.mark.parametrize("count", [0, 1, 7, 8, 20])
def test_chunks_are_all_tokens_in_order(tmp_path, monkeypatch, count):
    monkeypatch.setattr(shards, "CHUNK_TOKENS", 8)
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(shard_bytes(range(count)))
    shard = open_shard(path)
    chunks = list(shard.chunks())
    assert [token for chunk in chunks for token in chunk] == list(range(count))
    assert all(0 < len(chunk) <= 8 for chunk in chunks)
    whole = shard.header_bytes() + b"".join(chunk.tobytes() for chunk in chunks)
    assert whole == path.read_bytes()


GOOD = shard_bytes(range(100))
DAMAGED = {
    "empty": (b"", "not a token shard"),
    "text": (b"hello world\n" * 200, "not a token shard"),
    "short header": (GOOD[:1000], "not a token shard"),
    "magic": (shard_bytes(range(100), magic=20240521), "magic number is not 20240520"),
    "version": (shard_bytes(range(100), version=2), "version 2 of the shard format"),
    "truncated": (GOOD[:-100], "header says 100 tokens, file holds 50 .truncated download"),
    "odd size": (GOOD[:-1], "header says 100 tokens, file holds 99"),
    "too long": (GOOD + b"\0\0", "header says 100 tokens, file holds 101"),
    "negative count": (shard_bytes(range(100), count=-1), "header says -1 tokens"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
@pytest.mark.fault(14, "magic, version, count, odd size, empty")
def test_damage_is_found_on_opening(tmp_path, content, message):
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_shard(path)
    assert str(path) in str(caught.value)
    assert "gpt2 prepare" in str(caught.value) or "only version 1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [50257, 50303, 65535])
@pytest.mark.fault(15, "50257, 50303, 65535")
def test_ids_outside_the_vocabulary(tmp_path, bad):
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(shard_bytes([1, 2, 3, bad, 4]))
    shard = open_shard(path)
    assert shard.read(0, 3).tolist() == [1, 2, 3]
    with pytest.raises(UserError, match=f"token {bad} at offset 3 is outside"):
        shard.read(2, 3)


@pytest.mark.fault(17)
def test_file_cut_short_after_opening(tmp_path):
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(GOOD)
    shard = open_shard(path)
    os.truncate(path, 1024 + 50)
    assert shard.read(0, 25).tolist() == list(range(25))
    with pytest.raises(UserError, match="ends early"):
        shard.read(20, 10)


def test_missing_shard(tmp_path):
    with pytest.raises(UserError, match=r"x_train_000001\.bin: No such file"):
        open_shard(tmp_path / "x_train_000001.bin")


def test_find_shards_sorts_and_separates_splits(tmp_path):
    for number in (10, 2, 1):
        (tmp_path / f"x_train_{number:06d}.bin").write_bytes(shard_bytes(range(number)))
    (tmp_path / "x_val_000000.bin").write_bytes(shard_bytes([5]))
    (tmp_path / "x_train_000003.bin.tmp").write_bytes(b"half")
    assert [s.tokens for s in find_shards(tmp_path, "train")] == [1, 2, 10]
    assert [s.tokens for s in find_shards(tmp_path, "val")] == [1]


def test_find_shards_checks_every_shard(tmp_path):
    (tmp_path / "x_train_000001.bin").write_bytes(GOOD)
    (tmp_path / "x_train_000002.bin").write_bytes(GOOD[:-2])
    with pytest.raises(UserError, match=r"x_train_000002\.bin"):
        find_shards(tmp_path, "train")


def test_find_shards_says_how_to_make_them(tmp_path):
    with pytest.raises(UserError, match=r"fineweb\.py"):
        find_shards(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="gpt2 prepare"):
        find_shards(tmp_path, "train")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(GOOD)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_shard(path, np.zeros(5, np.uint16))
    assert path.read_bytes() == GOOD


def test_killed_write_leaves_no_half_file(tmp_path, monkeypatch):
    class Killed(BaseException):
        """Stands for the end of the process between two system calls."""

    def killed(source, target):
        raise Killed

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(Killed):
        write_shard(tmp_path / "x_train_000001.bin", np.zeros(5, np.uint16))
    assert list(tmp_path.glob("*.bin")) == []


def test_manifest_round_trip(tmp_path):
    assert read_manifest(tmp_path) is None
    entry = {"name": "x_train_000001.bin", "split": "train", "tokens": 3, "documents": 1}
    manifest = {"source": "mein Körper", "shards": [entry | {"sha256": "0" * 64}]}
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert "Körper" in (tmp_path / "manifest.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x_train_000001.bin"},
        {"name": "C:\\x_train_000001.bin"},
        {"name": "x"},
        {"split": "val"},
        {"tokens": "3"},
        {"sha256": None},
        {"documents": None},
    ],
)
@pytest.mark.fault(13, "../ and C:\\\\ in a manifest of shards")
def test_manifest_whose_entries_are_no_shards_of_its_folder(tmp_path, change):
    entry = {"name": "x_train_000001.bin", "split": "train", "tokens": 3, "documents": 1}
    write_manifest(tmp_path, {"shards": [entry | {"sha256": "0" * 64} | change]})
    with pytest.raises(UserError, match="is not a manifest of shards"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"shards": 3}'])
def test_damaged_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl"])
def test_a_folder_of_texts_is_led_to_prepare(name, tmp_path):
    (tmp_path / name).write_text("{}", "utf-8")
    with pytest.raises(UserError) as caught:
        find_shards(tmp_path, "train")
    assert f"run `gpt2 prepare --source={tmp_path} --out_dir=data/mine`" in str(caught.value)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"run `gpt2 prepare --out_dir=.*`"):
        find_shards(tmp_path, "train")


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_arrays_of_build_nanogpt_are_named_and_become_shards(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("edu_fineweb10B")
    folder.mkdir()
    tokens = {name: np.array([50256, n, 7], kind) for n, name in enumerate(("train", "val"))}
    for split, ids in tokens.items():
        np.save(folder / f"edufineweb_{split}_000001.npy", ids)
    for told in (lambda: find_shards(folder, "train"), lambda: info(folder)):
        with pytest.raises(UserError, match=r"_000001.npy, as build-nanogpt writes it") as caught:
            told()
        assert "gpt2 prepare" not in str(caught.value)
        assert "docs/data.md#other-programs" in str(caught.value)
    page = (ROOT / "docs/data.md").read_text("utf-8").partition("## Other programs")[2]
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    for split, ids in tokens.items():
        (shard,) = find_shards(folder, split)
        assert shard.read(0, shard.tokens).tolist() == ids.tolist()


def test_a_folder_above_the_shards_leads_to_them(tmp_path):
    (tmp_path / "fineweb").mkdir()
    write_shard(tmp_path / "fineweb/x_train_000001.bin", np.array([1, 2, 3], np.uint16))
    with pytest.raises(UserError, match=rf"did you mean {tmp_path}/fineweb\?$"):
        find_shards(tmp_path, "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_split_that_is_asked_for_is_named(split, tmp_path):
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"holds {split}\.bin, as nanoGPT writes it"):
        find_shards(tmp_path, split)


def test_what_prepare_does_not_read_is_not_given_to_it(tmp_path):
    (tmp_path / "a.parquet.gz").touch()
    with pytest.raises(UserError, match=r"but a\.parquet\.gz; make some of a text"):
        find_shards(tmp_path, "train")


@pytest.mark.parametrize("name", ["train.parquet", "notes.md", "x_val_000000.bin", "manifest.json"])
def test_beside_other_files_nothing_is_downloaded(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds no \*_train_\*.bin shards") as caught:
        find_shards(tmp_path, "train")
    advice = str(caught.value)
    assert "prepare --source=" in advice or "run the `gpt2 prepare` again that made it" in advice
