"""Many machines: shares of the files, and joining what the workers made."""

import gzip
import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from gpt2.commands.inspect_shards import verify
from gpt2.data.shards import find_shards, read_manifest
from gpt2.errors import UserError
from gpt2.prepare.multi_machine import Worker, begun_by_others, merge
from gpt2.prepare.sources import Part, Source

from ..conftest import TINY, run_python
from .test_run import content, ids, make_texts, run, tokens, write_jsonl

COUNTS = (200, 3, 150, 40, 0, 260, 90)  # documents of the files


def texts_of_files():
    return [make_texts(count, seed=number) for number, count in enumerate(COUNTS)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number, texts in enumerate(texts_of_files()):
        write_jsonl(folder / f"{number}.jsonl", texts)
    return folder


def documents(stream: list[int]) -> list[tuple[int, ...]]:
    """The documents of a stream of tokens that begins with one."""
    assert stream[0] == 50256
    text = ",".join(map(str, stream)).split("50256")
    return sorted(tuple(map(int, filter(None, piece.split(",")))) for piece in text[1:])


@pytest.fixture(scope="module")
def workers(corpus, tmp_path_factory) -> Path:
    """The finished folders of three workers, to be copied."""
    out_dir = tmp_path_factory.mktemp("workers")
    for number in (1, 2, 3):
        assert run(corpus, out_dir, shard_tokens=1500, worker=f"{number}/3") == 0
    return out_dir


@pytest.fixture
def copy(workers, tmp_path) -> Path:
    return Path(shutil.copytree(workers, tmp_path / "out"))


# ---- shares


def source_of(sizes) -> Source:
    return Source("x", "", tuple(Part(f"{i:03d}", size, text="x") for i, size in enumerate(sizes)))


@pytest.mark.parametrize("sizes", [[5] * 14, [1, 1, 1, 900, 1], [900, 1, 1], [0, 0, 0], range(40)])
def test_shares_cover_all_files_once_and_in_order(sizes):
    source = source_of(sizes)
    for count in range(1, len(source.parts) + 1):
        cuts = Worker(1, count).cuts([part.size_bytes for part in source.parts])
        shares = [Worker(n, count).share(source, cuts).parts for n in range(1, count + 1)]
        assert all(shares)
        assert sum(shares, ()) == source.parts


def test_shares_have_about_as_many_bytes():
    sizes = [(7 * i) % 23 + 10 for i in range(200)]
    for begin, end in pairwise(Worker(1, 8).cuts(sizes)):
        assert abs(sum(sizes[begin:end]) - sum(sizes) / 8) <= max(sizes)
    assert Worker(2, 2).cuts([10, 85_000, 85_000]) == [0, 2, 3]


def test_fewer_files_than_workers(corpus, tmp_path):
    with pytest.raises(UserError, match=r"only 7 files.*use 7 workers or fewer"):
        run(corpus, tmp_path, worker="1/8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["0/4", "5/4", "x", "3", "1/0", "-1/4", "1/4/2", "", "1.5/4", "٣/٤"]
)
def test_worker_that_cannot_be(text):
    with pytest.raises(UserError, match=r"^--worker=.*(write it as 3/16|workers count from 1)"):
        Worker.parse(text)


def test_worker_that_can_be():
    assert Worker.parse("3/16") == Worker(3, 16)
    assert Worker.parse("3/16").folder(Path("a")) == Path("a/worker-03-of-16")


# ---- what the workers make


def test_only_the_first_worker_validates(workers):
    made = [read_manifest(Worker(n, 3).folder(workers)) for n in (1, 2, 3)]
    assert [[s["split"] for s in m["shards"]].count("val") for m in made] == [1, 0, 0]
    assert [m["worker"] for m in made] == ["1/3", "2/3", "3/3"]
    assert all(m["complete"] for m in made)
    assert made[1]["shards"][0]["name"].endswith("_train_000001.bin")


def test_merged_is_what_one_machine_writes(corpus, workers, copy, tmp_path, capsys):
    alone = tmp_path / "alone"
    run(corpus, alone, shard_tokens=1500)
    before = {p.name: p.stat().st_ino for p in copy.rglob("*.bin")}
    assert merge(copy) == 0
    assert {p.stat().st_ino for p in copy.glob("*.bin")} >= set(before.values()), "copied"
    assert not list(copy.glob("worker-*/*.bin"))
    assert tokens(copy, "val") == tokens(alone, "val")
    assert tokens(copy, "train") == tokens(alone, "train")  # cut elsewhere, in the same order
    every = tokens(copy, "val") + tokens(copy, "train")
    expected = [text for texts in texts_of_files() for text in texts]
    assert documents(every) == documents(ids(expected))
    names = sorted(p.name for p in copy.glob("*_train_*.bin"))
    assert [int(name[-10:-4]) for name in names] == list(range(1, len(names) + 1))
    one, many = read_manifest(alone), read_manifest(copy)
    differ = {"shards", "workers"}
    assert {k: v for k, v in one.items() if k not in differ} == {
        k: v for k, v in many.items() if k not in differ
    }
    assert many["workers"] == 3
    assert not any(shard["next"] for shard in many["shards"])  # places in a worker's own files
    capsys.readouterr()
    assert verify(copy) == 0


@pytest.mark.parametrize("shards_each", [0.5, 1.5])
def test_small_shares(tmp_path, shards_each):
    """Less than two shards each: every 20th document of the first worker is for validation."""
    texts = [make_texts(50, seed=number) for number in range(3)]
    for number, part in enumerate(texts):
        write_jsonl(tmp_path / "c" / f"{number}.jsonl", part)
    size = round(len(ids(texts[1])) / shards_each)
    for number in (3, 1, 2):  # in any order
        run(tmp_path / "c", tmp_path / "out", worker=f"{number}/3", shard_tokens=size)
    merge(tmp_path / "out")
    assert tokens(tmp_path / "out", "val") == ids(texts[0][19::20])
    rest = [t for i, t in enumerate(texts[0]) if i % 20 != 19] + texts[1] + texts[2]
    assert tokens(tmp_path / "out", "train") == ids(rest)


def test_worker_whose_files_are_empty(tmp_path, capsys):
    write_jsonl(tmp_path / "c" / "a.jsonl", make_texts(50))
    write_jsonl(tmp_path / "c" / "b.jsonl", [""] * 9)
    for number in (1, 2):
        assert run(tmp_path / "c", tmp_path / "out", worker=f"{number}/2") == 0
    assert "0 tokens, 0 shards" in capsys.readouterr().out
    merge(tmp_path / "out")
    assert read_manifest(tmp_path / "out")["skipped_rows"] == 9
    assert verify(tmp_path / "out") == 0


def test_worker_goes_on_where_it_stopped(corpus, workers, tmp_path):
    for limit in (2, 4, 0):
        run(corpus, tmp_path, shard_tokens=1500, worker="2/3", max_shards=limit)
    folder = Worker(2, 3).folder(tmp_path)
    assert content(folder) == content(Worker(2, 3).folder(workers))


# ---- after joining


def test_prepare_after_joining_has_nothing_to_do(corpus, copy, capsys):
    merge(copy)
    before = content_of_files(copy)
    for worker in ("1/1", "1/3", "3/3"):
        capsys.readouterr()
        assert run(corpus, copy, shard_tokens=1500, worker=worker) == 0
        assert "already complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="not made by 4 workers"):
        run(corpus, copy, shard_tokens=1500, worker="2/4")
    with pytest.raises(UserError, match="shards made with shard_tokens=1500"):
        run(corpus, copy, shard_tokens=1600, worker="2/3")
    assert content_of_files(copy) == before


def content_of_files(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_merging_twice_changes_nothing(copy, capsys):
    merge(copy)
    before = content_of_files(copy)
    assert merge(copy) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert content_of_files(copy) == before


def test_damaged_shard_after_joining_is_made_again(corpus, copy, capsys):
    merge(copy)
    whole = content_of_files(copy)
    entry = next(s for s in read_manifest(copy)["shards"] if s["worker"] == "2/3")
    for damage in (lambda path: os.truncate(path, 2000), lambda path: path.unlink()):
        damage(copy / entry["name"])
        capsys.readouterr()
        assert verify(copy) == 1
        problem, last = capsys.readouterr().out.splitlines()
        assert problem.endswith(
            "manifest.json, then run `gpt2 prepare --worker=2/3` and `gpt2 shards merge` again"
        )
        assert last == f"1 problem in {copy}"
    with pytest.raises(UserError, match=r"missing or damaged: delete it and manifest\.json"):
        run(corpus, copy, shard_tokens=1500)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"is missing; run `gpt2 prepare --worker=2/3` again"):
        merge(copy)
    run(corpus, copy, shard_tokens=1500, worker="2/3")
    merge(copy)
    assert content_of_files(copy) == whole


def test_training_on_joined_shards(copy, tmp_path):
    merge(copy)
    out = tmp_path / "run"
    run_python("train_gpt2.py", f"--data_dir={copy}", f"--out_dir={out}", *TINY, "--max_steps=2")
    assert (out / "out_ckpt.pt").exists()


# ---- what cannot be joined


def test_missing_and_unfinished_workers(corpus, copy):
    folder = Worker(2, 3).folder(copy)
    before = content_of_files(copy)
    shutil.move(folder, copy / "aside")
    with pytest.raises(
        UserError, match=r"worker-2-of-3 is missing; run `gpt2 prepare --worker=2/3"
    ):
        merge(copy)
    run(corpus, copy, shard_tokens=1500, worker="2/3", max_shards=2)
    with pytest.raises(UserError, match=r"worker-2-of-3 is unfinished; run"):
        merge(copy)
    shutil.rmtree(folder)
    shutil.move(copy / "aside", folder)
    assert content_of_files(copy) == before
    assert merge(copy) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source", "elsewhere"), ("revision", "other"), ("shard_tokens", 1600), ("prefix", "x"),
        ("tokenizer", {"name": "other"}), ("files", {"0.jsonl": 3}), ("format", 2),
    ],
)  # fmt: skip
def test_workers_of_different_runs(copy, key, value):
    path = Worker(3, 3).folder(copy) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {key: value}))
    before = content_of_files(copy)
    with pytest.raises(UserError, match=f"worker-3-of-3 was made with another {key} than 1/3"):
        merge(copy)
    assert content_of_files(copy) == before


