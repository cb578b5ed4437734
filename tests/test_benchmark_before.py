"""`--before=REV` of the benchmarks: an earlier build beside today's, from a git revision.

Both builds are stand-ins of a few lines in a repository of the test, except where it says so.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import before, generate, throughput
from gpt2.errors import UserError

SMALL = ["--size=gpt2-tiny", "--device=cpu", "--dtype=float32"]
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=16", "--steps=1", "--warmup=0"]
# A build that has only what the benchmark asks for; it says which options it got.
THROUGHPUT = """
import argparse, contextlib, json, sys
import gpt2

def parser():
    made = argparse.ArgumentParser()
    made.add_argument("--batch_size", type=int)
    made.add_argument("--max_steps", type=int)
    return made

@contextlib.contextmanager
def ours(options, data_dir):
    assert list(data_dir.glob("*_train_*.bin"))
    losses = iter([3.5, 3.25, 3.0])
    assert options.max_steps in (2, 3)
    yield lambda: lambda: next(losses) + gpt2.LOSS

if __name__ == "__main__":
    options, extra = parser().parse_known_args()
    if "--n_embd=33" in extra:
        raise gpt2.UserError("unknown option --n_embd")
    print("a line of an older build")
    print(json.dumps({
        "name": "ours", "machine": "CPU", "setting": "s", "batch_size": options.batch_size,
        "tokens_per_second": gpt2.RATE, "ms_per_65536_tokens": 1.0, "peak_gib": None,
        "first_step_seconds": 1.0, "extra": extra,
    }))
