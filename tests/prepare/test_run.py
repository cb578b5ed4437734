"""`gpt2 prepare`: the same bytes for any number of workers, after any interruption."""

import errno
import gzip
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2 import files
from gpt2.config.commands import PrepareConfig
from gpt2.data.shards import find_shards, read_manifest
from gpt2.errors import UserError
from gpt2.prepare import run as run_module
from gpt2.prepare import shard_job, sources, tokenize_rows
from gpt2.prepare.sources import FINEWEB_FOLDER
from gpt2.tokenizer import gpt2_tokenizer

from ..conftest import run_python
from ..fake_hub import Trouble, fake_hub, parquet_bytes

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
inherited = "torch" in sys.modules  # in a fork
from gpt2.config.commands import PrepareConfig
from gpt2.errors import UserError
from gpt2.huggingface import hub
from gpt2.prepare import run, tokenize_rows

hub.FIRST_WAIT_SECONDS, hub.TRIES, tokenize_rows.BATCH_ROWS = 0.01, 3, 50
if __name__ == "__main__":
    options = dict(word.split("=", 1) for word in sys.argv[1:])
    options = {k: int(v) if v.isdigit() else v for k, v in options.items()}
    try:
        code = run.run(PrepareConfig(**options))
    except UserError as error:
        sys.exit(f"error: {error}")
    assert inherited or "torch" not in sys.modules
    sys.exit(code)
"""


def run(source, out_dir, **options):
    options = {"num_workers": 1} | options
    return run_module.run(PrepareConfig(source=str(source), out_dir=str(out_dir), **options))


def command(tmp_path, **options):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return [sys.executable, str(script), *(f"{key}={value}" for key, value in options.items())]


def start(tmp_path, environment=None, **options):
    return subprocess.Popen(
        command(tmp_path, **options),
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def make_texts(count, seed=0, longest=60):
    rng = random.Random(seed)
    words = ["time", "person", "Ärger", "漢字", "🦄", "the", "of", "\n", "1984", "<|endoftext|>"]
    return [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(count)]


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def ids(texts):
    """The stream of tokens, computed plainly."""
    return [token for text in texts for token in (50256, *gpt2_tokenizer().encode(text))]


def tokens(out_dir, split):
    """All tokens of a split, read without the package."""
    found = []
    for path in sorted(Path(out_dir).glob(f"*_{split}_*.bin")):
        data = path.read_bytes()
        magic, version, count = struct.unpack_from("<3i", data)
        assert (magic, version, len(data)) == (20240520, 1, 1024 + 2 * count)
        found += struct.unpack_from(f"<{count}H", data, 1024)
    return found


def content(out_dir):
    """Name -> hash of all that a folder holds."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(out_dir).iterdir()}


# ---- what comes out


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_tokens(tmp_path, ending):
    texts = make_texts(19)
    data = write_jsonl(tmp_path / "x.jsonl", texts).read_bytes()
    path = tmp_path / f"x.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif ending.endswith("zst"):
        path.write_bytes(pa.compress(data, "zstd", asbytes=True))
    elif ending != "jsonl":
        path.write_bytes(__import__({"gz": "gzip", "xz": "lzma"}[ending[-2:]]).compress(data))
    assert run(path, tmp_path / "out") == 0
    assert tokens(tmp_path / "out", "train") + tokens(tmp_path / "out", "val") == ids(texts)
    assert sorted(content(tmp_path / "out")) == [
        "manifest.json", "x_train_000001.bin", "x_val_000000.bin",
    ]  # fmt: skip


def test_folder_of_txt_is_one_document_a_file(tmp_path):
    texts = make_texts(12)
    for number, text in enumerate(texts):
        (tmp_path / "c" / f"{number:02d}").mkdir(parents=True)
        (tmp_path / "c" / f"{number:02d}" / "x.txt").write_bytes(text.encode())
    run(tmp_path / "c", tmp_path / "out")
    assert tokens(tmp_path / "out", "train") + tokens(tmp_path / "out", "val") == ids(texts)
    assert read_manifest(tmp_path / "out")["documents"] == 12


@pytest.mark.parametrize("count", [1, 2, 19])
def test_few_documents_are_cut_as_tokens(tmp_path, count):
    texts = ["word " * 300 + str(i) for i in range(count)]
    run(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path / "out")
    train, val = tokens(tmp_path / "out", "train"), tokens(tmp_path / "out", "val")
    assert train + val == ids(texts)
    assert len(val) == len(ids(texts)) // 20


@pytest.mark.parametrize("count", [20, 39, 500])
def test_every_20th_document_validates_a_small_source(tmp_path, count):
    texts = make_texts(count)
    run(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path / "out")
    assert tokens(tmp_path / "out", "val") == ids(texts[19::20])
    assert tokens(tmp_path / "out", "train") == ids(
        text for number, text in enumerate(texts) if number % 20 != 19
    )


