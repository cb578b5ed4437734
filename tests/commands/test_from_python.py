"""Training from Python, and its result."""

import contextlib
import json
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import gpt2
from gpt2.commands import from_python
from gpt2.commands.from_python import TrainResult, in_notebook
from gpt2.config.train import TrainConfig
from gpt2.errors import UserError
from gpt2.train import loop

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 32, "batch_size": 2}
SMALL |= {"grad_accum_steps": 1, "eval_tokens": 200, "device": "cpu", "dtype": "float32"}


@pytest.mark.long
def test_a_run_from_python_gives_its_result(tmp_path, data_dir, capsys):
    given = {**SMALL, "data_dir": data_dir, "mlp": "relu2", "out_dir": tmp_path}
    result = gpt2.train(**given, max_steps=2, eval_every=1, progress=True)
    said = capsys.readouterr()
    assert said.out == ""  # a bar instead
    assert "2/2" in said.err
    assert "val_loss" in said.err
    assert (result.exit_code, result.config.model.mlp) == (0, "relu2")
    steps = [row["step"] for row in result.metrics]
    assert steps == [1, 2]
    assert result.val_loss == result.metrics[-1]["val_loss"]
    assert result.best_val_loss == min(row["val_loss"] for row in result.metrics)
    assert f"step 2, validation loss {result.val_loss:.4f}" in repr(result)
    assert result._repr_png_().startswith(b"\x89PNG")
    assert result.plot() == tmp_path / "loss.png"
    assert result.model().config.mlp == "relu2"
    pandas = pytest.importorskip("pandas")
    assert list(pandas.DataFrame(result.metrics)["step"]) == steps
    assert list(result.to_pandas().index) == steps
    again = gpt2.train(**given, max_steps=3, eval_every=1)
    assert again.metrics[:2] == result.metrics
    assert "continuing from" in capsys.readouterr().out


@contextlib.contextmanager
def default(kind, value):
    """`torch.set_default_dtype` or `torch.set_default_device`, as a notebook has it."""
    set_default, before = getattr(torch, f"set_default_{kind}"), torch.float32
    set_default(value)
    try:
        yield
    finally:
        set_default(before if kind == "dtype" else None)


