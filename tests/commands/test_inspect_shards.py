"""`gpt2 shards verify|info|show`: nothing wrong passes, nothing right is called wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gpt2.commands.inspect_shards import document_lengths, info, median_length, show, verify
from gpt2.data import shards
from gpt2.data.shards import find_shards, open_shard, read_manifest, write_shard
from gpt2.errors import UserError
from gpt2.tokenizer import gpt2_tokenizer

from ..conftest import ROOT
from ..prepare.test_run import ids, make_texts, run, write_jsonl

EOT = 50256


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """So small that documents and shards span many of them."""
    monkeypatch.setattr(shards, "CHUNK_TOKENS", 97)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*make_texts(150), "long 漢字🦄 " * 900, *make_texts(60, seed=1)]


@pytest.fixture(scope="module")
def prepared(texts, tmp_path_factory) -> Path:
    """Shards of 1,500 tokens; the long document covers several of them."""
    folder = tmp_path_factory.mktemp("prepared")
    source = write_jsonl(folder / "x.jsonl", texts)
    run(source, folder / "out", shard_tokens=1500)
    assert len(read_manifest(folder / "out")["shards"]) > 6
    return folder / "out"


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "out"))


def poke(path: Path, token: int, place: int):
    """Changes one token of a shard."""
    with open(path, "r+b") as file:
        file.seek(1024 + 2 * place)
        file.write(token.to_bytes(2, "little"))


def edit(folder: Path, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


# ---- verify


def test_whole_folder(prepared, capsys):
    assert verify(prepared) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    manifest = read_manifest(prepared)
    assert f"{len(manifest['shards'])} shards, {manifest['tokens']:,} tokens, 211 documents" in out
    assert "unfinished" not in out


def test_unfinished_folder_is_not_damaged(texts, tmp_path, capsys):
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    run(source, tmp_path / "out", shard_tokens=1500, max_shards=3)
    capsys.readouterr()
    assert verify(tmp_path / "out") == 0
    assert "unfinished, `gpt2 prepare` goes on" in capsys.readouterr().out


X2 = "x_train_000002.bin"
DAMAGES = {
    "changed token": (lambda f: poke(f / X2, 7, 1200), [rf"{X2}: its sha256 is not that of"]),
    "id outside": (lambda f: poke(f / X2, 50257, 1200), [rf"{X2}: token 50257 at offset 1200 is"]),
    "end of text": (
        lambda f: poke(f / X2, EOT, 1200), [rf"{X2}: its sha256", rf"{X2}: [\d,]+ documents, mani"],
    ),
    "truncated": (lambda f: os.truncate(f / X2, 2000), [rf"{X2}: header says 1500 tokens, file"]),
    "empty": (lambda f: os.truncate(f / X2, 0), [rf"{X2}: not a token shard"]),
    "missing": (lambda f: (f / X2).unlink(), [rf"{X2}: missing; run `gpt2 prepare` again"]),
    "other shard": (
        lambda f: shutil.copy(f / X2, f / "y_train_000001.bin"), [r"y_train_000001\.bin: not in"],
    ),
    "shard of another size": (
        lambda f: write_shard(f / X2, np.full(30, EOT, np.uint16)),
        [rf"{X2}: its sha256", rf"{X2}: 30 tokens, manifest\.json says 1,500", rf"{X2}: 30 doc"],
    ),
    "totals": (
        lambda f: edit(f, lambda m: m.update(tokens=5)), [r"manifest\.json: says 5 tokens in all"],
    ),
    "two damaged": (
        lambda f: (poke(f / X2, 50300, 3), (f / "x_val_000000.bin").unlink()),
        [r"x_val_000000\.bin: missing", rf"{X2}: token 50300 at offset 3"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_every_damage_is_named_in_a_line(copy, capsys, damage, expected):
    damage(copy)
    assert verify(copy) == 1
    *problems, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"{len(expected)} problem")
    for problem, pattern in zip(problems, expected, strict=True):
        assert problem.startswith(str(copy))
        assert Path(problem.partition(": ")[0]).name in pattern.replace("\\", "")
        assert re.search(pattern, problem), problem
        assert "prepare" in problem or "move it away" in problem


def test_what_verify_says_repairs(texts, prepared, copy, capsys):
    poke(copy / X2, 7, 1200)
    assert verify(copy) == 1
    assert "delete it and run `gpt2 prepare` again" in capsys.readouterr().out
    (copy / X2).unlink()
    run(prepared.parent / "x.jsonl", copy, shard_tokens=1500)
    assert verify(copy) == 0


def test_folder_without_a_manifest(gpt2_data_dir, tmp_path, capsys):
    """Such as llm.c's: headers and ids can be checked, and it says that this is all."""
    folder = Path(shutil.copytree(gpt2_data_dir, tmp_path / "out"))
    assert verify(folder) == 0
    assert "without a manifest.json no more can be checked" in capsys.readouterr().out
    poke(folder / "text_train_000002.bin", 50303, 11)
    assert verify(folder) == 1
    assert "token 50303 at offset 11" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["shards"][0].update(name="../x_train_000001.bin"),
        lambda m: m["shards"][0].update(name="manifest.json"),
        lambda m: m["shards"][0].update(split="train"),
        lambda m: m["shards"][1].pop("sha256"),
        lambda m: m["shards"][1].update(tokens="many"),
        lambda m: m["shards"].append(3),
    ],
)
def test_manifest_that_is_none(copy, change):
    edit(copy, change)
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest of shards"):
        verify(copy)


