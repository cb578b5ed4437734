"""A text sample at each evaluation, which the run does not notice; lines on the console."""

import functools
import json
import os
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch

from gpt2.config.train import OptimOptions
from gpt2.data.datasets import what_is_missing
from gpt2.errors import UserError
from gpt2.report import metrics as metrics_module
from gpt2.train import loop, messages
from gpt2.train.progress import FIRST_LINES, Progress

from ..conftest import TINY, TORCHRUN, run_python
from .test_loop import config, metrics, same, weights

LONG = "Hello world, " * 30  # more tokens than the context of 32 has


@pytest.mark.parametrize("more", [[], ["--compile_model=True"]], ids=["plain", "compiled"])
def test_samples_come_with_evaluations_and_change_nothing(
    data_dir, tmp_path, capsys, monkeypatch, more
):
    # the graphs that dynamo captures are counted; compiling them takes a minute and tells no more
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    arguments = ["--max_steps=4", "--dropout=0.1", "--eval_every=2", "--n_layer=1", *more]
    prompt = LONG if more else "Hello world,"
    recompiles = []
    for name, asked in (("a", [f"--sample_prompt={prompt}"]), ("b", [])):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert loop.run(config(data_dir, tmp_path / name, *arguments, *asked)) == 0
        recompiles.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert recompiles[0] == recompiles[1]
    for name in ("loss", "grad_norm", "val_loss"):
        assert metrics(tmp_path / "a", name) == metrics(tmp_path / "b", name)
    of_a, of_b = (torch.load(tmp_path / f / "out_ckpt.pt", weights_only=True) for f in "ab")
    assert all(torch.equal(of_a["model"][n], of_b["model"][n]) for n in of_b["model"])
    samples = metrics(tmp_path / "a", "sample")
    assert list(samples) == [2, 4]
    assert all(samples.values())
    assert not metrics(tmp_path / "b", "sample")
    assert f"step 2 | sample: {prompt}" in capsys.readouterr().out


def test_a_sample_that_cannot_be_drawn_does_not_end_a_diverging_run(data_dir, tmp_path, capsys):
    """The run ends by its own rules, and writes what it writes without a sample."""
    wild = ["--learning_rate=1e30", "--warmup_steps=0", "--max_steps=3", "--eval_every=2"]
    ends = {}
    for name, asked in (("a", ["--sample_prompt=def"]), ("b", [])):
        with pytest.raises(UserError, match="the run has diverged"):
            loop.run(config(data_dir, tmp_path / name, *wild, "--n_layer=1", *asked))
        ends[name] = sorted(path.name for path in (tmp_path / name).iterdir())
        found = (tmp_path / name / "metrics.jsonl").read_text("utf-8")
        assert "diverged_since" in found
    assert ends["a"] == ends["b"]
    assert "step 2 | no sample: the network's logits are not finite" in capsys.readouterr().err


def test_two_ranks_write_one_sample_by_both_ways_to_share_a_model(data_dir, tmp_path):
    """They also agree on the end of `--max_seconds=`, although each has a clock."""
    found = []
    for way in ("ddp", "fsdp"):
        argv = [*TORCHRUN, "--nproc_per_node=2", "-m", "gpt2", "train", f"--data_dir={data_dir}"]
        argv += [f"--out_dir={tmp_path / way}", *TINY, "--n_layer=1", "--max_steps=4"]
        argv += ["--learning_rate=0", "--max_seconds=1e-9", f"--parallel={way}"]
        done = run_python(*argv, "--sample_prompt=Hello world,", timeout=120)
        assert done.stdout.count("| sample: Hello world,") == 1
        (step, text), *more = metrics(tmp_path / way, "sample").items()
        assert (step, more) == (3, [])
        found.append(text)
    assert found[0] == found[1] != ""


def test_after_the_first_lines_one_comes_in_some_seconds():
    now = [0.0]
    progress = Progress(clock=lambda: now[0])
    shown = []
    for step in range(100):
        shown += [step] * progress.line_due()
        now[0] += 0.5
    assert shown == [*range(FIRST_LINES), 39, 59, 79, 99]


