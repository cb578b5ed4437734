"""A link in the place of everything that a command writes: what is behind it never changes.

Each command first runs in a clean folder. Everything that it left there is then replaced by a link,
one at a time, and so is everything that it writes for a moment only. The command may go on or end
by one line.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpt2.cli import main

from .conftest import TINY
from .prepare.test_run import make_texts, write_jsonl

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows"),
    pytest.mark.fault(27, "each file and folder of a run, of shards, of an export as a link"),
]
SHORT = [*TINY, "--n_layer=1", "--grad_accum_steps=1", "--eval_tokens=64", "--save_every=1"]
FOR_A_MOMENT = {  # also of older versions
    "train": {".lock", "write_test.tmp", "state", "state/step_00000001.tmp", "out_ckpt.pt.tmp"}
    | {"config.toml.tmp", "metrics.jsonl.tmp", "nonfinite.json", "tensorboard", "wandb"}
    | {"archive_1", "archive_2", "state/step_00000001.old.tmp"},
    "prepare": {".lock", "manifest.json.tmp", "x_val_000000.bin.tmp", "downloads", "out.tmp"},
    "merge": {"manifest.json.tmp", "x_train_000001.bin.tmp"},
}


def snapshot(folder: Path) -> dict[str, tuple[float, bytes]]:
    """Time of change and content of everything below a folder."""
    return {
        path.relative_to(folder).as_posix(): (
            path.lstat().st_mtime,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


def links_in_turn(clean: Path, after: Path, work: Path, moments: set[str]) -> Iterator[Path]:
    """Folders like `clean`, each with one link to the outside; checks the outside afterwards.

    Args:
        clean: the folder before the command.
        after: the folder after the command.
        work: for copies.
        moments: names of what the command writes for a moment only.
    """
    names = {path.relative_to(after).as_posix() for path in after.rglob("*")} | moments
    assert len(names) > len(moments)
    for number, name in enumerate(sorted(names)):
        for kind in ("kept",) if (clean / name).exists() else ("kept", "nothing"):
            folder, outside = work / f"{number}_{kind}/out", work / f"{number}_{kind}/outside"
            shutil.copytree(clean, folder)
            outside.mkdir()
            place, target = folder / name, outside / "target"
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():
                place.rename(target)
            elif kind == "kept" and (after / name).is_dir():
                target.mkdir()
                (target / "mine.tmp").write_text("mine")
            elif kind == "kept":
                target.write_text("mine")
            place.symlink_to(target)
            before = snapshot(outside)
            yield folder
            assert snapshot(outside) == before, (name, kind)


def check(command: Callable[[Path], list[str]], turns: Iterator[Path], capsys) -> tuple[int, int]:
    """Runs a command in each folder; (how often it went on, how often it ended by one line)."""
    went_on = ended = 0
    for folder in turns:
        code = main(command(folder))
        err = capsys.readouterr().err
        assert code in (0, 2), err
        assert "Traceback" not in err
        if code:
            assert len(err.strip().splitlines()) == 1, err
        went_on, ended = went_on + (code == 0), ended + (code == 2)
    return went_on, ended


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir) -> Path:
    """The folder of a run of two steps."""
    out, data = tmp_path_factory.mktemp("trained") / "out", f"--data_dir={data_dir}"
    assert main(["train", data, f"--out_dir={out}", *SHORT, "--max_steps=2"]) == 0
    return out


@pytest.mark.parametrize("arguments", [
    ["--max_steps=2"],
    ["--max_steps=3", "--keep_last=1"],
    ["--max_steps=1", "--resume=never"],
], ids=["begin", "go on", "start over"])  # fmt: skip
def test_train(arguments, trained, data_dir, tmp_path, capsys):
    def command(folder: Path) -> list[str]:
        return ["train", f"--data_dir={data_dir}", f"--out_dir={folder}", *SHORT, *arguments]

    clean = tmp_path / "clean"
    if arguments == ["--max_steps=2"]:
        clean.mkdir()
    else:
        shutil.copytree(trained, clean)
    after = Path(shutil.copytree(clean, tmp_path / "after"))
    assert main(command(after)) == 0
    turns = links_in_turn(clean, after, tmp_path / "turns", FOR_A_MOMENT["train"])
    went_on, ended = check(command, turns, capsys)
    assert went_on > 10
    assert ended > 4


@pytest.mark.parametrize("first", [0, 2], ids=["begin", "go on"])
def test_prepare(first, tmp_path, capsys):
    source = write_jsonl(tmp_path / "x.jsonl", make_texts(60))

    def command(folder: Path) -> list[str]:
        words = ["prepare", f"--source={source}", f"--out_dir={folder}", "--shard_tokens=600"]
        return [*words, "--num_workers=1"]

    clean = tmp_path / "clean"
    clean.mkdir()
    if first:
        assert main([*command(clean), f"--max_shards={first}"]) == 0
    after = Path(shutil.copytree(clean, tmp_path / "after"))
    assert main(command(after)) == 0
    turns = links_in_turn(clean, after, tmp_path / "turns", FOR_A_MOMENT["prepare"])
    went_on, ended = check(command, turns, capsys)
    assert went_on > 6
    assert ended >= 4  # the lock and the downloads


def test_merge(tmp_path, capsys):
    for number in (1, 2):
        write_jsonl(tmp_path / f"x/{number}.jsonl", make_texts(60, seed=number))
    clean = tmp_path / "clean"
    for number in (1, 2):
        options = [f"--out_dir={clean}", f"--worker={number}/2", "--shard_tokens=600"]
        assert main(["prepare", f"--source={tmp_path / 'x'}", *options]) == 0

    def command(folder: Path) -> list[str]:
        return ["shards", "merge", str(folder)]

    after = Path(shutil.copytree(clean, tmp_path / "after"))
    assert main(command(after)) == 0
    turns = links_in_turn(clean, after, tmp_path / "turns", FOR_A_MOMENT["merge"])
    went_on, ended = check(command, turns, capsys)
    assert went_on >= 4
    assert ended > 8


def test_export(trained, tmp_path, capsys):
    def command(folder: Path) -> list[str]:
        return ["export", str(trained / "out_ckpt.pt"), str(folder / "hf")]

    clean, after = tmp_path / "clean", tmp_path / "after"
    clean.mkdir()
    after.mkdir()
    assert main(command(after)) == 0
    moments = {"hf.export.tmp", "hf.tmp"}
    check(command, links_in_turn(clean, after, tmp_path / "turns", moments), capsys)


def test_results_of_other_commands(trained, data_dir, tmp_path, capsys):
    """A picture, the table of an evaluation, the page of a look inside."""
    checkpoint = str(trained / "out_ckpt.pt")
    commands: dict[str, Callable[[Path], list[str]]] = {
        "loss.png": lambda folder: ["plot", str(folder)],
        "eval.json": lambda folder: ["eval", checkpoint, f"--data_dir={data_dir}",
                                     "--eval_tokens=64", f"--json={folder / 'eval.json'}"],
        "page.html": lambda folder: ["inspect", checkpoint, "a text",
                                     f"--out={folder / 'page.html'}"],
    }  # fmt: skip
    for name, command in commands.items():
        clean = tmp_path / name / "clean"
        clean.mkdir(parents=True)
        if name == "loss.png":
            shutil.copy(trained / "metrics.jsonl", clean)
        after = Path(shutil.copytree(clean, tmp_path / name / "after"))
        assert main(command(after)) == 0
        turns = links_in_turn(clean, after, tmp_path / name / "turns", {f"{name}.tmp"})
        check(command, turns, capsys)