"""
GENERATE = """
import argparse, json
import gpt2
made = argparse.ArgumentParser()
made.add_argument("--batch_size", type=int)
options, extra = made.parse_known_args()
print(json.dumps({
    "name": "ours", "machine": "CPU", "setting": "s", "batch_size": options.batch_size,
    "tokens_per_second": gpt2.RATE, "first_call_seconds": 1.0,
    "tokens": [[1, round(gpt2.RATE)]] * options.batch_size,
}))
"""
PACKAGE = "RATE, LOSS = {}, {}\nclass UserError(ValueError): pass\n"


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """Revision v0 has no benchmarks, v1 has, and today's build is what is not committed."""
    folder = tmp_path_factory.mktemp("repository")

    def git(*arguments: str):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)

    git("init", "-q")
    for name, text, tag in (
        ("gpt2/__init__.py", PACKAGE.format(200.0, 0.0), "v0"),
        ("benchmarks/throughput.py", THROUGHPUT, ""),
        ("benchmarks/generate.py", GENERATE, "v1"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        git("add", ".")
        git("commit", "-qm", name)
        if tag:
            git("tag", tag)
    (folder / "gpt2/__init__.py").write_text(PACKAGE.format(300.0, 0.125))
    return folder


@pytest.fixture
def held_against(repository, monkeypatch, tmp_path):
    """Runs a benchmark of that repository from this process."""
    monkeypatch.setattr(before, "ROOT", repository)
    monkeypatch.setattr(before, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(benchmark, *argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmark", *argv])
        return benchmark.main()

    return run


def test_an_earlier_build_takes_turns_with_todays(held_against, capsys, tmp_path):
    out = tmp_path / "out"
    argv = [*SMALL, *TINY, "--batch_sizes=1,2", "--rounds=2", f"--out_dir={out}"]
    assert held_against(throughput, *argv, "--parity_steps=2", "--before=v1") == 0
    rows = [json.loads(line) for line in (out / "throughput.jsonl").open()]
    old = rows[2]["name"]
    assert old.startswith("at ")
    assert [(r["round"], r["name"], r["batch_size"], r["tokens_per_second"]) for r in rows] == [
        (turn, name, batch, rate)
        for turn in (0, 1) for name, rate in (("ours", 300.0), (old, 200.0)) for batch in (1, 2)
    ]  # fmt: skip
    assert all({"--only=ours", "--n_embd=32", "--steps=1"} <= set(row["extra"]) for row in rows)
    printed = capsys.readouterr().out
    assert (
        f"Losses of 2 steps on one text, ours and {old}: at most 1.2e-01 apart; "
        "from 3.6250 and 3.5000 to 3.3750 and 3.2500\n" in printed
    )
    assert printed.splitlines()[-1].split()[-3:] == ["1.50", "×", "1.50–1.50"]
    assert not list(tmp_path.glob("gpt2-before-*"))


def test_equal_builds_have_equal_losses(repository, monkeypatch):
    monkeypatch.setattr(before, "ROOT", repository)
    monkeypatch.setattr(before, "SHARD_TOKENS", 1000)
    builds = [before.Build("a"), before.Build("b")]
    told = before.loss_parity(builds, ["--batch_size=2"], 3)
    assert "of 3 steps on one text, a and b: equal to the last bit; from 3.6250 and" in told


def test_the_losses_are_those_of_todays_step(monkeypatch, capsys, gpt2_data_dir):
    """What a build is asked for its losses, asked of the real one."""
    argv = ["-c", str(gpt2_data_dir), "3", *SMALL, *TINY, "--batch_size=2", "--compile_model=False"]
    monkeypatch.setattr(sys, "argv", [*argv, "--learning_rate=0.1", "--warmup_steps=0"])
    exec(before.LOSSES, {})
    losses = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 10 < losses[0] < 11.5
    assert losses[2] < losses[0] - 0.1


def test_generation_of_an_earlier_build(held_against, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    argv = ["--batch_sizes=1,3", "--rounds=2", "--before=v1", f"--out_dir={tmp_path}"]
    assert held_against(generate, *SMALL, *argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "generate.jsonl").open()]
    old = rows[1]["name"]
    assert [(r["name"], r["batch_size"], r["same_tokens"]) for r in rows] == 2 * [
        ("ours", 1, "2 of 2"), (old, 1, "1 of 2"), ("ours", 3, "6 of 6"), (old, 3, "3 of 6"),
    ]  # fmt: skip
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("1.50 ×   1.50–1.50       1.0 s  3 of 6")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--before=v9"], "--before=v9: there is no such revision; `git log --oneline` lists them"),
        (["--before=--all"], "--before=--all: there is no such revision"),
        (["--before=v0"], "--before=v0: it has no benchmarks/throughput.py; use a later revision"),
        (["--before=v1", "--rounds=0", "--parity_steps=0"], "--rounds=0: use a whole number"),
    ],
)
def test_what_cannot_be_compared_is_one_line(held_against, capsys, argv, told):
    assert held_against(throughput, *SMALL, *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)


def test_an_option_that_the_earlier_build_lacks(repository, capfd, monkeypatch):
    monkeypatch.setattr(before, "ROOT", repository)
    with before.earlier_build("v1", "throughput") as (old,):
        with pytest.raises(UserError, match=r"^at \w{7} failed: unknown option --n_embd$"):
            old.row("throughput", ["--batch_size=2", "--n_embd=33"])
        assert capfd.readouterr().err == ""
        with pytest.raises(UserError, match=r"^at \w{7} failed: .*invalid int value"):
            old.row("throughput", ["--batch_size=x"])
        assert "usage:" in capfd.readouterr().err
    assert not old.folder.exists()


def test_without_git(held_against, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(before, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert held_against(throughput, *SMALL, "--before=HEAD") == 2
    assert "--before=HEAD: not a git repository" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert held_against(throughput, *SMALL, "--before=HEAD") == 2
    assert capsys.readouterr().err == "--before=HEAD needs git, and there is none here\n"


def test_ctrl_c_removes_the_folder(held_against, monkeypatch, tmp_path):
    """The signal comes while a contender runs, as it does from a keyboard."""

    def row(*_):
        assert list(tmp_path.glob("gpt2-before-*/gpt2"))
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(before.Build, "row", row)
    assert held_against(throughput, *SMALL, "--before=v1", "--parity_steps=0") == 130
    assert not list(tmp_path.glob("gpt2-before-*"))


def test_a_ratio_is_of_one_round():
    """A machine that became three times slower in the second round changes no ratio."""
    rows = [
        {"name": "ours", "batch_size": 1, "tokens_per_second": 30.0},
        {"name": "old", "batch_size": 1, "tokens_per_second": 20.0},
        {"name": "ours", "batch_size": 1, "tokens_per_second": 10.0},
        {"name": "old", "batch_size": 1, "tokens_per_second": 8.0},
        {"name": "old", "batch_size": 9, "out_of_memory": True},
    ]
    mine, old, large = before.merge_rounds(rows)
    assert (mine["tokens_per_second"], old["tokens_per_second"]) == (20.0, 14.0)
    assert before.advantage(mine, old) == ("1.38 ×", "1.25–1.50")
    assert before.advantage(mine, mine) == ("", "")
    assert large == rows[-1]
