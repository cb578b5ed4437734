"""kill -9 at random moments, fifty times, and damaged files: the same bytes in the end."""

import gzip
import hashlib
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.config.commands import PrepareConfig
from gpt2.data.shards import read_manifest
from gpt2.errors import UserError
from gpt2.prepare import run as run_module
from gpt2.prepare import tokenize_rows

from ..conftest import ROOT

KILLS = 50
SHARD_TOKENS = 15_000


def make_texts(count, seed=0):
    rng = random.Random(seed)
    words = ["time", "person", "Ärger", "漢字", "🦄", "the", "of", "\n", "1984", "<|endoftext|>"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 600))) for _ in range(count)]


def write_parquet(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": pa.array(texts, pa.string())})
    pq.write_table(
        table, path, compression="zstd", row_group_size=100, write_page_checksum=True
    )  # fmt: skip


def options(source, out_dir):
    return {"source": str(source), "out_dir": str(out_dir), "shard_tokens": SHARD_TOKENS}


def run(source, out_dir, max_shards=0):
    config = PrepareConfig(**options(source, out_dir), num_workers=2, max_shards=max_shards)
    return run_module.run(config)


def content(folder):
    """Name -> hash of all that a folder holds."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def processes_of(group):
    """Numbers of the processes of a group that are still alive."""
    listed = subprocess.run(["ps", "-eo", "pgid=,pid=,stat="], capture_output=True, text=True,
                            check=True).stdout  # fmt: skip
    rows = [line.split() for line in listed.splitlines()]
    return [pid for pgid, pid, state in rows if int(pgid) == group and not state.startswith("Z")]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.fault(25, "SIGKILL 50 times")
def test_fifty_kills_do_not_change_a_byte(tmp_path):
    """Real processes, which the system ends while they read, encode, write, rename or start."""
    source, out_dir = tmp_path / "source", tmp_path / "out"
    for number in range(4):
        write_parquet(source / f"{number}.parquet", [None, "", *make_texts(1000, seed=number)])
    run(source, tmp_path / "undisturbed")
    expected = content(tmp_path / "undisturbed")
    words = [f"--{name}={value}" for name, value in options(source, out_dir).items()]
    command = [sys.executable, "-m", "gpt2", "prepare", "--num_workers=2", *words]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    rng, seen, leftovers = random.Random(1337), set(), 0

    def shards():
        return len(list(out_dir.glob("*.bin")))

    for _ in range(KILLS):
        before = shards()
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **silent)
        # Half of them at any moment, also while Python starts; the others after some progress.
        deadline = time.monotonic() + rng.choice([60, rng.uniform(0, 0.8)])
        wanted = before + rng.choice([1, 2])
        while time.monotonic() < deadline and shards() < wanted:
            time.sleep(0.0005)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(timeout=10) == -signal.SIGKILL, "it was done before it was killed"
        assert processes_of(process.pid) == []
        seen.add(shards())
        leftovers += bool(list(out_dir.glob("*.tmp")))
    print(f"{sorted(seen)} of {len(expected) - 1} shards after the kills, {leftovers} half files")
    assert len(seen) > 5
    assert max(seen) < len(expected) - 1
    assert run(source, out_dir) == 0
    assert content(out_dir) == expected


# ---- damaged files: what is finished stays, and the next run goes on with a whole copy


@pytest.fixture
def half_done(tmp_path, monkeypatch):
    """A function (damage) -> (source, out_dir, bytes of the whole second file, its path)."""
    monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", 10)

    def make(damage):
        source = tmp_path / "source"
        for number in range(3):
            write_parquet(source / f"{number}.parquet", make_texts(300, seed=number))
        victim = source / "1.parquet"
        whole = victim.read_bytes()
        run(source, tmp_path / "undisturbed")
        victim.write_bytes(damage(whole))
        with pytest.raises(UserError, match=r"1\.parquet: damaged .*run the same command again"):
            run(source, tmp_path / "out")
        return source, tmp_path / "out", whole, victim

    return make


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    """A byte of the last column chunk."""
    place = len(data) * 3 // 4
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.fault(25, "cut and flipped parquet")
def test_a_damaged_file_is_replaced_by_a_whole_copy(tmp_path, half_done, damage):
    source, out_dir, whole, victim = half_done(damage)
    manifest = read_manifest(out_dir)
    assert len(manifest["shards"]) >= 5
    assert not manifest["complete"]
    times = {p.name: p.stat().st_mtime_ns for p in out_dir.glob("*.bin")}
    victim.write_bytes(whole)
    assert run(source, out_dir) == 0
    assert content(out_dir) == content(tmp_path / "undisturbed")
    places = ("part", "row", "used")  # a shard that ends within row 0 holds text of the file
    earlier = [
        s["name"] for s in manifest["shards"] if tuple(s["next"][p] for p in places) <= (1, 0, 0)
    ]
    assert len(earlier) >= 5
    assert all((out_dir / name).stat().st_mtime_ns == times[name] for name in earlier)


def test_a_damaged_file_may_be_left_out(tmp_path, half_done):
    source, out_dir, _, victim = half_done(cut)
    victim.unlink()
    assert run(source, out_dir) == 0
    run(source, tmp_path / "without")
    assert content(out_dir) == content(tmp_path / "without")


def test_files_that_shards_were_made_of_must_stay(half_done):
    source, out_dir, whole, victim = half_done(cut)
    victim.write_bytes(whole)
    before = content(out_dir)
    write_parquet(source / "0.parquet", make_texts(301))
    with pytest.raises(UserError, match=r"another 0\.parquet .*use another --out_dir="):
        run(source, out_dir)
    write_parquet(source / "00.parquet", make_texts(5))
    with pytest.raises(UserError, match=r"another 0\.parquet .*use another --out_dir="):
        run(source, out_dir)
    assert content(out_dir) == before


def test_a_file_of_which_rows_are_used_must_stay(tmp_path):
    for number in range(2):
        write_parquet(tmp_path / "source" / f"{number}.parquet", make_texts(300, seed=number))
    run(tmp_path / "source", tmp_path / "out", max_shards=25)
    following = read_manifest(tmp_path / "out")["shards"][-1]["next"]
    assert following["part"] == 1
    assert following["row"] > 0
    write_parquet(tmp_path / "source" / "1.parquet", make_texts(301))
    with pytest.raises(UserError, match=r"another 1\.parquet .*use another --out_dir="):
        run(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("ending", ["gz", "xz"])
def test_a_truncated_archive_is_replaced_by_a_whole_one(tmp_path, monkeypatch, ending):
    """Its shards are made again, since damage is noticed late; those before it stay."""
    monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", 10)
    lines = [json.dumps({"text": text}) for text in make_texts(900)]
    source = tmp_path / "source"
    source.mkdir()
    write_parquet(source / "a.parquet", make_texts(300, seed=1))
    compress = {"gz": gzip.compress, "xz": lzma.compress}[ending]
    whole = compress("\n".join(lines).encode())
    victim = source / f"b.jsonl.{ending}"
    victim.write_bytes(whole)
    run(source, tmp_path / "undisturbed")
    victim.write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(UserError, match=r"damaged .* it goes on from the shards made before this"):
        run(source, tmp_path / "out")
    first = tmp_path / "out" / read_manifest(tmp_path / "out")["shards"][0]["name"]
    time = first.stat().st_mtime_ns
    victim.write_bytes(whole)
    assert run(source, tmp_path / "out") == 0
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert first.stat().st_mtime_ns == time


def test_shards_that_are_made_again_do_not_stay(tmp_path):
    write_parquet(tmp_path / "source" / "a.parquet", make_texts(600))
    run(tmp_path / "source", tmp_path / "out", max_shards=8)
    (tmp_path / "out" / read_manifest(tmp_path / "out")["shards"][1]["name"]).unlink()
    run(tmp_path / "source", tmp_path / "out", max_shards=3)
    names = [shard["name"] for shard in read_manifest(tmp_path / "out")["shards"]]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.bin")) == sorted(names)
    assert len(names) == 3


def test_a_text_column_of_another_type_is_named(tmp_path):
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"text": [[1], [2]]}), tmp_path / "source" / "a.parquet")
    with pytest.raises(UserError, match=r"column `text` is of type list.*; it must hold strings"):
        run(tmp_path / "source", tmp_path / "out")