def test_folders_of_other_numbers_of_workers(corpus, copy):
    with pytest.raises(UserError, match=r"holds folders of 3 workers; go on with --worker=1/3"):
        run(corpus, copy, shard_tokens=1500, worker="1/4")
    with pytest.raises(UserError, match=r"holds folders of 3 workers.*gpt2 shards merge"):
        run(corpus, copy, shard_tokens=1500)
    shutil.copytree(Worker(1, 3).folder(copy), Worker(1, 4).folder(copy))
    with pytest.raises(UserError, match="folders of 3 and of 4 workers"):
        merge(copy)


def test_nothing_to_join(corpus, tmp_path, capsys):
    with pytest.raises(UserError, match="no folders of workers to join"):
        merge(tmp_path)
    run(corpus, tmp_path / "one", shard_tokens=1500, max_shards=3)
    with pytest.raises(UserError, match="is unfinished: run `gpt2 prepare` again, without"):
        merge(tmp_path / "one")
    with pytest.raises(UserError, match="not made by 3 workers"):
        run(corpus, tmp_path / "one", shard_tokens=1500, worker="1/3")
    run(corpus, tmp_path / "one", shard_tokens=1500)
    assert merge(tmp_path / "one") == 0
    assert "one set already" in capsys.readouterr().out


