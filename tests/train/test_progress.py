"""What a run says while nothing is finished."""

import io
import re
import sys

import pytest
import torch

from gpt2.report import console
from gpt2.train import loop, messages, progress
from gpt2.train.progress import Progress, describe

from .test_loop import config, metrics


def timed(counts, warm_up=0, seconds=(5.0, 1.0, 1.0, 1.0, 1.0)):
    """What is told of steps with these numbers of micro-batches, and when."""
    now, told, waits, done = [0.0], [], [], 0
    seen = Progress(clock=lambda: now[0])
    with seen.running(lambda s: told.append((done, s)), lambda: waits.append(done), warm_up):
        for step, count in enumerate(counts, 1):
            now[0] += 100  # an update, a save
            for _ in seen.micro_batches(list(range(count)), step):
                now[0] += seconds[done]
                done += 1
    return told, waits


@pytest.mark.parametrize(
    ("counts", "warm_up", "seconds", "expected"),
    [
        ((4,), 0, (5, 1, 1, 1), (1, 5)),  # slow enough to be believed
        ((4,), 0, (1, 0.5, 1, 1), (2, 0.5)),  # the first also allocates
        ((1, 1), 0, (1, 0.5), (1, 1)),  # before the first step ends
        ((4,), 2, (60, 3, 2, 1), (3, 2)),  # the first two compile
        ((1, 1, 1, 1), 2, (60, 3, 2, 1), (3, 2)),  # without what lies between steps
        ((2, 2), 2, (60, 3, 2, 1), (3, 2)),
    ],
)
def test_a_real_micro_batch_is_timed_once(counts, warm_up, seconds, expected):
    told, waits = timed(counts, warm_up, seconds)
    assert told == [expected]
    assert len(waits) <= 4  # a device that is waited for idles


def test_outside_of_a_run_it_does_nothing():
    assert list(Progress().micro_batches([1, 2], 1)) == [1, 2]


def test_a_run_says_its_time_and_epochs_before_the_first_step(data_dir, tmp_path, capsys):
    assert loop.run(config(data_dir, tmp_path, "--max_steps=3", "--eval_every=1")) == 0
    out = capsys.readouterr().out
    line = re.search(
        r"^about [\d.]+ seconds a step, [\d.]+ seconds in all \(until \d\d \w+ \d{4} \d\d:\d\d\)"
        r".*; \d+\.\d epochs$", out, re.MULTILINE,
    )  # fmt: skip
    assert line, out
    assert line.start() < out.index("step 1/3")
    assert out.count(" a step, ") == 1


def test_epochs_are_those_of_the_run(data_dir, tmp_path, capsys):
    """Not those of a loader that has begun to read the next step."""
    large = ["--batch_size=128", "--grad_accum_steps=4", "--max_steps=2", "--eval_tokens=100"]
    assert loop.run(config(data_dir, tmp_path, *large)) == 0
    out = capsys.readouterr().out
    epochs = float(re.search(r"2 steps are (\d+\.\d\d) epochs", out)[1])
    assert epochs > 0.2
    assert f"; {epochs:,.1f} epochs\n" in out


def test_many_epochs_and_long_runs_are_warned_of(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(messages, "TOO_LONG", 0.001)
    monkeypatch.setattr(messages, "MANY_EPOCHS", 0)
    assert loop.run(config(data_dir, tmp_path, "--max_steps=2")) == 0
    err = capsys.readouterr().err
    assert re.search(r"the run reads its text \d+ times, .* --max_steps=\d+ reads it 10 times", err)
    assert "is long: fewer --max_steps=, a smaller --size=" in err


def test_it_changes_no_number(data_dir, tmp_path, monkeypatch):
    arguments = ["--max_steps=4", "--dropout=0.1", "--eval_every=2"]
    assert loop.run(config(data_dir, tmp_path / "a", *arguments)) == 0
    monkeypatch.setattr(Progress, "micro_batches", lambda self, batches, step: iter(batches))
    monkeypatch.setattr(Progress, "over", lambda self, items, total, name: iter(items))
    assert loop.run(config(data_dir, tmp_path / "b", *arguments)) == 0
    for name in ("loss", "grad_norm", "val_loss"):
        assert metrics(tmp_path / "a", name) == metrics(tmp_path / "b", name)
    of_a, of_b = (torch.load(tmp_path / f / "out_ckpt.pt", weights_only=True) for f in "ab")
    assert all(torch.equal(of_a["model"][n], of_b["model"][n]) for n in of_b["model"])


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_line_moves_on_a_terminal_and_gives_way(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert console.status("step 1: micro-batch 2 of 9, 12s")
    console.log("a message")
    assert sys.stderr.getvalue() == "\rstep 1: micro-batch 2 of 9, 12s\x1b[K\r\x1b[K"
    assert capsys.readouterr().out == "a message\n"


def test_long_steps_show_how_far_they_are(monkeypatch, capsys):
    """Without a terminal a line a minute; nothing for what is quick."""
    now, ticks = [0.0], iter([False] * 200 + [True])

    class Ended:
        def wait(self, _seconds):
            now[0] += 1
            return next(ticks)

    seen = Progress(clock=lambda: now[0])
    seen._now = progress._Now("step 7: micro-batch", 0.0, 3, 64)
    seen._show(Ended())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 7: micro-batch 4 of 64, 10s, about 3m23s left")
    assert len(lines) == 4  # at 10, 70, 130 and 190 s


def test_words():
    assert describe("step 1: micro-batch", 0, 8, 12) == "step 1: micro-batch 1 of 8, 12s"
    said = [console.in_words(s) for s in (0.234, 12, 100, 8000, 4e5, 3e6, 1e9)]
    assert said == ["0.23 seconds", "12 seconds", "2 minutes", "2 hours", "5 days", "35 days",
                    "32 years"]  # fmt: skip