def test_least_source(tmp_path, capsys):
    text = "a b " * 31
    assert len(ids([text])) == 64
    run(write_jsonl(tmp_path / "x.jsonl", [text]), tmp_path / "out")
    assert len(tokens(tmp_path / "out", "val")) == 3
    for texts in ([text[:-4]], ["", ""]):
        with pytest.raises(UserError, match=r"only \d+ tokens .*give at least 64"):
            run(write_jsonl(tmp_path / "y.jsonl", texts), tmp_path / str(len(texts)))


def test_both_splits_can_be_opened(tmp_path):
    run(write_jsonl(tmp_path / "x.jsonl", make_texts(100)), tmp_path / "out")
    assert [len(find_shards(tmp_path / "out", split)) for split in ("train", "val")] == [1, 1]


@pytest.mark.parametrize("total", [1999, 2000, 2001, 2999, 3000, 3500])
def test_two_shards_make_a_large_source(tmp_path, total):
    text = "a b c d e f g h i j"  # 10 tokens and end of text
    texts = [text] * (total // 11) + ["a"] + [" a" * (total % 11 - 3)] * (total % 11 > 3)
    texts[-1] += " a" * (total - len(ids(texts)))
    stream = ids(texts)
    assert len(stream) == total
    run(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path / "out", shard_tokens=1000)
    sizes = [s["tokens"] for s in read_manifest(tmp_path / "out")["shards"]]
    if total < 2000:
        assert sizes[1] == 1000  # train does not fit in one shard
        assert tokens(tmp_path / "out", "val") == ids(texts[19::20])
    else:
        assert sizes == [1000] * (total // 1000) + [total % 1000] * (total % 1000 > 0)
        assert tokens(tmp_path / "out", "val") == stream[:1000]
        assert tokens(tmp_path / "out", "train") == stream[1000:]


def test_manifest_describes_the_shards(tmp_path, capsys):
    texts = make_texts(300)
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    run(source, tmp_path / "out", shard_tokens=2000)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["complete"] is True
    assert manifest["documents"] == 300
    assert manifest["tokens"] == len(ids(texts))
    assert manifest["files"] == {"x.jsonl": source.stat().st_size}
    assert manifest["tokenizer"]["sha256"] == gpt2_tokenizer().sha256
    for shard in manifest["shards"]:
        path = tmp_path / "out" / shard["name"]
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert shard["split"] == ("val" if path.name == "x_val_000000.bin" else "train")
    assert str(tmp_path) not in json.dumps({**manifest, "source": ""})
    said = capsys.readouterr().out
    assert f"300 documents, {manifest['tokens']:,} tokens" in said
    assert "partial by design" in said
    assert f"gpt2 train --data_dir={tmp_path / 'out'} --out_dir=out/out --size=" in said


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(write_jsonl(tmp_path / "my corpus" / "x.jsonl", make_texts(30)).parent, "")
    assert (tmp_path / "data" / "my-corpus" / "my-corpus_val_000000.bin").is_file()


@pytest.mark.fault(25, "null, no text, wrong types")
def test_bad_rows_are_counted_and_do_not_move_anything(tmp_path, capsys):
    texts = make_texts(400)
    rows = [json.dumps({"text": t}) for t in texts]
    bad = ['{"text": null}', "{broken", '{"text": ""}', "[]"]
    mixed = [line for i, row in enumerate(rows) for line in (*[bad[i % 4]] * (i % 3), row)]
    mixed += bad
    (tmp_path / "x.jsonl").write_text("\n".join(mixed), encoding="utf-8")
    count = len(mixed) - len(rows)
    for name, options in {"small": {}, "large": {"shard_tokens": 1000}}.items():
        run(tmp_path / "x.jsonl", tmp_path / name, **options)
        assert read_manifest(tmp_path / name)["skipped_rows"] == count
        assert f"{count} rows without a text were skipped" in capsys.readouterr().out
    assert tokens(tmp_path / "large", "val") + tokens(tmp_path / "large", "train") == ids(texts)
    assert tokens(tmp_path / "small", "val") == ids(texts[19::20])


def test_broken_lines_and_other_keys_have_counts_of_their_own(tmp_path, capsys):
    texts = make_texts(400)
    rows = [json.dumps({"text": t}) for t in texts]
    bad = ['{"text": null}', '{"text": "cut of', '{"content": "x"}', "[]", '{"text": 3}', "", "{"]
    rows[200:200] = bad
    (tmp_path / "x.jsonl").write_text("\n".join(rows), encoding="utf-8")
    counts = {"skipped_rows": 6, "not_json_rows": 2, "no_text_rows": 3}
    (tmp_path / "list.json").write_text('[{"text": "a fine day"}, {"content": "x"}]')
    for name, options in {"small": {}, "large": {"shard_tokens": 1000}}.items():
        run(tmp_path / "x.jsonl", tmp_path / name, **options)
        assert counts.items() <= read_manifest(tmp_path / name).items()
        said = capsys.readouterr()
        assert (
            "6 rows without a text were skipped (2 of them not JSON, "
            "3 of them no `text` that is a string)"
        ) in said.out
        assert "x.jsonl, line 202: not JSON; such rows are left out" in said.err
        assert "x.jsonl, line 203: no `text` that is a string; such rows are left out" in said.err
        assert said.err.count("such rows") == 2
    for limit in (2, 5, 8, 11, 0):
        run(tmp_path / "x.jsonl", tmp_path / "resumed", shard_tokens=1000, max_shards=limit)
    assert content(tmp_path / "resumed") == content(tmp_path / "large")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"\(1 rows without a text were skipped \(1 of them no "):
        run(tmp_path / "list.json", tmp_path / "list")
    assert "list.json, value 2: no `text` that is a string" in capsys.readouterr().err


def test_a_source_of_equal_size_and_other_content_is_noticed(tmp_path, capsys):
    text = "A quiet harbour and a long day. " * 40_000  # more than the 16 samples
    for number, long in enumerate((text, text[:3000])):
        source, out_dir = tmp_path / f"s{number}", tmp_path / f"out{number}"
        source.mkdir()
        (source / "a.txt").write_text(long)
        assert run(source, out_dir) == 0
        before = content(out_dir)
        os.utime(source / "a.txt", (0, 0))  # a copy has another date
        assert run(source, out_dir) == 0
        (source / "a.txt").write_text(long.replace("quiet", "silly"))
        with pytest.raises(
            UserError, match=r"another a\.txt: its size is the same, its content is"
        ):
            run(source, out_dir)
        manifest = read_manifest(out_dir)
        del manifest["files_sample_sha256"]  # as earlier versions wrote it
        (out_dir / "manifest.json").write_text(json.dumps(manifest))
        assert run(source, out_dir) == 0
        assert {**content(out_dir), "manifest.json": ""} == {**before, "manifest.json": ""}
    assert "already complete" in capsys.readouterr().out


def test_a_file_that_no_shard_has_text_of_may_change(tmp_path):
    for name in "abc":
        (tmp_path / f"s/{name}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / f"s/{name}.txt").write_text(f"A quiet harbour {name}. " * 500)
    run(tmp_path / "s", tmp_path / "out", shard_tokens=1000, max_shards=2)
    (tmp_path / "s/c.txt").write_text("A silly harbour c. " * 500)
    run(tmp_path / "s", tmp_path / "out", shard_tokens=1000)
    run(tmp_path / "s", tmp_path / "whole", shard_tokens=1000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    (tmp_path / "s/c.txt").write_text("A quiet harbour c. " * 500)
    with pytest.raises(UserError, match=r"another c\.txt"):
        run(tmp_path / "s", tmp_path / "out", shard_tokens=1000)


# ---- the same bytes, whatever happens


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three files, one empty, with bad rows among the documents and one long document."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(600)
    write_jsonl(folder / "a.jsonl", [*texts[:200], "", "", *texts[200:300]])
    write_jsonl(folder / "b.jsonl", [])
    pq.write_table(
        pa.table({"text": [None, *texts[300:], "long " * 5000, None]}), folder / "c.parquet"
    )
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    run(corpus, out_dir, shard_tokens=1500)
    assert len(content(out_dir)) > 10
    return out_dir


@pytest.mark.parametrize("small_batches", [False, True])
def test_workers_do_not_change_a_byte(tmp_path, corpus, undisturbed, monkeypatch, small_batches):
    if small_batches:
        monkeypatch.setattr(tokenize_rows, "BATCH_CHARS", 700)
    run(corpus, tmp_path / "out", shard_tokens=1500, num_workers=2)
    assert content(tmp_path / "out") == content(undisturbed)


def test_a_worker_names_the_next_command_for_pasting(tmp_path, capsys):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("A quiet harbour. " * 50)
    assert run(tmp_path, tmp_path / "my data", worker="1/2") == 0
    said = capsys.readouterr().out.splitlines()[-1].partition(": ")[2]
    assert shlex.split(said) == ["gpt2", "shards", "merge", str(tmp_path / "my data")]


@pytest.mark.parametrize("limits", [[2, 3, 4], [5, 9], [2, 7, 8, 1000]])
@pytest.mark.parametrize("batch_rows", [1, 7, 10_000])
def test_max_shards_then_more(tmp_path, corpus, undisturbed, monkeypatch, limits, batch_rows):
    monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", batch_rows)
    for limit in limits:
        assert run(corpus, tmp_path / "out", shard_tokens=1500, max_shards=limit) == 0
        manifest = read_manifest(tmp_path / "out")
        assert len(manifest["shards"]) == min(limit, len(list(undisturbed.glob("*.bin"))))
        assert len(list((tmp_path / "out").glob("*.bin"))) == len(manifest["shards"])
        assert manifest["complete"] == (limit == 1000)
    assert run(corpus, tmp_path / "out", shard_tokens=1500) == 0
    assert content(tmp_path / "out") == content(undisturbed)


def test_max_shards_reached_says_so(tmp_path, corpus, capsys):
    for _ in range(2):
        run(corpus, tmp_path / "out", shard_tokens=1500, max_shards=3)
    said = capsys.readouterr().out
    assert "max_shards are finished" in said
    assert said.count("stopped at max_shards=3") == 2
    assert "partial by design" not in said


@pytest.mark.parametrize("limits", [[1, 3001, 4500], [10_000]])
def test_max_tokens_are_rounded_up_to_shards(tmp_path, corpus, undisturbed, capsys, limits):
    for limit in limits:
        run(corpus, tmp_path / "out", shard_tokens=1500, max_tokens=limit)
        manifest = read_manifest(tmp_path / "out")
        assert len(manifest["shards"]) == max(2, -(-limit // 1500))
        assert manifest["complete"] is False
        assert {s["tokens"] for s in manifest["shards"]} == {1500}
        said = capsys.readouterr().out
        assert f"stopped at max_tokens={limit:,}, rounded up to {len(manifest['shards'])}" in said
    run(corpus, tmp_path / "out", shard_tokens=1500, max_tokens=limit)
    assert "max_tokens are finished" in capsys.readouterr().out
    run(corpus, tmp_path / "out", shard_tokens=1500)
    assert content(tmp_path / "out") == content(undisturbed)


def test_the_lower_of_two_limits_counts():
    limits = [(0, 0, 0), (4, 0, 4), (0, 450, 5), (4, 450, 4), (9, 450, 5), (0, 1, 2)]
    for max_shards, max_tokens, expected in limits:
        config = PrepareConfig(shard_tokens=100, max_shards=max_shards, max_tokens=max_tokens)
        assert config.shard_limit == expected


def test_max_shards_of_a_small_source(tmp_path):
    texts = make_texts(100)
    size = len(ids(texts)) * 10 // 19 + 1
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    run(source, tmp_path / "once", shard_tokens=size)
    assert len(list((tmp_path / "once").glob("*.bin"))) == 3 - (
        len(tokens(tmp_path / "once", "train")) <= size
    )
    run(source, tmp_path / "twice", shard_tokens=size, max_shards=2)
    assert len(list((tmp_path / "twice").glob("*.bin"))) == 2
    run(source, tmp_path / "twice", shard_tokens=size)
    assert content(tmp_path / "twice") == content(tmp_path / "once")


def test_max_tokens_of_a_small_source_take_all_of_it(tmp_path, capsys):
    """Its three shards hold fewer tokens than two full ones, to which the limit is rounded up."""
    texts = make_texts(100)
    size = len(ids(texts)) * 10 // 19 - 20
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    run(source, tmp_path / "whole", shard_tokens=size)
    assert len(read_manifest(tmp_path / "whole")["shards"]) == 3
    for limit in (1, 2 * size):
        run(source, tmp_path / f"to_{limit}", shard_tokens=size, max_tokens=limit)
        assert content(tmp_path / f"to_{limit}") == content(tmp_path / "whole")
    run(source, tmp_path / "stopped", shard_tokens=size, max_shards=2)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").iterdir()}
    run(source, tmp_path / "stopped", shard_tokens=size, max_shards=2)  # which is finished
    assert {path: path.stat().st_mtime_ns for path in written} == written
    capsys.readouterr()
    run(source, tmp_path / "stopped", shard_tokens=size, max_tokens=1)
    assert "the source ended before" in capsys.readouterr().out
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


class Killed(BaseException):
    """Stands for the end of the process between two system calls."""


@pytest.mark.parametrize("at", range(1, 12))
def test_end_at_any_rename(tmp_path, corpus, undisturbed, monkeypatch, at):
    """Every file appears by a rename: the state before each of them must be good to go on from."""
    renames = []

    def rename(source, target):
        renames.append(target)
        if len(renames) == at:
            raise Killed
        shutil.move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", rename)
        with pytest.raises(Killed):
            run(corpus, tmp_path / "out", shard_tokens=1500)
    assert list((tmp_path / "out").glob("*.tmp"))
    prefix = read_manifest(undisturbed)["prefix"]
    (tmp_path / "out" / f"{prefix}_train_000999.bin.tmp").write_text("of an older version")
    (tmp_path / "out" / "mine.tmp").write_text("not ours to delete")
    run(corpus, tmp_path / "out", shard_tokens=1500)
    (tmp_path / "out" / "mine.tmp").unlink()
    assert content(tmp_path / "out") == content(undisturbed)


def long_corpus(tmp_path):
    """Enough text for hundreds of shards of 2,000 tokens."""
    return write_jsonl(tmp_path / "x.jsonl", make_texts(5000, longest=80))


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_sigkill_then_again(tmp_path, num_workers):
    options = {"source": long_corpus(tmp_path), "shard_tokens": 2000}
    run(options["source"], tmp_path / "undisturbed", shard_tokens=2000)
    process = start(tmp_path, **options, out_dir=tmp_path / "out", num_workers=num_workers)
    wait_for(tmp_path / "out" / "x_train_000003.bin", process)
    process.kill()
    # ends only when no worker holds the pipes any more
    process.communicate(timeout=30)
    assert read_manifest(tmp_path / "out")["complete"] is False
    kept = tmp_path / "out" / "x_train_000001.bin"
    written = kept.stat().st_mtime_ns
    run(options["source"], tmp_path / "out", shard_tokens=2000)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert kept.stat().st_mtime_ns == written


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_ctrl_c(tmp_path, num_workers):
    source = long_corpus(tmp_path)
    options = {"source": source, "out_dir": tmp_path / "out", "shard_tokens": 2000}
    process = start(tmp_path, **options, num_workers=num_workers)
    wait_for(tmp_path / "out" / "x_train_000003.bin", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    finished = len(read_manifest(tmp_path / "out")["shards"])
    last = out.splitlines()[-1]
    assert last.startswith("interrupted: ")
    assert last.endswith("run the same command to continue")
    assert abs(int(last.split()[1]) - finished) <= 1
    assert err == ""


def test_twice_is_the_same_and_the_second_time_is_quick(tmp_path, corpus, undisturbed, capsys):
    written = {p.name: p.stat().st_mtime_ns for p in undisturbed.iterdir()}
    assert run(corpus, undisturbed, shard_tokens=1500) == 0
    assert "already complete" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in undisturbed.iterdir()} == written


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 1500)])
def test_lost_shard_is_made_again(tmp_path, corpus, undisturbed, capsys, damage):
    shutil.copytree(undisturbed, tmp_path / "out")
    victim = sorted((tmp_path / "out").glob("*_train_*.bin"))[4]
    damage(victim)
    run(corpus, tmp_path / "out", shard_tokens=1500)
    assert f"{victim.name} is missing or damaged" in capsys.readouterr().out
    assert content(tmp_path / "out") == content(undisturbed)


def test_lost_shard_of_a_small_source(tmp_path, corpus):
    run(corpus, tmp_path / "once")
    run(corpus, tmp_path / "twice")
    next((tmp_path / "twice").glob("*_train_*.bin")).unlink()
    run(corpus, tmp_path / "twice")
    assert content(tmp_path / "twice") == content(tmp_path / "once")


# ---- what can go wrong


def test_folder_of_other_shards_is_refused(tmp_path, corpus, undisturbed):
    before = content(undisturbed)
    other = write_jsonl(tmp_path / "x.jsonl", make_texts(30))
    with pytest.raises(UserError, match=r"shards made with source=.*use another --out_dir="):
        run(other, undisturbed, shard_tokens=1500)
    with pytest.raises(
        UserError, match="shards made with shard_tokens=1500, not 1600; use another"
    ):
        run(corpus, undisturbed, shard_tokens=1600)
    changed = tmp_path / "changed"
    shutil.copytree(undisturbed, changed)
    manifest = (changed / "manifest.json").read_text()
    sha256 = gpt2_tokenizer().sha256
    (changed / "manifest.json").write_text(manifest.replace(sha256, "0" * 64))
    with pytest.raises(UserError, match="shards made with tokenizer="):
        run(corpus, changed, shard_tokens=1500)
    assert content(undisturbed) == before


def test_changed_source_is_refused(tmp_path):
    source = tmp_path / "c"
    write_jsonl(source / "a.jsonl", make_texts(30))
    run(source, tmp_path / "out")
    write_jsonl(source / "b.jsonl", make_texts(30))
    with pytest.raises(UserError, match=r"shards made with another b\.jsonl"):
        run(source, tmp_path / "out")


def test_shards_without_a_manifest_are_not_touched(tmp_path, corpus):
    (tmp_path / "edufineweb_train_000001.bin").write_bytes(b"somebody's")
    with pytest.raises(UserError, match=r"holds shards without a manifest\.json"):
        run(corpus, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["edufineweb_train_000001.bin"]


def test_unusable_out_dir(tmp_path, corpus):
    (tmp_path / "file").write_text("x")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--out_dir=.*cannot write there"):
            run(corpus, out_dir)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_read_only_out_dir(tmp_path, corpus):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write|while writing"):
        run(corpus, tmp_path)


def test_full_disk_keeps_finished_shards(tmp_path, corpus, undisturbed, monkeypatch):
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        with pytest.raises(UserError, match=r"disk full while writing .*finished shards are kept"):
            run(corpus, tmp_path / "out", shard_tokens=1500)
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert len(read_manifest(tmp_path / "out")["shards"]) == 3
    run(corpus, tmp_path / "out", shard_tokens=1500)
    assert content(tmp_path / "out") == content(undisturbed)


@pytest.mark.parametrize(("number", "said"), [
    (errno.ENOSPC, "disk full"), (errno.EDQUOT, os.strerror(errno.EDQUOT))
])  # fmt: skip
def test_full_disk_at_the_manifest(number, said, tmp_path, corpus, undisturbed, monkeypatch):
    def full(folder, manifest):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(shard_job, "write_manifest", full)
        with pytest.raises(UserError, match=rf"{said} while writing .*run the same command aga"):
            run(corpus, tmp_path / "out", shard_tokens=1500)
    run(corpus, tmp_path / "out", shard_tokens=1500)
    assert content(tmp_path / "out") == content(undisturbed)


def test_two_at_once(tmp_path):
    options = {"source": long_corpus(tmp_path), "shard_tokens": 2000, "out_dir": tmp_path / "out"}
    process = start(tmp_path, **options, num_workers=1)
    wait_for(tmp_path / "out" / "x_train_000001.bin", process)
    with pytest.raises(
        UserError, match=r"another process \(pid \d+ on .+\) is making shards in .*out; wait for it"
    ):
        run(options["source"], tmp_path / "out", shard_tokens=2000)
    process.kill()
    process.communicate()
    run(options["source"], tmp_path / "out", shard_tokens=2000)
    assert not (tmp_path / "out" / ".lock").exists()


def test_shards_that_appeared_since_the_folder_was_looked_at(tmp_path, corpus):
    options = {"source": str(corpus), "out_dir": str(tmp_path / "out"), "shard_tokens": 1500}
    waiting = shard_job.open_job(PrepareConfig(**options))
    run(max_shards=2, **options)
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match="another process has just made shards"):
        shard_job.started(waiting).__enter__()
    assert content(tmp_path / "out") == before


def test_dry_run_of_local_files(tmp_path, corpus, undisturbed, capsys):
    before = content(undisturbed)
    run(corpus, tmp_path / "out", shard_tokens=1500, dry_run=True)
    said = capsys.readouterr().out
    assert "to read      3 of 3 files" in said
    assert "a dry run: nothing was downloaded or written" in said
    assert not (tmp_path / "out").exists()
    run(corpus, undisturbed, shard_tokens=1500, dry_run=True)
    assert "already complete" in capsys.readouterr().out
    assert content(undisturbed) == before


def test_damaged_file_keeps_finished_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", 50)
    source = tmp_path / "c"
    good = write_jsonl(source / "a.jsonl", make_texts(300))
    (source / "b.jsonl.gz").write_bytes(gzip.compress(good.read_bytes())[:-50])
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: damaged or unreadable after row \d+ "):
        run(source, tmp_path / "out", shard_tokens=1500)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["complete"] is False
    assert len(manifest["shards"]) >= 4
    assert find_shards(tmp_path / "out", "train")


def test_damaged_file_with_workers_is_one_line(tmp_path):
    write_jsonl(tmp_path / "c" / "a.jsonl", make_texts(300))
    (tmp_path / "c" / "b.parquet").write_bytes(b"PAR1 no such file PAR1")
    options = {"source": tmp_path / "c", "out_dir": tmp_path / "out", "num_workers": 2}
    done = run_python(*command(tmp_path, **options)[1:], check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "b.parquet: damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- FineWeb-Edu


@pytest.fixture
def hub_files():
    texts = make_texts(360, seed=5)
    files = {
        f"{FINEWEB_FOLDER}/{number:03d}_00000.parquet": parquet_bytes(texts[number::3])
        for number in range(3)
    }
    return files, [text for number in range(3) for text in texts[number::3]]


def run_fineweb(tmp_path, hub, real=False, **options):
    options = {
        "source": "fineweb-edu", "out_dir": "", "num_workers": 1, "shard_tokens": 3000,
    } | options  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)} | hub.environment(tmp_path / "h")
    words = command(tmp_path, **options)[1:]
    return run_python(*words, env=env, cwd=tmp_path, timeout=120, check=False, real=real)


def test_fineweb_edu(tmp_path, hub_files):
    files, texts = hub_files
    stream = ids(texts)
    out_dir = tmp_path / "fineweb"
    with fake_hub(files) as hub:
        first = run_fineweb(tmp_path, hub, max_shards=2, real=True)  # and without torch
        assert (first.returncode, first.stderr) == (0, "")
        hub.requests.clear()
        again = run_fineweb(tmp_path, hub)
        assert (again.returncode, again.stderr) == (0, "")
        assert len(hub.downloads()) == 3 - read_manifest(out_dir)["shards"][1]["next"]["part"]
        hub.requests.clear()
        assert "already complete" in run_fineweb(tmp_path, hub).stdout
        assert hub.requests == []  # a finished folder needs no network
    assert tokens(out_dir, "val") == stream[:3000]
    assert tokens(out_dir, "train") == stream[3000:]
    names = ["edufineweb_train_000001.bin", "edufineweb_train_000002.bin"]
    assert sorted(content(out_dir))[:2] == names
    assert (out_dir / "edufineweb_val_000000.bin").is_file()
    assert not [p for p in out_dir.iterdir() if p.is_dir()]
    hashes = {name: hashlib.sha256(body).hexdigest() for name, body in files.items()}
    assert read_manifest(out_dir)["files_sha256"] == hashes


def test_fineweb_edu_damaged_on_the_way(tmp_path, hub_files):
    files, texts = hub_files
    last = f"{FINEWEB_FOLDER}/002_00000.parquet"
    wrong = Trouble(body=bytes(len(files[last])))
    with fake_hub(files) as hub:
        hub.trouble["002_"] = [wrong, wrong]
        broken = run_fineweb(tmp_path, hub)
        assert broken.returncode == 1
        assert "002_00000.parquet of HuggingFaceFW/fineweb-edu: its sha256 is " in broken.stderr
        assert len(broken.stderr.splitlines()) == 1
        hub.trouble["002_"] = [wrong]
        again = run_fineweb(tmp_path, hub)
        assert again.returncode == 0
        assert "downloading it again" in again.stdout
    assert tokens(tmp_path / "fineweb", "train") == ids(texts)[3000:]


def test_fineweb_edu_damaged_at_the_hub(tmp_path, hub_files):
    files, _ = hub_files
    files[f"{FINEWEB_FOLDER}/002_00000.parquet"] = b"no such format" * 50
    with fake_hub(files) as hub:
        broken = run_fineweb(tmp_path, hub)
    assert broken.returncode == 1
    assert "002_00000.parquet: damaged" in broken.stderr
    assert len(broken.stderr.splitlines()) == 1


def test_fineweb_edu_that_is_not_there(tmp_path):
    with fake_hub({f"{FINEWEB_FOLDER}/README.md": b""}) as hub:
        empty = run_fineweb(tmp_path, hub)
        assert "no parquet files and no .jsonl files in sample/10BT" in empty.stderr
        hub.url += "/elsewhere"
        gone = run_fineweb(tmp_path, hub)
    assert gone.returncode == 1
    assert gone.stderr.startswith("error: the Hub has no dataset HuggingFaceFW/fineweb-edu")
    assert len(gone.stderr.splitlines()) == 1


def test_dropped_connections_change_no_byte(tmp_path, hub_files):
    files, _ = hub_files
    cut = Trouble(cut_after=2000)
    with fake_hub(files) as hub:
        assert run_fineweb(tmp_path, hub, out_dir="undisturbed").returncode == 0
        # past the last try in one file, with progress each time in another, then answers of 500
        hub.trouble = {"002_": [Trouble(cut_after=0)] * 3, "001_": [cut, cut, Trouble(500)]}
        first = run_fineweb(tmp_path, hub, out_dir="out")
        assert first.returncode == 1
        assert "cannot reach the Hugging Face Hub: " in first.stderr
        assert len(first.stderr.splitlines()) == 1
        finished = len(read_manifest(tmp_path / "out")["shards"])
        assert finished >= 2
        again = run_fineweb(tmp_path, hub, out_dir="out", num_workers=2)
        assert (again.returncode, again.stderr) == (0, "")
        assert any("+" in name for name in hub.downloads())
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ended_in_a_stalled_download(tmp_path, hub_files, number):
    files, texts = hub_files
    with fake_hub(files) as hub:
        hub.trouble["002_"] = [Trouble(stall_after=3000)]
        options = {"source": "fineweb-edu", "out_dir": tmp_path / "out", "shard_tokens": 3000}
        environment = hub.environment(tmp_path / "h") | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
        process = start(tmp_path, environment, **options, num_workers=1)
        part = tmp_path / "out" / "downloads" / FINEWEB_FOLDER / "002_00000.parquet.part"
        wait_for(part, process)
        while part.stat().st_size < 3000:
            time.sleep(0.01)
        began = time.monotonic()
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=30)
        assert time.monotonic() - began < 15  # the download waits for 60
        if number == signal.SIGINT:
            assert (process.returncode, err) == (130, "")
            assert out.splitlines()[-1].startswith("interrupted: ")
        again = run_fineweb(tmp_path, hub, out_dir=tmp_path / "out")
        assert again.returncode == 0
        assert hub.downloads()[-1].endswith("002_00000.parquet+3000")
    stream = tokens(tmp_path / "out", "val") + tokens(tmp_path / "out", "train")
    assert stream == ids(texts)