@pytest.mark.parametrize("number", [1, 999999])
def test_somebody_elses_shard_is_in_the_way(copy, number):
    prefix = read_manifest(Worker(1, 3).folder(copy))["prefix"]
    other = copy / f"{prefix}_train_{number:06d}.bin"
    other.write_bytes(b"somebody's")
    before = content_of_files(copy)
    with pytest.raises(UserError, match=r"belongs to no worker; move it away"):
        merge(copy)
    assert content_of_files(copy) == before


def change_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest))


def second_val(manifest: dict) -> None:
    """Makes the second shard one for validation, which would replace the first."""
    first, second = manifest["shards"][:2]
    second |= {"split": "val", "name": first["name"].replace("000000", "000009")}


@pytest.mark.fault(13, "a prefix, names and numbers in the manifest of a worker")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(prefix="../../x"), "is not a manifest of shards"),
        (lambda m: m.update(prefix="/tmp/x"), "is not a manifest of shards"),
        (lambda m: m.update(prefix="C:x"), "is not a manifest of shards"),
        (lambda m: m.update(prefix="a_b"), "is not a manifest of shards"),
        (lambda m: m.update(prefix=""), "is not a manifest of shards"),
        (lambda m: m.update(prefix=3), "is not a manifest of shards"),
        (lambda m: m.pop("prefix"), "is not the manifest of a worker"),
        (lambda m: m.update(files=["a"]), "is not a manifest of shards"),
        (lambda m: m.update(cuts=[0, "1", 2, 7]), "is not a manifest of shards"),
        (lambda m: m.update(cuts=[0, 7]), "is not the manifest of a worker"),
        (lambda m: m.update(tokens="many"), "is not a manifest of shards"),
        (lambda m: m["shards"].append(m["shards"][0]), "is not a manifest of shards"),
        (second_val, "a second shard for validation"),
    ],
)
def test_manifest_of_a_worker_that_leads_elsewhere(copy, change, said):
    first = Worker(1, 3).folder(copy)
    if change is second_val:
        shard = json.loads((first / "manifest.json").read_text())["shards"][1]["name"]
        (first / shard).rename(first / shard.replace("train_000001", "val_000009"))
    change_manifest(first, change)
    victim = copy.parent / "x_train_000001.bin"
    victim.write_text("mine")
    before = content_of_files(copy.parent)
    with pytest.raises(UserError, match=said):
        merge(copy)
    assert content_of_files(copy.parent) == before


