import json
import os
import re
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2 import cli
from gpt2.commands import sweep
from gpt2.commands.on_devices import on_devices
from gpt2.config.command_line import parse, to_toml
from gpt2.config.options import flatten
from gpt2.config.registry import forget, plugins
from gpt2.config.run_paths import from_anywhere
from gpt2.config.train import TrainConfig
from gpt2.data.shards import write_shard
from gpt2.errors import UserError
from gpt2.train import time_budget

from ..conftest import TINY, run_python

SMALL = [*TINY, "--n_layer=1", "--n_embd=8", "--max_steps=4"]
SMALL.remove("--device=cpu")


@pytest.fixture
def recipe(tmp_path, data_dir):
    path = tmp_path / "recipe.toml"
    config = parse(TrainConfig, [*SMALL, "--eval_every=2", "--save_every=2"], "gpt2 train")
    names = [argument[2:].partition("=")[0] for argument in SMALL]
    given = {name: value for name, value in flatten(config).items() if name in names}
    rest = f"eval_every = 2\nsave_every = 2\ndata_dir = '{data_dir}'\n"
    path.write_text(to_toml(given) + rest)
    return path


class Trainer:
    """In the place of processes: writes what a run leaves behind."""

    def __init__(self, monkeypatch):
        self.calls, self.exit_codes, self.steps = [], {}, 50
        self.diverge, self.code_of_nan = {}, 2
        monkeypatch.setattr(sweep._Processes, "call", lambda _, *given: self(*given))

    def __call__(self, arguments, output):
        self.calls.append(arguments)
        if arguments[1] == "gpt2.train.time_budget":
            output.write(b'compiling\n{"max_steps": %d}\n' % self.steps)
            return 0
        config = parse(TrainConfig, arguments[3:], "gpt2 train")
        folder, seed = sweep.Path(config.output.out_dir), config.system.seed
        if code := self.exit_codes.get(folder.name):
            output.write(b"a\nerror: no data\n")
            return code
        folder.mkdir(exist_ok=True)
        settings = from_anywhere({n: v for n, v in flatten(config).items() if n != "resume"})
        (folder / "config.toml").write_text(to_toml(settings))
        row = {"step": config.optim.max_steps, "val_loss": 3 + seed / 10, "val_tokens": 7}
        if folder.name in self.diverge:
            row = self.diverge[folder.name]
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        start = {
            "step": 0,
            "plugins": plugins(),
            "training": sweep._training_of(config.data.data_dir),
        }
        (folder / "history.jsonl").write_text(json.dumps(start) + "\n")
        if row.get("val_tokens"):
            (folder / "out_ckpt.pt").write_text("")
        return 0 if "val_loss" in row else self.code_of_nan


@pytest.fixture
def trainer(monkeypatch):
    return Trainer(monkeypatch)


@pytest.fixture
def call(recipe, tmp_path):
    def call(*more):
        argv = ["sweep", str(recipe), "--seeds=1,2", "--devices=cpu", f"--out_dir={tmp_path}/o"]
        return cli.main([*argv, *more])

    return call


