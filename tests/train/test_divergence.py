"""How a run ends whose losses became NaN or infinite."""

import math
import signal

import pytest

import gpt2
from gpt2 import cli
from gpt2.distributed import fsdp
from gpt2.errors import UserError
from gpt2.report.metrics import read_metrics
from gpt2.report.runs import read_run
from gpt2.train import loop

from ..conftest import TINY
from .test_loop import config, scripted_losses


@pytest.fixture
def bad_from(monkeypatch):
    """Lets the gradient be infinite from a step of the process on."""

    def bad_from(step):
        original, calls = fsdp.gradient_norm, []

        def poisoned(parameters):
            calls.append(1)
            return original(parameters) * (math.inf if len(calls) >= step else 1)

        monkeypatch.setattr(fsdp, "gradient_norm", poisoned)

    return bad_from


def rows_with(folder, name):
    return [row for row in read_metrics(folder / "metrics.jsonl") if name in row]


def test_a_run_that_ends_with_nan_fails_and_keeps_all(data_dir, tmp_path, monkeypatch, capsys):
    scripted_losses(monkeypatch, 3.0, math.nan)
    argv = ["train", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", *TINY]
    argv += ["--max_steps=4", "--eval_every=2", "--save_every=2", "--keep_last=3"]
    for _ in range(2):  # a finished run that is called again fails again, and measures nothing
        assert cli.main(argv) == 2
        said = capsys.readouterr()
        state = tmp_path / "state/step_00000002"
        assert "the validation loss at step 4 is NaN or infinite; everything is saved" in said.err
        assert f"go on from an earlier state (--resume={state}) with a lower" in said.err
        assert "finished at step" not in said.out
    assert [p.name[-1] for p in sorted((tmp_path / "state").iterdir())] == ["2", "4"]
    assert (tmp_path / "out_ckpt.pt").exists()
    assert [row["step"] for row in rows_with(tmp_path, "val_tokens")] == [2, 4]
    assert rows_with(tmp_path, "diverged_since") == [{"step": 4, "diverged_since": 4}]
    scripted_losses(monkeypatch, 3.1)
    assert cli.main([*argv, f"--resume={state}"]) == 0
    assert not read_run(tmp_path).diverged


def test_where_no_state_is_from_before_the_run_begins_again(data_dir, tmp_path, monkeypatch):
    scripted_losses(monkeypatch, math.inf)
    with pytest.raises(UserError, match=r"begin again \(--resume=never\) with a lower"):
        loop.run(config(data_dir, tmp_path, "--max_steps=3"))


def test_steps_and_validation_are_both_named(data_dir, tmp_path, monkeypatch, bad_from):
    scripted_losses(monkeypatch, math.nan)
    bad_from(4)
    said = "at step 6 is NaN or infinite, and the loss or the gradient .* every step since step 4;"
    with pytest.raises(UserError, match=said):
        loop.run(config(data_dir, tmp_path, "--max_steps=6", "--save_every=2"))
    assert rows_with(tmp_path, "diverged_since") == [{"step": 6, "diverged_since": 4}]


def test_a_run_without_one_good_step_fails(data_dir, tmp_path, bad_from):
    """Its validation loss is that of the first weights."""
    bad_from(1)
    with pytest.raises(UserError, match=r"diverged: the loss or .* every step since step 1; every"):
        loop.run(config(data_dir, tmp_path, "--max_steps=3"))


def test_last_steps_without_an_update_are_a_warning(data_dir, tmp_path, bad_from, capsys):
    bad_from(3)
    assert loop.run(config(data_dir, tmp_path, "--max_steps=5")) == 0
    said = capsys.readouterr()
    assert "every step since step 3, so the model is of step 2 (docs" in said.err
    assert "finished at step 5" in said.out


def test_an_early_stop_by_nan_fails(data_dir, tmp_path, monkeypatch):
    scripted_losses(monkeypatch, 3.0, math.nan, math.nan)
    argv = ["--max_steps=8", "--eval_every=1", "--early_stop_evals=2"]
    with pytest.raises(UserError, match="at step 3 is NaN"):
        loop.run(config(data_dir, tmp_path, *argv))
    assert read_run(tmp_path).diverged == "validation loss NaN at step 2"
    assert read_run(tmp_path).unfinished() == ""


def test_a_signal_is_no_end(data_dir, tmp_path, monkeypatch):
    scripted_losses(monkeypatch, math.nan)
    original = loop.train_step

    def step(state, *rest):
        if state.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(state, *rest)

    monkeypatch.setattr(loop, "train_step", step)
    assert loop.run(config(data_dir, tmp_path, "--max_steps=9", "--eval_every=2")) == 143


@pytest.mark.parametrize("save_every", [2, 100])
def test_a_run_that_gave_up_is_known_as_such(data_dir, tmp_path, monkeypatch, bad_from, save_every):
    monkeypatch.setattr(loop, "MAX_SKIPPED_STEPS", 3)
    bad_from(4)
    argv = ["--max_steps=9", f"--save_every={save_every}", "--log_every=50"]
    with pytest.raises(UserError, match="3 steps in a row, up to step 6") as caught:
        loop.run(config(data_dir, tmp_path, *argv))
    way = "step_00000002" if save_every == 2 else "begin again (--resume=never)"
    assert way in str(caught.value)
    run = read_run(tmp_path)
    assert (run.diverged, run.unfinished()) == ("loss or gradient NaN since step 4", "")
    monkeypatch.undo()
    assert loop.run(config(data_dir, tmp_path, *argv)) == 0
    assert read_run(tmp_path).diverged == ""


def test_from_python_it_is_an_error(data_dir, tmp_path, monkeypatch):
    scripted_losses(monkeypatch, 3.0, math.nan)
    options = dict(argument[2:].split("=") for argument in TINY)
    with pytest.raises(UserError, match="the run has diverged"):
        gpt2.train(**options, data_dir=data_dir, out_dir=tmp_path, max_steps=2, eval_every=1)