def test_a_folder_of_the_users_own_downloads_stays(tmp_path, corpus):
    """And so does a file beside the folder of shards, whatever fails."""
    mine = tmp_path / "out/downloads/mine"
    mine.parent.mkdir(parents=True)
    for path in (mine, tmp_path / "out.tmp", tmp_path / "out/mine.tmp"):
        path.write_text("mine")
    (tmp_path / "out/manifest.json.tmp").mkdir()  # cannot be deleted as a file
    with pytest.raises(UserError, match="while writing"):
        run(corpus, tmp_path / "out", shard_tokens=1500)
    (tmp_path / "out/manifest.json.tmp").rmdir()
    run(corpus, tmp_path / "out", shard_tokens=1500)
    for path in (mine, tmp_path / "out.tmp", tmp_path / "out/mine.tmp"):
        assert path.read_text() == "mine"


def test_another_dataset(tmp_path, hub_files):
    files, texts = hub_files
    texts = texts[:100]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    files = {"train/b.jsonl.gz": gzip.compress(rows), "train/a.jsonl": rows, "test/c.jsonl": rows}
    options = {"source": "hf:some/corpus/train", "shard_tokens": 1000}
    with fake_hub(files, "some/corpus", "d" * 40) as hub:
        first = run_fineweb(tmp_path, hub, **options, max_shards=2, keep_downloads=1)
        assert (first.returncode, first.stderr) == (0, "")
        out_dir = tmp_path / "data" / "corpus-train"
        manifest = read_manifest(out_dir)
        assert manifest["revision"] == "d" * 40
        assert list(manifest["files"]) == ["train/a.jsonl", "train/b.jsonl.gz"]
        assert (out_dir / "downloads" / "train" / "a.jsonl").read_bytes() == rows
        hub.requests.clear()
        again = run_fineweb(tmp_path, hub, **options, keep_downloads=1)
        assert (again.returncode, again.stderr) == (0, "")
        assert not [line for line in hub.requests if "/api/" in line]  # the commit is settled
        assert "train/a.jsonl" not in hub.downloads()
    assert len(list((out_dir / "downloads").rglob("*.jsonl*"))) == 2
    stream = tokens(out_dir, "val") + tokens(out_dir, "train")
    assert stream == ids(texts + texts)
    assert (out_dir / "corpus_val_000000.bin").is_file()