@pytest.mark.parametrize("content", ["{", "[]", '{"shards": [3]}'])
def test_a_broken_manifest_beside_whole_shards(copy, content, capsys):
    """Whole shards are not to be deleted, and there is no --out_dir=."""
    (copy / "manifest.json").write_text(content)
    for look in (verify, info, lambda folder: show(folder, 0)):
        with pytest.raises(UserError, match=r"or delete it if the shards have GPT-2's voc") as told:
            look(copy)
        assert "out_dir" not in str(told.value)
        assert "delete its folder" not in str(told.value)
    (copy / "manifest.json").unlink()  # as it says
    assert verify(copy) == 0
    assert "headers and token ids are right" in capsys.readouterr().out


def test_nothing_to_look_at(tmp_path):
    for look in (verify, info, lambda folder: show(folder, 0)):
        with pytest.raises(UserError, match=r"holds no shards; make them with `gpt2 prepare"):
            look(tmp_path)
        with pytest.raises(UserError, match=r"no folder .*nowhere; make shards with"):
            look(tmp_path / "nowhere")
        with pytest.raises(UserError, match=r"`gpt2 prepare --out_dir=(['\"]).*a b\1`"):
            look(tmp_path / "a b")
    (tmp_path / "x_train_000001.txt").touch()
    with pytest.raises(UserError, match=r"txt is a file; name the folder of shards, such as"):
        info(tmp_path / "x_train_000001.txt")
    (tmp_path / "worker-1-of-2").mkdir()
    with pytest.raises(UserError, match="join them: gpt2 shards merge"):
        verify(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_verify_does_not_hold_a_shard(tmp_path):
    """The peak of memory grows by less than half a shard of 100 MB while two are checked."""
    for number in (1, 2):
        write_shard(tmp_path / f"x_train_{number:06d}.bin", np.zeros(50_000_000, np.uint16))
    code = (
        "import re, sys; from pathlib import Path\n"
        "from gpt2.commands.inspect_shards import verify\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak(); assert verify(Path(sys.argv[1])) == 0; print(peak() - before)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert int(done.stdout.splitlines()[-1]) < 50_000  # KB


# ---- info


def test_lengths_of_documents(texts, prepared):
    """Over all shards, those of the source: also of documents that span several shards."""
    expected = [len(ids([text])) for text in texts]
    both = find_shards(prepared, "val") + find_shards(prepared, "train")
    found = [document_lengths(both, index).tolist() for index in range(len(both))]
    assert [length for lengths in found for length in lengths] == expected
    assert [] in found  # shards inside the long document have no beginning
    assert [len(lengths) for lengths in found] == [
        entry["documents"] for entry in read_manifest(prepared)["shards"]
    ]


def test_shard_that_begins_with_a_rest(tmp_path):
    write_shard(tmp_path / "x_train_000001.bin", np.array([5, 6, EOT, 1, 2, EOT], np.uint16))
    write_shard(tmp_path / "x_train_000002.bin", np.array([3, EOT, 4], np.uint16))
    both = find_shards(tmp_path, "train")
    assert [document_lengths(both, index).tolist() for index in (0, 1)] == [[3, 2], [2]]


@pytest.mark.parametrize(("lengths", "median"), [([3], 3), ([1, 9], 1), ([1, 2, 9], 2), ([], 0)])
def test_median(lengths, median):
    assert median_length(Counter(lengths)) == median


def test_table(copy, capsys):
    assert info(copy) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["shard", "split", "tokens", "documents", "mean", "median", "MB"]
    entries = read_manifest(copy)["shards"]
    table = {line[0]: line for line in lines[1 : len(entries) + 3] if line[0] != "all"}
    for entry in entries:
        row = table[entry["name"]]
        assert row[1:4] == [entry["split"], f"{entry['tokens']:,}", f"{entry['documents']:,}"]
    total = next(line for line in lines if line[:2] == ["all", "train"])
    train = [entry for entry in entries if entry["split"] == "train"]
    assert total[2] == f"{sum(entry['tokens'] for entry in train):,}"
    assert total[3] == f"{sum(entry['documents'] for entry in train):,}"
    rest = [" ".join(line) for line in lines[len(entries) + 3 :]]
    assert rest[0].startswith("source: ")
    assert rest[0].endswith("x.jsonl, 1 files")
    assert rest[1] == "revision: none (local files)"
    assert gpt2_tokenizer().sha256 in rest[2]
    assert rest[3] == "complete: yes"
    picture = (copy / "document_lengths.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20], "big") == 1500
    assert verify(copy) == 0  # the picture is no stranger


def test_table_without_a_manifest(gpt2_data_dir, tmp_path, capsys):
    """Text without a single end-of-text token has no documents; that is said, not divided by."""
    folder = Path(shutil.copytree(gpt2_data_dir, tmp_path / "out"))
    assert info(folder) == 0
    out, err = capsys.readouterr()
    assert "where these shards come from is not known" in out
    assert "no picture of the lengths: there are no documents" in err


def test_picture_that_cannot_be_written(copy, capsys):
    (copy / "document_lengths.png").mkdir()
    assert info(copy) == 0
    out, err = capsys.readouterr()
    assert "complete: yes" in out
    assert err.startswith("warning: no picture of the lengths: ")


# ---- show


def shown(capsys, path, number):
    assert show(path, number) == 0
    out, err = capsys.readouterr()
    return out.removesuffix("\n"), err


def test_every_document_of_a_folder(texts, prepared, capsys):
    val = open_shard(prepared / "x_val_000000.bin")
    first = int(np.count_nonzero(val.read(0, val.tokens) == EOT))  # the rest is in train
    for number, text in enumerate(texts[first:]):
        assert shown(capsys, prepared, number) == (text, "")
    with pytest.raises(UserError, match=rf"holds {len(texts) - first} documents; use a number fro"):
        show(prepared, len(texts) - first)
    with pytest.raises(UserError, match=r"--doc=-1: .* use a number from 0 to"):
        show(prepared, -1)


def test_the_manifest_only_makes_it_faster(texts, copy, capsys):
    before = [shown(capsys, copy, number) for number in (0, 30, 100)]
    (copy / "manifest.json").unlink()
    assert [shown(capsys, copy, number) for number in (0, 30, 100)] == before


def test_piece_of_a_document(texts, prepared, capsys):
    """A shard shows what it has of its last document and says that there is more."""
    pieces = 0
    for entry in read_manifest(prepared)["shards"]:
        for number in range(entry["documents"]):
            text, said = shown(capsys, prepared / entry["name"], number)
            if said:
                pieces += 1
                assert number == entry["documents"] - 1
                assert "ends inside this document; name the folder to see all of it" in said
                assert sum(whole.startswith(text.rstrip("\ufffd")) for whole in texts) >= 1
            else:
                assert text in texts
    assert pieces >= 3


def test_shard_alone(prepared, tmp_path, capsys):
    entry = read_manifest(prepared)["shards"][1]
    shutil.copy(prepared / entry["name"], tmp_path)
    last = shown(capsys, tmp_path / entry["name"], entry["documents"] - 1)
    assert "ends here, and the document perhaps does not" in last[1]


def test_documents_that_are_not_there(prepared, data_dir, tmp_path):
    with pytest.raises(UserError, match=r"holds 0 documents; name another"):
        show(data_dir, 0)
    with pytest.raises(UserError, match=r"none\.bin: No such file"):
        show(tmp_path / "none.bin", 0)
    inside = next(e["name"] for e in read_manifest(prepared)["shards"] if not e["documents"])
    with pytest.raises(UserError, match=rf"--doc=0: .*{inside} holds 0 documents"):
        show(prepared / inside, 0)


def test_show_reads_only_what_it_needs(prepared, monkeypatch, capsys):
    """With a manifest, shards before the one with the document are not read."""
    opened = []
    read = shards.Shard.read
    monkeypatch.setattr(
        shards.Shard, "read", lambda s, *a: opened.append(s.path.name) or read(s, *a)
    )
    train = [e for e in read_manifest(prepared)["shards"] if e["split"] == "train"]
    show(prepared, sum(e["documents"] for e in train) - 1)
    assert set(opened) <= {train[-1]["name"], train[-2]["name"]}