@pytest.mark.slow
def test_a_sweep_trains_and_is_not_repeated(tmp_path, recipe, data_dir):
    argv = ["-m", "gpt2", "sweep", recipe, "--seeds=1", "--set", "learning_rate=1e-3,2e-3"]
    argv += ["--devices=cpu,cpu", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/o"]
    said = run_python(*argv).stdout
    assert said.count("validation loss") == 2
    assert "| learning_rate=0.001 | 1 |" in said
    assert "left out" not in said
    assert (tmp_path / "o/compare.png").exists()
    half = tmp_path / "o/learning_rate=2e-3,seed=1"  # killed after its first checkpoint
    shutil.rmtree(half / "state/step_00000004")
    (half / "out_ckpt.pt").unlink()
    again = run_python(*argv).stdout
    assert "1 of 2 runs are finished already" in again
    assert again.count("begins on cpu") == 1
    log = (tmp_path / "o/learning_rate=2e-3,seed=1.log").read_text()
    assert "continuing from" in log
    table, table_again = (  # of the same bits; only the seconds of a run may differ
        re.sub(r"\| \d+s \|", "| s |", text.partition("| recipe |")[2]) for text in (said, again)
    )
    assert table == table_again
    assert table.count("| s |") == 2


def test_what_is_finished_is_not_run_again(call, trainer, tmp_path, capsys):
    trainer.exit_codes["seed=2"] = 75
    assert call() == 1
    assert "seed=2: failed with exit code 75: error: no data (1 of 2)" in capsys.readouterr().out
    trainer.exit_codes.clear()
    assert call() == 0
    assert [argv[-3] for argv in trainer.calls] == ["--seed=1", "--seed=2", "--seed=2"]
    assert "One recipe: there is nothing to compare it with (2 seeds)" in capsys.readouterr().out
    assert call() == 0
    assert len(trainer.calls) == 3
    assert call("--learning_rate=7") == 2
    line = capsys.readouterr().err
    assert "is of a run with other options: learning_rate 0.001 instead of 7.0; use" in line


def test_a_relative_path_of_the_data_is_that_of_a_run_with_an_absolute_folder(
    call, trainer, data_dir, monkeypatch
):
    """Such a run writes absolute paths into its config.toml."""
    monkeypatch.chdir(data_dir.parent)
    for _ in range(2):
        assert call(f"--data_dir={data_dir.name}") == 0
    assert len(trainer.calls) == 2


def test_runs_on_other_training_tokens_are_refused(call, trainer, data_dir, tmp_path, capsys):
    data = shutil.copytree(data_dir, tmp_path / "data")
    given = f"--data_dir={data}"
    assert call(given) == 0
    shard = sorted(data.glob("*_train_*.bin"))[-1]
    renamed = shard.rename(shard.with_name(f"{shard.stem[:-6]}900000.bin"))  # the same tokens
    assert call(given) == 0
    write_shard(renamed, np.arange(5000, dtype=np.uint16) % 500)
    assert call(given) == 2
    line = capsys.readouterr().err
    assert f"the training tokens in {data} changed since the run in {tmp_path}/o/seed=1" in line
    assert len(trainer.calls) == 2


def test_runs_with_another_version_of_a_plugin_are_refused(call, trainer, tmp_path, capsys):
    idea = tmp_path / "idea.py"
    idea.write_text("import gpt2\n@gpt2.register('mlp', 'mine')\ndef mine(x):\n    return x\n")
    try:
        for _ in range(2):
            assert call(f"--plugin={idea}", "--mlp=mine") == 0
        idea.write_text(idea.read_text() + "# better\n")
        assert call(f"--plugin={idea}", "--mlp=mine") == 2
    finally:
        forget()
    assert f"{idea} changed since the run in {tmp_path}/o/seed=1 began" in capsys.readouterr().err
    assert len(trainer.calls) == 2


GAVE_UP = {"step": 3, "diverged_since": 1}
NAN = {"step": 4, "nonfinite": ["val_loss"], "val_tokens": 7}


@pytest.mark.parametrize("code", [0, 2], ids=["version 0.2", "now"])
@pytest.mark.parametrize(("left", "why"), [
    (NAN, "validation loss NaN at step 4"), (GAVE_UP, "loss or gradient NaN since step 1")
])  # fmt: skip
def test_a_run_that_diverges_is_a_result(left, why, code, call, trainer, capsys):
    """It was a traceback, also of each later call."""
    trainer.diverge, trainer.code_of_nan = {"seed=1": left}, code
    assert call() == 0
    said = capsys.readouterr().out
    assert f"seed=1: diverged: {why} (1 of 2)" in said
    assert "seed=2: validation loss 3.2000 after 4 steps (2 of 2)" in said
    for _ in range(2):
        assert f"seed=1 is left out: diverged ({why})" in said
        assert "One recipe: there is nothing to compare it with (1 seed)" in said
        assert call() == 0
        said = capsys.readouterr().out
        assert "2 of 2 runs are finished already" in said
    assert len(trainer.calls) == 2


def test_a_sweep_whose_runs_all_diverge_has_no_result(call, trainer, capsys):
    trainer.diverge = {"seed=1": NAN, "seed=2": NAN}
    assert [call(), call()] == [1, 1]
    assert "There is nothing to compare." in capsys.readouterr().out


def test_nan_on_the_way_is_no_end(call, trainer, capsys):
    trainer.diverge = {"seed=1": NAN | {"step": 2}}
    assert call() == 1
    assert "seed=1: failed with exit code 2: it said nothing (0 of 2)" in capsys.readouterr().out
    trainer.diverge.clear()
    assert call() == 0
    assert len(trainer.calls) == 3


def test_equal_tokens_are_so_for_every_batch(call, trainer, tmp_path):
    assert call("--seeds=1", "--set", "grad_accum_steps=2,4,3") == 0
    steps = [argv[-2] for argv in trainer.calls]
    assert steps[0].startswith("--out_dir=") or steps == [f"--max_steps={n}" for n in (4, 2, 3)]
    assert [a for argv in trainer.calls for a in argv[-2:-1]] == [
        f"--max_steps={n}" for n in (4, 2, 3)
    ]
    shutil.rmtree(tmp_path / "o")
    assert call("--seeds=1", "--tokens=1000") == 0
    assert trainer.calls[-1][-2] == "--max_steps=8"  # of 128 tokens


def test_steps_that_are_swept_stay(call, trainer):
    assert call("--seeds=1", "--set", "max_steps=3,5", "--set", "batch_size=1,2") == 0
    assert {parse(TrainConfig, a[3:], "x").optim.max_steps for a in trainer.calls} == {3, 5}


@pytest.mark.parametrize(
    ("swept", "measurements"),
    [("learning_rate=1e-3,2e-3", 1), ("schedule=cosine,wsd", 1), ("n_layer=1,2", 2)],
)
def test_equal_seconds_are_measured_once_for_each_speed(swept, measurements, call, trainer):
    """Recipes whose steps take equally long get equal numbers of steps."""
    given = ("--seconds=9", "--set", swept)
    assert call(*given) == 0
    measured = [argv for argv in trainer.calls if "gpt2.train.time_budget" in argv]
    assert [argv[2] for argv in measured] == ["9.0"] * measurements
    trained = [argv for argv in trainer.calls if "train" in argv]
    assert {argv[-3:-1] == ["--max_steps=50", "--max_seconds=9.0"] for argv in trained} == {True}
    assert len(trained) == 4
    trainer.steps = 60  # a measurement that would make it another run
    assert call(*given) == 0
    assert len(trainer.calls) == 4 + measurements


def test_a_recipe_that_has_changed_is_measured_again(call, trainer, recipe, tmp_path):
    for layers, measurements in (1, 1), (2, 2), (2, 2):
        recipe.write_text(re.sub("n_layer = .*", f"n_layer = {layers}", recipe.read_text()))
        assert call("--seconds=9") == 0
        calls = [argv for argv in trainer.calls if "gpt2.train.time_budget" in argv]
        assert len(calls) == measurements
        for seed in (1, 2):
            shutil.rmtree(tmp_path / f"o/seed={seed}")


def test_a_budget_that_lacks_something_is_measured_again(call, trainer, tmp_path):
    (tmp_path / "o").mkdir()
    kept = {"a": 3, "b": {"asked": 5}, "c": {"asked": {}, "max_steps": "x"}, "seed": {}}
    kept["d"] = {"asked": [9.0], "max_steps": 5}  # of an earlier version
    (tmp_path / "o/budgets.json").write_text(json.dumps(kept))
    assert call("--seconds=9") == 0
    assert len([argv for argv in trainer.calls if "gpt2.train.time_budget" in argv]) == 1


def test_steps_are_measured(data_dir, capsys):
    argv = ["0.02", *SMALL, "--device=cpu", f"--data_dir={data_dir}"]
    assert time_budget.main(argv) == 0
    steps = json.loads(capsys.readouterr().out.splitlines()[-1])["max_steps"]
    assert steps >= 1
    assert time_budget.main([argv[0], "--data_dir=/nowhere"]) == 2


def test_mistakes_are_one_line(call, trainer, recipe, capsys):
    for argv, said in (
        ([], "name the recipe first"),
        (["--seeds=1"], "name the recipe first"),
        ([f"{recipe}x"], f"{recipe}x: No such file"),
        ([str(recipe), "--seedz=1"], "unknown option --seedz; did you mean --seed?"),
        ([str(recipe), "--devices=gpu"], "device=gpu: use auto, cpu, cuda, cuda:1 or mps"),
    ):
        assert cli.main(["sweep", *argv]) == 2
        line = capsys.readouterr().err
        assert said in line, line
        assert line.count("\n") == 1
    assert trainer.calls == []


@pytest.mark.parametrize(("swept", "more", "said"), [
    ("data_dir={data};none", [], "no data folder none; make one with"),
    ("data_dir={data};{data}:1,none:1", [], "no data folder none; make one with"),
    ("init={model};nope.pt", [], "nope.pt: no such checkpoint"),
    ("init=openai-community/gpt2,nope", [], "nope: no such file or folder here; models of"),
    ("hellaswag=hub,nope.jsonl", ["--eval_hellaswag_every=2"], "nope.jsonl: No such file"),
])  # fmt: skip
@pytest.mark.parametrize("budget", [[], ["--seconds=9"]])
def test_what_a_run_lacks_is_said_before_the_first_run(
    swept, more, said, budget, call, trainer, data_dir, tmp_path, capsys
):
    (tmp_path / "model.pt").write_text("")
    swept = swept.format(data=data_dir, model=tmp_path / "model.pt")
    assert call("--set", swept, *more, *budget) == 2
    assert said in capsys.readouterr().err
    assert trainer.calls == []


def test_a_run_needs_its_weights_and_data_no_longer_than_it_reads_them(
    call, trainer, data_dir, tmp_path, capsys
):
    model, data = tmp_path / "model.pt", tmp_path / "data"
    model.write_text("")
    shutil.copytree(data_dir, data)
    argv = [f"--init={model}", f"--data_dir={data}", "--block_size=32"]
    assert call(*argv) == 0
    (tmp_path / "o/seed=1/out_ckpt.pt").unlink()  # it is to go on
    model.unlink()
    assert call(*argv) == 2
    assert "model.pt: no such checkpoint" in capsys.readouterr().err
    (tmp_path / "o/seed=1/state/step_00000002").mkdir(parents=True)
    assert call(*argv) == 0
    shutil.rmtree(data)
    assert call(*argv) == 0


def test_a_signal_ends_the_sweep_and_the_same_command_goes_on(call, trainer, monkeypatch, capsys):
    real = Trainer.__call__

    def interrupted(self, arguments, output):
        signal.raise_signal(signal.SIGINT)
        return real(self, arguments, output)

    at_once = SimpleNamespace(Thread=_Now)  # signals come to the main thread
    monkeypatch.setattr("gpt2.commands.on_devices.threading", at_once)
    monkeypatch.setattr(Trainer, "__call__", interrupted)
    monkeypatch.setattr(sweep._Processes, "stop", _stop)
    assert call() == 130
    assert "run it again to go on" in capsys.readouterr().out
    monkeypatch.setattr(Trainer, "__call__", real)
    assert call() == 0


def _stop(processes, number):
    processes.signal = number


def test_an_error_of_the_sweep_leaves_no_run_behind():
    processes, codes = sweep._Processes(), []
    wait = ["-c", "import time; time.sleep(600)"]
    thread = threading.Thread(target=lambda: codes.append(processes.call(wait, None)))
    with pytest.raises(UserError, match="a log"), processes.ended():  # noqa: PT012
        thread.start()
        while not processes._running:
            time.sleep(0.01)
        raise UserError("a log that cannot be written")
    thread.join(60)
    assert codes[0] != 0
    assert processes.call(wait, None) == 128 + signal.SIGTERM


class _Now:
    def __init__(self, target, args, daemon):
        self.start = lambda: target(*args)


def test_jobs_of_several_devices(tmp_path):
    def work(job, device, results):
        if job == "bad":
            raise ValueError(device)
        time.sleep(0.01)
        results.put((job, device))

    found = list(on_devices(range(6), ["a", "b"], work))
    assert sorted(job for job, _ in found) == [*range(6)]
    assert {device for _, device in found} == {"a", "b"}
    with pytest.raises(ValueError, match="a"):
        list(on_devices([1, "bad", 2], ["a"], work))


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
@pytest.mark.parametrize("name", ["seed=1", "seed=1.log", "measure.log"])
def test_a_link_in_the_folder_is_not_written_through(call, trainer, tmp_path, capsys, name):
    folder, mine = tmp_path / "o", tmp_path / "mine"
    folder.mkdir()
    mine.mkdir() if name == "seed=1" else mine.write_text("mine")
    (folder / name).symlink_to(mine)
    assert call("--seconds=1") == 2
    assert f"{name} is a symbolic link" in capsys.readouterr().err
    assert not trainer.calls
    assert not [*mine.iterdir()] if mine.is_dir() else mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["seed=1.log", "measure.log"])
def test_a_log_that_cannot_be_written_is_one_line(call, trainer, tmp_path, capsys, name):
    (tmp_path / "o" / name).mkdir(parents=True)
    assert call("--seconds=1") == 2
    assert f"{name}: " in capsys.readouterr().err.splitlines()[-1]


def test_budgets_that_cannot_be_written_are_one_line(call, trainer, tmp_path, capsys):
    (tmp_path / "o" / "budgets.json").mkdir(parents=True)
    assert call("--seconds=1") == 2
    assert "budgets.json: " in capsys.readouterr().err.splitlines()[-1]