def test_the_log_keeps_each_step(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gpt2.train.progress.FIRST_LINES", 2)
    monkeypatch.setattr("gpt2.train.progress.STEP_SECONDS", 1000)
    assert loop.run(config(data_dir, tmp_path, "--max_steps=9")) == 0
    lines = re.findall(r"^step +(\d+)/9", capsys.readouterr().out, re.MULTILINE)
    assert lines == ["1", "2", "9"]
    assert list(metrics(tmp_path)) == list(range(1, 10))


def test_the_end_says_what_is_next_and_a_second_start_that_all_is_done(
    data_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(messages, "PLOT_SECONDS", 0)
    assert loop.run(config(data_dir, tmp_path, "--max_steps=2")) == 0
    out = capsys.readouterr().out
    model = tmp_path / "out_ckpt.pt"
    assert f"finished at step 2; the model is {model}" in out
    assert f"curves: {tmp_path / 'loss.png'}" in out
    assert (tmp_path / "loss.png").exists()
    assert f'next: gpt2 plot {tmp_path}, gpt2 sample {model} --prompt="Hello world,"' in out
    (tmp_path / "loss.png").unlink()
    assert loop.run(config(data_dir, tmp_path, "--max_steps=2")) == 0
    out = capsys.readouterr().out
    assert f"already finished at step 2; the model is {model}; a larger --max_steps=" in out
    assert "a step, " not in out
    rows = metrics_module.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert json.dumps(rows)


def test_a_finished_run_keeps_the_record_of_its_options(data_dir, tmp_path):
    """No step is made with others; a larger --max_steps makes some."""
    names = "config.toml", "history.jsonl"
    runs = [config(data_dir, tmp_path, "--max_steps=2", *more) for more in ((), ("--grad_clip=9",))]
    assert loop.run(runs[0]) == 0
    before = [(tmp_path / name).read_text("utf-8") for name in names]
    assert loop.run(runs[1]) == 0
    assert [(tmp_path / name).read_text("utf-8") for name in names] == before
    assert loop.run(config(data_dir, tmp_path, "--max_steps=3", "--grad_clip=9")) == 0
    assert "grad_clip = 9.0" in (tmp_path / names[0]).read_text("utf-8")
    assert '"grad_clip": [1.0, 9.0]' in (tmp_path / names[1]).read_text("utf-8")


def test_a_run_that_goes_on_elsewhere_has_a_record_there(data_dir, tmp_path):
    """Even if no step follows."""
    assert loop.run(config(data_dir, tmp_path / "a", "--max_steps=2")) == 0
    state = tmp_path / "a/state/step_00000002"
    assert loop.run(config(data_dir, tmp_path / "b", "--max_steps=2", f"--resume={state}")) == 0
    assert (tmp_path / "b/config.toml").is_file()
    assert (tmp_path / "b/history.jsonl").is_file()


def test_a_run_that_is_ended_early_says_so(data_dir, tmp_path):
    """At step 2 of 4 with --max_steps=2: that is its record then."""
    longer = ["--save_every=2", "--schedule=wsd"]
    assert loop.run(config(data_dir, tmp_path, "--max_steps=4", *longer)) == 0
    shutil.rmtree(tmp_path / "state/step_00000004")
    (tmp_path / "out_ckpt.pt").unlink()
    assert loop.run(config(data_dir, tmp_path, "--max_steps=2", *longer)) == 0
    assert "max_steps = 2\n" in (tmp_path / "config.toml").read_text("utf-8")


def test_a_finished_run_keeps_its_averaged_model(data_dir, tmp_path):
    averaged = config(data_dir, tmp_path, "--max_steps=10", "--ema_steps=2", "--eval_every=0")
    assert loop.run(averaged) == 0
    before = weights(tmp_path / "out_ckpt.pt")
    assert loop.run(config(data_dir, tmp_path, "--max_steps=10", "--eval_every=0")) == 0
    assert same(weights(tmp_path / "out_ckpt.pt"), before)
    assert "ema_steps = 2\n" in (tmp_path / "config.toml").read_text("utf-8")


def test_a_warm_up_or_an_average_longer_than_the_run_is_warned_of(data_dir, tmp_path, capsys):
    long = "--warmup_steps=5", "--ema_steps=2", "--max_steps=4"
    assert loop.run(config(data_dir, tmp_path / "a", *long)) == 0
    said = capsys.readouterr()
    said = said.out + said.err
    assert "it rises for 5 steps of a run of 4; use --warmup_steps=0" in said
    assert "weights averaged over about 2 steps" in said
    assert "averages over 2 of 4 steps" in said
    assert loop.run(config(data_dir, tmp_path / "b", "--warmup_steps=4", "--max_steps=4")) == 0
    said = capsys.readouterr()
    assert "its peak" not in said.out + said.err
    assert "averaged over" not in said.out + said.err


@pytest.mark.parametrize(("steps", "advice"), [
    (2, "use --ema_steps=0, or leave it out"),
    (24, "use --ema_steps=0, or leave it out"),
    (25, "use --ema_steps=5, 0 for none"),
    (104, "use --ema_steps=20, 0 for none"),
])  # fmt: skip
def test_the_average_that_is_advised_fits_the_run(steps, advice, capsys):
    messages.note_schedule(OptimOptions(max_steps=steps, ema_steps=50))
    assert capsys.readouterr().err.endswith(f"hold weights from long before; {advice}\n")
    advised = int(re.search(r"--ema_steps=(\d+)", advice)[1])
    messages.note_schedule(OptimOptions(max_steps=steps, ema_steps=advised))
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="quotes of a POSIX shell")
def test_what_is_next_can_be_pasted(data_dir, tmp_path, capsys):
    folder = tmp_path / "my run"
    assert loop.run(config(data_dir, folder, "--max_steps=1")) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    plot, sample, evaluate = re.split(r", (?=gpt2 )", said.removeprefix("next: "))
    model = str(folder / "out_ckpt.pt")
    assert shlex.split(plot) == ["gpt2", "plot", str(folder)]
    assert shlex.split(sample) == ["gpt2", "sample", model, "--prompt=Hello world,"]
    assert shlex.split(evaluate) == ["gpt2", "eval", model]


@pytest.mark.parametrize(
    ("have", "asked", "said"),
    [
        ([750, 250], 1000, ""),
        ([1000, 333], 2000, " (all there are; 2,000 were asked for)"),
        (
            [200, 500],
            2000,
            " (all there are of a; 2,000 were asked for)"
            "; a counts 29% of it where the mix has 75%; b counts 71% of it where the mix has 25%",
        ),
        ([1450, 500], 2000, " (all there are of a; 2,000 were asked for)"),
    ],
)
def test_what_a_mix_lacks_in_validation_is_said(have, asked, said):
    datasets = [SimpleNamespace(name=n, share=share) for n, share in (("a", 0.75), ("b", 0.25))]
    assert what_is_missing(datasets, have, asked) == said


def test_a_dataset_that_is_whole_is_not_called_short_for_a_rounded_share():
    datasets = [SimpleNamespace(name=name, share=1 / 3) for name in "abc"]
    said = what_is_missing(datasets, [667, 666, 640], 2000)
    assert said == " (all there are of c; 2,000 were asked for)"