def test_a_shard_with_equal_bytes_is_no_obstacle(copy):
    """A worker that was run again makes shards that were joined before."""
    whole = Path(shutil.copytree(copy, copy.parent / "whole"))
    merge(whole)
    name = next(whole.glob("*_train_000001.bin")).name
    shutil.copy(whole / name, copy)
    merge(copy)
    assert content_of_files(copy) == content_of_files(whole)


def test_damaged_shard_is_not_joined(copy):
    before = sorted(content_of_files(copy))
    shard = next(Worker(2, 3).folder(copy).glob("*_train_*.bin"))
    os.truncate(shard, shard.stat().st_size - 2)
    with pytest.raises(UserError, match="truncated download"):
        merge(copy)
    assert sorted(content_of_files(copy)) == before


# ---- kill -9

KILL = """
import os, sys
from itertools import pairwise
from pathlib import Path
from gpt2.prepare.multi_machine import merge

left = int(sys.argv[2])

def killing(call):
    def wrapped(*arguments):
        global left
        if left == 0:
            os.kill(os.getpid(), 9)
        left -= 1
        return call(*arguments)
    return wrapped

os.replace = killing(os.replace)  # the only call that changes what the folder holds
merge(Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_killed_again_and_again(workers, tmp_path):
    """Each run is killed after two steps, the very first before any; the last one finishes."""
    whole = Path(shutil.copytree(workers, tmp_path / "whole"))
    copy = Path(shutil.copytree(workers, tmp_path / "copy"))
    merge(whole)
    kills = 0
    while not (copy / "manifest.json").exists():
        assert len(list(copy.glob("*.bin"))) == 2 * max(0, kills - 1)
        killed = run_python("-c", KILL, copy, 2 if kills else 0, check=False)
        kills += killed.returncode == -9
    assert killed.returncode == 0
    assert kills == 1 + (len(list(whole.glob("*.bin"))) + 1) // 2
    assert content_of_files(copy) == content_of_files(whole)


def test_a_damaged_file_of_one_worker_is_replaced(corpus, workers, tmp_path):
    """The worker that had finished keeps its shards, and the cuts stay where they were."""
    source = tmp_path / "corpus"
    shutil.copytree(corpus, source)
    victim = sorted(source.iterdir())[-1]
    whole = victim.read_bytes()
    broken = victim.with_name(victim.name + ".gz")
    victim.unlink()
    broken.write_bytes(gzip.compress(whole)[:-20])
    out_dir = tmp_path / "out"
    run(source, out_dir, shard_tokens=1500, worker="1/2")
    with pytest.raises(UserError, match="put a whole copy in its place"):
        run(source, out_dir, shard_tokens=1500, worker="2/2")
    before = content(out_dir / "worker-1-of-2")
    broken.write_bytes(gzip.compress(whole))
    run(source, out_dir, shard_tokens=1500, worker="2/2")
    run(source, out_dir, shard_tokens=1500, worker="1/2")
    assert content(out_dir / "worker-1-of-2") == before
    merge(out_dir)
    run(source, tmp_path / "alone", shard_tokens=1500)
    merged, alone = (
        [*tokens(folder, "val"), *tokens(folder, "train")]
        for folder in (out_dir, tmp_path / "alone")
    )
    assert merged == alone
    assert read_manifest(out_dir)["files"] == read_manifest(tmp_path / "alone")["files"]


def test_workers_take_what_the_first_has_settled(tmp_path):
    """The commit of a branch that moves meanwhile, and the cuts."""
    folder = Worker(1, 2).folder(tmp_path)
    folder.mkdir(parents=True)
    manifest = {"source": "hf:o/n", "revision": "c" * 40, "cuts": [0, 1, 3], "shards": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert begun_by_others(tmp_path, Worker(2, 2), "hf:o/n") == manifest
    assert begun_by_others(tmp_path, Worker(2, 2), "hf:o/other") == {}
    assert begun_by_others(tmp_path, Worker(), "hf:o/n") == {}


def test_missing_shard_after_joining_says_what_to_do(copy, capsys):
    merge(copy)
    name = read_manifest(copy)["shards"][-1]["name"]
    (copy / name).unlink()
    capsys.readouterr()
    assert verify(copy) == 1
    assert f"{name}: missing; delete manifest.json, then run `gpt2 prepare --worker=" in (
        capsys.readouterr().out
    )


def test_training_before_joining_says_so(workers):
    with pytest.raises(UserError, match="join them: gpt2 shards merge"):
        find_shards(workers, "train")