CALLERS = {
    "float64": lambda: default("dtype", torch.float64),
    "bfloat16": lambda: default("dtype", torch.bfloat16),
    "device": lambda: default("device", "meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def test_the_defaults_of_the_caller_change_no_run(tmp_path, data_dir):
    given = {**SMALL, "data_dir": data_dir, "max_steps": 2, "progress": False}
    expected = gpt2.train(**given, out_dir=tmp_path / "own")
    text = expected.model("cpu").generate("One", 4, seed=1)
    for name, caller in CALLERS.items():
        with caller():
            before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
            found = gpt2.train(**given, out_dir=tmp_path / name)
            model = found.model("cpu")
            assert found.val_loss == expected.val_loss
            if name != "autocast":  # in which a caller computes text, too
                assert model.generate("One", 4, seed=1) == text
            after = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
            assert after == before
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_second_thread_is_told_to_be_a_process(tmp_path, data_dir):
    given = {**SMALL, "data_dir": data_dir, "max_steps": 1, "progress": False}
    assert from_python._training.acquire(blocking=False)  # as a run of another thread does
    try:
        with pytest.raises(UserError, match=r"another thread .* trains.* use processes"):
            gpt2.train(**given, out_dir=tmp_path / "b")
    finally:
        from_python._training.release()
    assert gpt2.train(**given, out_dir=tmp_path / "b").exit_code == 0
    with pytest.raises(UserError):  # the lock is free again after an error
        gpt2.train(**given, out_dir=tmp_path / "b", resume=tmp_path / "none")
    assert not from_python._training.locked()


@pytest.mark.parametrize(("at", "code"), [(2, 130), (3, 0)], ids=["on the way", "at the end"])
def test_ctrl_c_saves_and_ends_a_loop_of_runs(at, code, tmp_path, data_dir, monkeypatch):
    """Its signal is raised again, since a loop over seeds would go on with the next run."""
    begun, original = [], loop.train_step

    def step(state, config, rt):
        begun.append(state.step)
        if len(begun) == at:
            signal.raise_signal(signal.SIGINT)
        return original(state, config, rt)

    monkeypatch.setattr(loop, "train_step", step)
    given = {**SMALL, "data_dir": data_dir, "max_steps": 3}
    with pytest.raises(KeyboardInterrupt, match=f"stopped by Ctrl-C: .* step {at},") as stopped:
        [gpt2.train(**given, seed=seed, out_dir=tmp_path / str(seed)) for seed in (1, 2)]
    assert begun == list(range(at))
    result = stopped.value.result
    assert (result.out_dir, result.exit_code) == (tmp_path / "1", code)
    assert [row["step"] for row in result.metrics] == list(range(1, at + 1))
    assert gpt2.train(**given, seed=1, out_dir=tmp_path / "1").exit_code == 0


def test_ctrl_c_before_the_first_step(tmp_path, data_dir, monkeypatch):
    """The likeliest moment in a notebook; there is no metrics.jsonl yet."""
    original = loop.build

    def build(*arguments):
        signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(loop, "build", build)
    with pytest.raises(KeyboardInterrupt, match="step 0, validation loss none yet") as stopped:
        gpt2.train(**SMALL, data_dir=data_dir, max_steps=3, out_dir=tmp_path)
    assert (stopped.value.result.exit_code, stopped.value.result.metrics) == (130, [])


def test_after_sigterm_the_call_returns(tmp_path, data_dir, monkeypatch):
    original = loop.train_step

    def step(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    result = gpt2.train(**SMALL, data_dir=data_dir, max_steps=3, out_dir=tmp_path)
    assert result.exit_code == 128 + signal.SIGTERM


@pytest.mark.parametrize(("given", "said"), [
    ({"mpl": "relu2"}, r"gpt2.train\(mpl=…\): unknown option; did you mean mlp\?"),
    ({"max_steps": "many"}, "argument --max_steps: invalid whole number"),
    ({"max_steps": 0}, "max_steps=0: use 1 or more"),
    ({"config": "nowhere.toml"}, "config=nowhere.toml: No such file"),
])  # fmt: skip
def test_mistakes_are_those_of_the_command_line(given, said):
    with pytest.raises(UserError, match=said):
        gpt2.train(**given)


def test_a_run_without_metrics_is_shown_as_such(tmp_path):
    config = gpt2.TrainConfig()
    (tmp_path / "metrics.jsonl").write_text("")
    rows = from_python.rows_by_step(tmp_path / "metrics.jsonl")
    result = from_python.TrainResult(tmp_path, config, 0, rows)
    assert result._repr_png_() is None
    assert "none yet" in repr(result)


def test_an_imported_ipython_is_no_notebook(monkeypatch):
    shells = [None, SimpleNamespace(config={}), SimpleNamespace(config={"IPKernelApp": {}})]
    for shell, wanted in zip(shells, (False, False, True), strict=True):
        module = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", module)
        assert in_notebook() is wanted


def test_the_last_loss_is_not_the_last_finite_one(tmp_path):
    lines = [{"step": 1, "val_loss": 4.0}, {"step": 2, "nonfinite": ["loss"]}]
    lines += [{"step": 2, "nonfinite": ["val_loss"]}, {"step": 2, "sample": "x"}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = TrainResult(tmp_path, TrainConfig(), 143, from_python.rows_by_step(path))
    assert str(result.val_loss) == "nan"
    assert result.best_val_loss == 4.0
    assert result.metrics[1]["nonfinite"] == ["loss", "val_loss"]
    nothing = TrainResult(tmp_path, TrainConfig(), 143, [])
    assert (nothing.val_loss, nothing.best_val_loss) == (None, None)