def test_a_short_run_downloads_nothing_ahead(tmp_path):
    data = parquet_bytes(make_texts(600))  # many batches: a few are read ahead
    files = {f"{FINEWEB_FOLDER}/{number:03d}_00000.parquet": data for number in range(3)}
    with fake_hub(files) as hub:
        assert run_fineweb(tmp_path, hub, shard_tokens=500, max_tokens=10).returncode == 0
        assert len(hub.downloads()) == 1
    assert not (tmp_path / "fineweb" / "downloads").exists()


def test_disk_without_room_and_dry_run(tmp_path, hub_files):
    files, _ = hub_files
    with fake_hub(files) as hub:
        hub.sizes = dict.fromkeys(files, 10**17)
        crammed = run_fineweb(tmp_path, hub)
        assert crammed.returncode == 1
        assert "of downloads) and its disk has" in crammed.stderr
        assert len(crammed.stderr.splitlines()) == 1
        hub.sizes = dict.fromkeys(files, 10**9)
        dry = run_fineweb(tmp_path, hub, dry_run=1, shard_tokens=10**8)
        assert (dry.returncode, dry.stderr) == (0, "")
        assert hub.downloads() == []
    assert not (tmp_path / "fineweb").exists()
    assert "to download  3.0 GB, 4 minutes at 100 Mbit/s" in dry.stdout
    assert "tokens       about 1,052,631,578" in dry.stdout
    assert "disk         about 4.1 GB needed at once" in dry.stdout


def test_a_file_that_is_gone_or_changed_is_called_so(tmp_path):
    source, out = tmp_path / "c", tmp_path / "out"
    for name in "abc":
        write_jsonl(source / f"{name}.jsonl", make_texts(30))
    run(source, out)
    (source / "a.jsonl").rename(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"shards made with a\.jsonl, which is gone; use"):
        run(source, out)
    write_jsonl(source / "b.jsonl", make_texts(31))
    with pytest.raises(UserError, match=r"another b\.jsonl \(it has another size\) and 1 more"):
        run(source, out)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch, deleted):
    """The manifest would describe another file; one that was deleted was read whole."""
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    write_jsonl(source, make_texts(30))
    size, read = source.stat().st_size, sources.read_marked_rows

    def grown(path, *given):
        yield from read(path, *given)
        if deleted:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes() + b'{"text": "more"}\n')

    monkeypatch.setattr(sources, "read_marked_rows", grown)
    if deleted:
        run(source, out)
    else:
        told = rf"a\.jsonl was changed while it was read: {size:,} bytes"
        with pytest.raises(UserError, match=told):
            run(source, out)
    assert json.loads((out / "manifest.json").read_text())["complete"] is deleted
