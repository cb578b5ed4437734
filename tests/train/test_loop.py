"""The loop: golden losses, exact resume, accumulation, faults, early stop."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.checkpoint import model_file, training_state
from gpt2.checkpoint import weights as weights_module
from gpt2.cli import main
from gpt2.config.command_line import parse
from gpt2.config.options import flatten
from gpt2.config.train import BatchPlan, TrainConfig
from gpt2.data import loader
from gpt2.data.shards import open_shard, write_shard
from gpt2.distributed import devices, fsdp, runtime
from gpt2.errors import UserError
from gpt2.evaluate import loss as loss_module
from gpt2.files import locked
from gpt2.report import metrics as metrics_module
from gpt2.report.compare import find_groups
from gpt2.report.runs import find_runs
from gpt2.train import loop, resume, run_folder, save, setup, validation
from gpt2.train import step as step_module
from gpt2.train.messages import out_of_memory

from ..conftest import ROOT, TINY

FP16 = ["--dtype=float16", "--batch_size=1"]  # slow on a CPU: half of TINY's batch
GOLDEN = ROOT / "tests" / "golden_losses.json"


def config(data_dir, out_dir, *arguments) -> TrainConfig:
    argv = [f"--data_dir={data_dir}", f"--out_dir={out_dir}", *TINY, *arguments]
    return parse(TrainConfig, argv, "gpt2 train")


def metrics(out_dir, name="loss") -> dict[int, float]:
    rows = metrics_module.read_metrics(Path(out_dir) / "metrics.jsonl")
    return {row["step"]: row[name] for row in rows if name in row}


def weights(path) -> dict[str, torch.Tensor]:
    return model_file.load_model(path)[1]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def processor() -> str:
    """What a matmul library may choose its code by."""
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists():
        return platform.processor()
    first = dict(
        re.findall(r"^([^\t\n]+)\t*: (.*)$", cpu.read_text().split("\n\n")[0], re.MULTILINE)
    )
    told = [first.get(key) for key in ("vendor_id", "cpu family", "model", "cache size", "flags")]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def test_twenty_steps_are_what_they_were(tmp_path):
    """A refactor keeps every bit; another model of CPU or torch keeps four digits.

    Delete tests/golden_losses.json and run this twice to make a new one.
    """
    number = np.arange(20_000)
    tokens = ((number * number * 31 + number * 17) % 997).astype(np.uint16)  # the same anywhere
    write_shard(tmp_path / "n_train_000001.bin", tokens[1000:])
    write_shard(tmp_path / "n_val_000000.bin", tokens[:1000])
    assert loop.run(config(tmp_path, tmp_path, "--max_steps=20", "--batch_size=4")) == 0
    losses = list(metrics(tmp_path).values())
    machine = [torch.__version__, processor()]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps({"machine": machine, "losses": losses}, indent=1) + "\n")
        pytest.fail("wrote a new golden file")
    golden = json.loads(GOLDEN.read_text())
    if golden["machine"] == machine:
        assert losses == golden["losses"]
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-4)


def test_loss_falls_and_files_appear(data_dir, tmp_path, capsys):
    arguments = ["--max_steps=30", "--eval_every=10", "--save_every=10", "--keep_last=2"]
    arguments += ["--learning_rate=4e-3"]
    assert loop.run(config(data_dir, tmp_path, *arguments, "--batch_size=4")) == 0
    losses = metrics(tmp_path)
    assert list(losses) == list(range(1, 31))
    assert losses[30] < losses[1] - 0.5  # a tenth of an epoch
    assert list(metrics(tmp_path, "val_loss")) == [10, 20, 30]
    states = [p.name for p in training_state.state_folders(tmp_path)]
    assert states == ["step_00000020", "step_00000030"]
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    names = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "seconds", "tokens"}
    assert set(row) == names  # no mfu and no peak_gib on a CPU
    assert row["tokens"] == 4 * 32 * 2
    out = capsys.readouterr().out
    assert "256 tokens per step = batch_size 4 × block_size 32 × grad_accum_steps 2 × 1 rank" in out
    assert "validation on 500 tokens" in out
    assert re.search(r"fresh weights should give 6\.24.*: as expected\n", out)
    settings = parse(TrainConfig, [f"--config={tmp_path}/config.toml"], "gpt2 train")
    assert settings.optim.max_steps == 30


def test_checkpoint_is_what_the_documentation_says(gpt2_data_dir, tmp_path):
    loop.run(config(gpt2_data_dir, tmp_path, "--max_steps=2"))
    content = torch.load(tmp_path / "out_ckpt.pt", weights_only=True)
    assert set(content) == {"model", "config", "step", "val_loss", "format"}
    assert content["step"] == 2
    assert content["val_loss"] == pytest.approx(metrics(tmp_path, "val_loss")[2])
    assert content["config"]["n_embd"] == 32
    assert "transformer.wte.weight" in content["model"]
    assert content["model"]["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)
    assert content["model"]["transformer.wte.weight"].shape == (50257, 32)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max_steps=12"],
        ["--max_steps=12", "--dropout=0.2"],
        ["--max_steps=7", "--loss=sampled_softmax+second"],
        ["--max_steps=7", *FP16],
        ["--max_steps=7", *FP16, "--optimizer=normuon"],
    ],
)
@pytest.mark.fault(23, "5 + 7 steps instead of 12, with dropout, in fp16")
def test_interrupted_run_gives_the_same_bits(data_dir, tmp_path, arguments):
    """12 steps in one go, and 5 + 7 with everything forgotten in between."""
    arguments = [*arguments, "--save_every=5", "--warmup_steps=3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.run(config(data_dir, whole, *arguments))
    shutil.copytree(whole, parts)
    for folder in training_state.state_folders(parts)[1:]:  # as if killed after step 5
        shutil.rmtree(folder)
    torch.manual_seed(99)
    assert loop.run(config(data_dir, parts, *arguments)) == 0
    assert same(weights(whole / "out_ckpt.pt"), weights(parts / "out_ckpt.pt"))
    assert metrics(whole) == metrics(parts)
    assert metrics(whole, "val_loss") == metrics(parts, "val_loss")


@pytest.mark.parametrize("forgotten", ["position", "optimizer", "rng", "scaler"])
@pytest.mark.fault(23, "without position, optimizer state, random state, scale: other bits")
def test_each_part_of_a_checkpoint_matters(data_dir, tmp_path, forgotten, monkeypatch):
    """What makes the test above able to fail: without this part the bits differ."""
    arguments = ["--max_steps=8", "--save_every=4", "--dropout=0.1"]
    if forgotten == "scaler":
        arguments += FP16
        monkeypatch.setattr(
            torch.amp.GradScaler, "state_dict", _lowered(torch.amp.GradScaler.state_dict)
        )
    loop.run(config(data_dir, tmp_path, *arguments))
    whole = weights(tmp_path / "out_ckpt.pt")
    path = training_state.state_folders(tmp_path)[0]
    found = training_state.load_state(path)
    if forgotten == "position":
        found.state["position"] = 0
    elif forgotten == "optimizer":
        for state in found.state["optimizer"]["state"].values():
            state["exp_avg"].zero_()
    elif forgotten == "rng":
        found.state["rng"] = []
    monkeypatch.setattr(loop, "find_checkpoint", lambda *_: found)
    monkeypatch.setattr(metrics_module, "open_run", _no_log)
    (tmp_path / "again").mkdir()
    loop.run(config(data_dir, tmp_path / "again", *arguments))
    assert not same(whole, weights(tmp_path / "again/out_ckpt.pt"))


def _lowered(original):
    return lambda self: original(self) | {"scale": 2.0**-12}


def _no_log(*_, **__):
    import contextlib

    return contextlib.nullcontext(metrics_module.RunLog())


def test_same_command_on_a_finished_run_changes_nothing(data_dir, tmp_path, capsys):
    c = config(data_dir, tmp_path, "--max_steps=3")
    loop.run(c)
    before = (tmp_path / "metrics.jsonl").read_text(), weights(tmp_path / "out_ckpt.pt")
    assert loop.run(c) == 0
    assert (tmp_path / "metrics.jsonl").read_text() == before[0]
    assert same(weights(tmp_path / "out_ckpt.pt"), before[1])
    assert "finished at step 3" in capsys.readouterr().out


def test_longer_run_continues_a_finished_one(data_dir, tmp_path, capsys):
    loop.run(config(data_dir, tmp_path, "--max_steps=3"))
    loop.run(config(data_dir, tmp_path, "--max_steps=5"))
    assert list(metrics(tmp_path)) == [1, 2, 3, 4, 5]
    assert "changed since then: max_steps 3 -> 5" in capsys.readouterr().out


def test_another_number_of_tokens_a_step_is_told(data_dir, tmp_path, capsys):
    """It changes with the number of ranks, too, where no option does."""
    loop.run(config(data_dir, tmp_path, "--max_steps=1", "--grad_accum_steps=2"))
    loop.run(config(data_dir, tmp_path, "--max_steps=2", "--grad_accum_steps=4"))
    tokens = 2 * 2 * 32
    assert (
        f"changed since then: tokens per step {tokens} -> {2 * tokens}" in capsys.readouterr().out
    )
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").open()]
    assert lines[-1]["changed"]["tokens per step"] == [tokens, 2 * tokens]


def test_windows_of_no_layer_of_an_earlier_version_go_on(data_dir, tmp_path, monkeypatch):
    windows = ["--window_pattern=LLS", "--window=8", "--max_steps=1"]
    monkeypatch.setattr(resume, "check_windows", lambda _: None)
    loop.run(config(data_dir, tmp_path, *windows))
    monkeypatch.undo()
    assert loop.run(config(data_dir, tmp_path, *windows, "--max_steps=2")) == 0


def test_an_option_that_was_renamed_since_then_has_not_changed(
    data_dir, tmp_path, capsys, monkeypatch
):
    def earlier(config):
        settings = flatten(config)
        return settings | {"window_start": settings.pop("sequence_start")}

    monkeypatch.setattr("gpt2.train.save.flatten", earlier)
    loop.run(config(data_dir, tmp_path, "--max_steps=2"))
    monkeypatch.undo()
    loop.run(config(data_dir, tmp_path, "--max_steps=3"))
    out = capsys.readouterr().out
    assert "changed since then: max_steps 2 -> 3" in out
    assert "sequence_start" not in out


def test_resume_never_keeps_the_old_run_aside(data_dir, tmp_path):
    loop.run(config(data_dir, tmp_path, "--max_steps=3"))
    old = weights(tmp_path / "out_ckpt.pt")
    (tmp_path / "mean.pt").touch()
    loop.run(config(data_dir, tmp_path, "--max_steps=2", "--resume=never", "--seed=5"))
    assert list(metrics(tmp_path)) == [1, 2]
    assert (tmp_path / "archive_1/mean.pt").exists()
    assert not (tmp_path / "mean.pt").exists()
    assert same(weights(tmp_path / "archive_1/out_ckpt.pt"), old)
    assert (tmp_path / "archive_1/state/step_00000003/manifest.json").exists()


def test_a_mean_over_states_that_a_run_goes_back_behind_is_moved(tmp_path):
    (tmp_path / "state/step_00000003").mkdir(parents=True)
    for name in ("mean.pt", "metrics.jsonl"):
        (tmp_path / name).touch()
    assert run_folder.archive(tmp_path, 3, going_back=True) is None
    assert (tmp_path / "mean.pt").exists()
    folder = run_folder.archive(tmp_path, 2, going_back=True)
    assert sorted(p.name for p in folder.iterdir()) == ["mean.pt", "metrics.jsonl", "state"]
    assert not (tmp_path / "mean.pt").exists()


def test_resume_from_a_named_state(data_dir, tmp_path):
    arguments = ["--max_steps=6", "--save_every=2", "--keep_last=9"]
    loop.run(config(data_dir, tmp_path / "a", *arguments))
    path = tmp_path / "a/state/step_00000002"
    loop.run(config(data_dir, tmp_path / "b", *arguments, f"--resume={path}"))
    assert list(metrics(tmp_path / "b")) == [3, 4, 5, 6]
    assert same(weights(tmp_path / "a/out_ckpt.pt"), weights(tmp_path / "b/out_ckpt.pt"))


@pytest.mark.fault(5, "one bit of the newest weights, before a resume")
def test_damaged_checkpoint_falls_back_to_the_one_before(data_dir, tmp_path, capsys):
    arguments = ["--max_steps=6", "--save_every=2"]
    loop.run(config(data_dir, tmp_path, *arguments))
    whole = weights(tmp_path / "out_ckpt.pt")
    newest = tmp_path / "state/step_00000006/model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1  # one bit, which no file format notices
    newest.write_bytes(data)
    loop.run(config(data_dir, tmp_path, *arguments))
    assert "sha256" in capsys.readouterr().err
    assert same(weights(tmp_path / "out_ckpt.pt"), whole)


@pytest.mark.fault(7, "every train_state.pt emptied")
def test_all_checkpoints_damaged_is_an_error(data_dir, tmp_path):
    loop.run(config(data_dir, tmp_path, "--max_steps=4", "--save_every=2"))
    for path in tmp_path.glob("state/*/train_state.pt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged"):
        loop.run(config(data_dir, tmp_path, "--max_steps=4"))


@pytest.mark.fault(8, "n_embd of another run")
def test_checkpoint_of_another_network(data_dir, tmp_path):
    loop.run(config(data_dir, tmp_path, "--max_steps=1"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="n_embd 64 instead of 32"):
        loop.run(config(data_dir, tmp_path, "--max_steps=1", "--n_embd=64"))
    assert sorted(tmp_path.rglob("*")) == before


def test_two_micro_batches_equal_one_of_twice_the_size(data_dir, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    loop.run(config(data_dir, a, "--max_steps=5"))
    loop.run(config(data_dir, b, "--max_steps=5", "--batch_size=4", "--grad_accum_steps=1"))
    for step, loss in metrics(a).items():
        assert metrics(b)[step] == pytest.approx(loss, abs=2e-6)
    other = weights(b / "out_ckpt.pt")
    for name, tensor in weights(a / "out_ckpt.pt").items():
        torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=0)


@pytest.mark.fault(22, "NaN in one gradient, twice")
def test_not_finite_gradient_is_skipped(data_dir, tmp_path, monkeypatch):
    """One bad step changes no weight; the next good one does."""
    seen = []
    original = fsdp.gradient_norm

    def poisoned(parameters):
        parameters = list(parameters)
        if len(seen) in (2, 3):
            parameters[0].grad[0, 0] = math.nan
        seen.append(parameters[0].detach().clone())
        return original(parameters)

    monkeypatch.setattr(fsdp, "gradient_norm", poisoned)
    loop.run(config(data_dir, tmp_path, "--max_steps=6"))
    assert torch.equal(seen[2], seen[3])
    assert torch.equal(seen[3], seen[4])
    assert not torch.equal(seen[4], seen[5])
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "out_ckpt.pt").values())
    rows = metrics_module.read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if "nonfinite" in r] == [3, 4]


@pytest.mark.fault(22, "infinity without end")
def test_endless_nan_ends_the_run_and_keeps_the_checkpoint(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_SKIPPED_STEPS", 3)
    original = fsdp.gradient_norm
    calls = []

    def poisoned(parameters):
        calls.append(1)
        norm = original(parameters)
        return norm * math.inf if len(calls) > 4 else norm

    seen, original_batches = [], step_module.next_batches
    monkeypatch.setattr(
        step_module, "next_batches", lambda *a: seen.append(original_batches(*a)) or seen[-1]
    )
    monkeypatch.setattr(fsdp, "gradient_norm", poisoned)
    with pytest.raises(UserError, match=r"3 steps in a row, up to step 7, which read .*bin from"):
        loop.run(config(data_dir, tmp_path, "--max_steps=20", "--save_every=4"))
    windows = json.loads((tmp_path / "nonfinite.json").read_text())["windows"]
    read = [open_shard(Path(w["shard"])).read(w["first_token"], w["tokens"]) for w in windows]
    assert len(read) == 4
    expected = np.concatenate([torch.cat([x, y[:, -1:]], 1).numpy() for x, y in seen[6]])
    assert sorted(map(bytes, np.array(read, np.int64))) == sorted(map(bytes, expected))
    assert [p.name for p in training_state.state_folders(tmp_path)] == ["step_00000004"]


@pytest.mark.fault(3, "ENOSPC in the middle of a save")
def test_full_disk_does_not_end_the_run(data_dir, tmp_path, monkeypatch, capsys):
    original = training_state.save_file

    def full(tensors, path):
        if "step_00000002" in str(path):
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(training_state, "save_file", full)
    assert loop.run(config(data_dir, tmp_path, "--max_steps=4", "--save_every=2")) == 0
    assert "not written: the disk is full" in capsys.readouterr().err
    assert [p.name for p in training_state.state_folders(tmp_path)] == ["step_00000004"]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.fault(3, "ENOSPC in the last save")
def test_full_disk_at_the_last_save_is_an_error(data_dir, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_state, "save_file", full)
    with pytest.raises(UserError, match=r"disk is full.*; the model without it is in .*out_ckpt"):
        loop.run(config(data_dir, tmp_path, "--max_steps=2"))
    expected = tmp_path / "expected"
    monkeypatch.undo()
    loop.run(config(data_dir, expected, "--max_steps=2"))
    assert same(weights(tmp_path / "out_ckpt.pt"), weights(expected / "out_ckpt.pt"))


def test_full_disk_for_the_last_checkpoint_and_the_model_tells_both(
    data_dir, tmp_path, monkeypatch
):
    def full(path, *_, **__):
        raise UserError(f"{path} not written: the disk is full")

    monkeypatch.setattr("gpt2.train.save.write_state", full)
    monkeypatch.setattr("gpt2.train.save.write_model", full)
    with pytest.raises(UserError, match=r"full; .*out_ckpt\.pt not written: the disk is full$"):
        loop.run(config(data_dir, tmp_path, "--max_steps=2"))
    assert not (tmp_path / "best_ckpt.pt").exists()  # which would have taken the room


def test_save_comes_before_evaluation(data_dir, tmp_path, monkeypatch):
    def crash(*_):
        raise RuntimeError("evaluation crashed")

    monkeypatch.setattr(validation, "evaluate", crash)
    with pytest.raises(RuntimeError, match="evaluation crashed"):
        loop.run(config(data_dir, tmp_path, "--max_steps=2"))
    assert training_state.load_state(tmp_path / "state/step_00000002").step == 2


def test_early_stop_and_best_model(data_dir, tmp_path, monkeypatch, capsys):
    results = iter([5.0, 4.0, 4.5, 4.2, 4.1, 3.0])
    original = loss_module.evaluate

    def scripted(model, batches, rt, tokenizer):
        found = original(model, batches, rt)
        return type(found)(next(results) * found.tokens, found.tokens, found.text_bytes)

    monkeypatch.setattr(validation, "evaluate", scripted)
    arguments = ["--max_steps=20", "--eval_every=2", "--early_stop_evals=3", "--save_every=0"]
    assert loop.run(config(data_dir, tmp_path, *arguments)) == 0
    assert list(metrics(tmp_path, "val_loss")) == [2, 4, 6, 8, 10]
    assert "no gain in 3 evaluations: stopping early" in capsys.readouterr().out
    _, _, rest = model_file.load_model(tmp_path / "best_ckpt.pt")
    assert (rest["step"], rest["val_loss"]) == (4, pytest.approx(4.0))
    assert model_file.load_model(tmp_path / "out_ckpt.pt")[2]["step"] == 10
    assert [p.name for p in training_state.state_folders(tmp_path)] == ["step_00000010"]


def test_a_process_that_ends_while_the_best_model_is_written_does_not_lose_it(
    data_dir, tmp_path, monkeypatch
):
    """Its loss is in the log already, and no later evaluation may be as good."""
    arguments = ["--eval_every=2", "--save_every=2", "--ema_steps=10"]
    written = save.write_model

    def killed(path, shape, state, step, *more, **given):
        if path.name != "best_ckpt.pt" or step == 2:
            written(path, shape, state, step, *more, **given)

    with monkeypatch.context() as patch:
        patch.setattr(save, "write_model", killed)
        loop.run(config(data_dir, tmp_path, *arguments, "--max_steps=6"))
    best = tmp_path / "best_ckpt.pt"
    assert min(metrics(tmp_path, "val_loss").items(), key=lambda found: found[1])[0] == 6
    assert model_file.load_model(best)[2]["step"] == 2
    loop.run(config(data_dir, tmp_path, *arguments, "--max_steps=6"))
    rest = model_file.load_model(best)[2]
    assert (rest["step"], rest["val_loss"]) == (6, metrics(tmp_path, "val_loss")[6])
    assert same(weights(best), weights(tmp_path / "out_ckpt.pt"))


def test_a_checkpoint_between_two_lines_of_the_log_knows_its_seconds(data_dir, tmp_path):
    loop.run(config(data_dir, tmp_path, "--max_steps=4", "--save_every=1", "--log_every=4"))
    states = [training_state.load_state(f).state for f in training_state.state_folders(tmp_path)]
    seconds = [state["seconds"] for state in states]
    assert seconds == sorted(set(seconds))
    assert seconds[-1] == metrics(tmp_path, "seconds")[4]
    assert all(0 < state["first_steps"] <= seconds[0] for state in states)


def test_fewer_validation_tokens_than_asked_for(data_dir, tmp_path, capsys):
    loop.run(config(data_dir, tmp_path, "--max_steps=1", "--eval_tokens=1000000"))
    out = capsys.readouterr().out
    assert "validation on 3,999 tokens (all there are; 1,000,000 were asked for)" in out


def test_a_run_whose_time_is_up_evaluates_saves_and_stays_finished(data_dir, tmp_path, capsys):
    arguments = ["--max_steps=10000", "--max_seconds=0.3", "--eval_every=0", "--save_every=0"]
    assert loop.run(config(data_dir, tmp_path, *arguments)) == 0
    last = max(metrics(tmp_path))
    assert 3 <= last < 10_000
    assert [*metrics(tmp_path, "val_loss")] == [last]
    assert metrics(tmp_path, "counted_seconds")[last] > 0
    assert [s.name for s in training_state.state_folders(tmp_path)] == [f"step_{last:08}"]
    assert model_file.load_model(tmp_path / "out_ckpt.pt")[2]["step"] == last
    assert f"--max_seconds=0.3 are over after {last:,} of 10,000 steps" in capsys.readouterr().out
    assert find_groups(find_runs([tmp_path])).left_out == []
    assert loop.run(config(data_dir, tmp_path, *arguments)) == 0
    said = capsys.readouterr().out
    assert f"already finished at step {last}" in said
    assert "a larger --max_seconds= continues" in said
    loop.run(config(data_dir, tmp_path, f"--max_steps={last + 1}", "--max_seconds=60"))
    assert max(metrics(tmp_path)) == last + 1


def test_early_stopped_run_stays_stopped(data_dir, tmp_path):
    """Also the third time; and goes on when it is given more patience."""
    arguments = ["--max_steps=12", "--eval_every=2", "--save_every=0", "--learning_rate=0"]
    for _ in range(3):
        loop.run(config(data_dir, tmp_path, *arguments, "--early_stop_evals=2"))
        assert [p.name for p in training_state.state_folders(tmp_path)] == ["step_00000006"]
        assert list(metrics(tmp_path, "val_loss")) == [2, 4, 6]
    loop.run(config(data_dir, tmp_path, *arguments, "--early_stop_evals=3"))
    assert list(metrics(tmp_path, "val_loss")) == [2, 4, 6, 8]


def scripted_losses(monkeypatch, *losses):
    results, original = iter(losses), loss_module.evaluate

    def scripted(model, batches, rt, tokenizer):
        found = original(model, batches, rt)
        return type(found)(next(results) * found.tokens, found.tokens, found.text_bytes)

    monkeypatch.setattr(validation, "evaluate", scripted)


def best(out_dir) -> tuple[int, float]:
    rest = model_file.load_model(out_dir / "best_ckpt.pt")[2]
    return rest["step"], pytest.approx(rest["val_loss"])


def at_step(step, function):
    """For `loop.run(watch=)`: calls a function when that step has been logged."""

    class Watch:
        notice = ""

        def log(self, at, values):
            if at == step and "loss" in values:
                function()

        def close(self, failed):
            pass

    return Watch()


def test_a_run_whose_folder_is_renamed_goes_on_in_a_new_one(data_dir, tmp_path, capsys):
    out, old = tmp_path / "out", tmp_path / "old"
    asked = config(data_dir, out, "--max_steps=6", "--save_every=2", "--eval_every=0")

    assert loop.run(asked, watch=at_step(3, lambda: out.rename(old))) == 0
    assert capsys.readouterr().err.count("out was moved or deleted while this run trains; it ") == 1
    assert list(metrics(old)) == [1, 2, 3]
    assert list(metrics(out)) == [4, 5, 6]
    assert sorted(path.name for path in (out / "state").iterdir())[-1] == "step_00000006"
    for name in ("config.toml", "history.jsonl"):
        assert (out / name).read_text() == (old / name).read_text()
    assert not (out / ".lock").exists()
    assert loop.run(config(data_dir, out, "--max_steps=7")) == 0  # it can be gone on with
    assert list(metrics(out)) == [4, 5, 6, 7]


def test_a_run_whose_folder_another_run_has_taken_ends(data_dir, tmp_path):
    """Nothing of it gets into the other run's folder."""
    out, old = tmp_path / "out", tmp_path / "old"
    asked = config(data_dir, out, "--max_steps=6", "--save_every=2", "--eval_every=0")

    def take():
        while not (out / "out_ckpt.pt").exists():  # the save of step 2 is under way
            time.sleep(0.001)
        out.rename(old)
        held.enter_context(locked(out))
        (out / "mine").touch()

    with contextlib.ExitStack() as held:
        with pytest.raises(UserError, match=r"out was moved or deleted .*now: run folder .*in use"):
            loop.run(asked, watch=at_step(3, take))
        assert sorted(path.name for path in out.iterdir()) == [".lock", "mine"]
    assert loop.run(config(data_dir, old, "--max_steps=6")) == 0
    assert list(metrics(old)) == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_lock_file_alone_is_deleted_goes_on_as_it_was(data_dir, tmp_path, capsys):
    asked = config(data_dir, tmp_path, "--max_steps=4", "--save_every=2", "--eval_every=0")
    written = []

    def delete():
        written.append((tmp_path / "config.toml").stat().st_mtime_ns)
        (tmp_path / ".lock").unlink()

    assert loop.run(asked, watch=at_step(3, delete)) == 0
    assert capsys.readouterr().err == ""
    assert list(metrics(tmp_path)) == [1, 2, 3, 4]
    assert [(tmp_path / "config.toml").stat().st_mtime_ns] == written


@pytest.mark.parametrize("at", ["line", "signal"])
def test_a_run_under_whose_name_a_finished_run_lies_ends(at, data_dir, tmp_path, monkeypatch):
    """Its files stay; also where a signal ends an evaluation, which writes no line."""
    out, old, other = tmp_path / "out", tmp_path / "old", tmp_path / "other"
    assert loop.run(config(data_dir, other, "--max_steps=2", "--seed=7")) == 0
    files = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}

    def exchange():
        while not (out / "out_ckpt.pt").exists():  # the save of step 2 is under way
            time.sleep(0.001)
        out.rename(old)
        other.rename(out)

    watch = None
    if at == "line":
        watch = at_step(3, exchange)
    else:
        original = loss_module.evaluate

        def interrupted(model, batches, rt, tokenizer):
            exchange()
            signal.raise_signal(signal.SIGTERM)
            return original(model, batches, rt, tokenizer)

        monkeypatch.setattr(validation, "evaluate", interrupted)
    asked = config(data_dir, out, "--max_steps=9", "--save_every=2", "--eval_every=3")
    with pytest.raises(UserError, match=r"out was moved or deleted .* the files of another run"):
        loop.run(asked, watch=watch)
    left = {path.relative_to(out): path for path in out.rglob("*") if path.is_file()}
    assert {other / name: path.read_bytes() for name, path in left.items()} == files


def test_only_a_deleted_lock_is_made_again(data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    asked = config(data_dir, out, "--max_steps=4", "--save_every=2", "--eval_every=0")
    assert loop.run(asked, watch=at_step(2, (out / ".lock").unlink)) == 0
    assert "moved" not in capsys.readouterr().err
    assert list(metrics(out)) == [1, 2, 3, 4]


def test_extended_run_remembers_its_last_evaluation(data_dir, tmp_path, monkeypatch):
    scripted_losses(monkeypatch, 4.0, 5.0)
    loop.run(config(data_dir, tmp_path, "--max_steps=3", "--eval_every=0"))
    loop.run(config(data_dir, tmp_path, "--max_steps=5", "--eval_every=0"))
    assert best(tmp_path) == (3, 4.0)


def test_nan_in_validation_is_never_the_best(data_dir, tmp_path, monkeypatch):
    scripted_losses(monkeypatch, 3.0, math.nan, 6.0)
    loop.run(config(data_dir, tmp_path, "--max_steps=6", "--eval_every=2"))
    assert best(tmp_path) == (2, 3.0)


@pytest.mark.fault(18)
def test_signal_during_evaluation_ends_it(data_dir, tmp_path, monkeypatch):
    original = loader.eval_batches

    def interrupted(*args, **kwargs):
        for number, batch in enumerate(original(*args, **kwargs)):
            if number == 3:
                signal.raise_signal(signal.SIGTERM)
            assert number < 12, "evaluation went on"
            yield batch

    monkeypatch.setattr(validation, "eval_batches", interrupted)
    arguments = ["--max_steps=4", "--eval_every=2", "--eval_tokens=3999"]
    assert loop.run(config(data_dir, tmp_path, *arguments)) == 143
    assert [p.name for p in training_state.state_folders(tmp_path)] == ["step_00000002"]
    monkeypatch.undo()
    assert loop.run(config(data_dir, tmp_path, *arguments)) == 0
    assert list(metrics(tmp_path, "val_loss")) == [2, 4]


def test_changed_optimizer_options_take_effect(data_dir, tmp_path):
    plain, other = tmp_path / "plain", tmp_path / "other"
    loop.run(config(data_dir, plain, "--max_steps=3", "--learning_rate=1e-2"))
    shutil.copytree(plain, other)
    longer = ["--max_steps=6", "--learning_rate=1e-2"]
    loop.run(config(data_dir, plain, *longer))
    loop.run(config(data_dir, other, *longer, "--weight_decay=5"))
    assert not same(weights(plain / "out_ckpt.pt"), weights(other / "out_ckpt.pt"))


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float16", "float32")])
def test_run_goes_on_in_another_precision(data_dir, tmp_path, dtypes):
    for steps, dtype in zip((2, 3), dtypes, strict=True):
        arguments = [*FP16, f"--max_steps={steps}", f"--dtype={dtype}"]
        assert loop.run(config(data_dir, tmp_path, *arguments)) == 0


def test_going_back_keeps_a_copy_of_what_it_writes_anew(data_dir, tmp_path):
    arguments = ["--max_steps=6", "--save_every=2", "--keep_last=9"]
    loop.run(config(data_dir, tmp_path, *arguments))
    log = (tmp_path / "metrics.jsonl").read_text()
    path = tmp_path / "state/step_00000002"
    loop.run(config(data_dir, tmp_path, *arguments, f"--resume={path}"))
    assert (tmp_path / "archive_1/metrics.jsonl").read_text() == log
    assert (tmp_path / "archive_1/state/step_00000006/manifest.json").exists()
    assert same(weights(tmp_path / "archive_1/out_ckpt.pt"), weights(tmp_path / "out_ckpt.pt"))


def test_mistake_with_resume_never_moves_nothing(data_dir, tmp_path):
    loop.run(config(data_dir, tmp_path, "--max_steps=2"))
    for wrong in ("--data_dir=/nowhere", "--log_to=wandbb"):
        with pytest.raises(UserError):
            loop.run(config(data_dir, tmp_path, "--max_steps=2", "--resume=never", wrong))
        assert not (tmp_path / "archive_1").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_dir=/nowhere"], "no data folder"),
        ([f"--data_dir={__file__}"], "is a file; --data_dir= names a folder of shards"),
        (["--total_batch_tokens=1000", "--grad_accum_steps=0"], "not a multiple of 64"),
        (["--total_batch_tokens=1000"], "disagrees"),
        (["--block_size=100000"], "too few for one sequence"),
        (["--window_pattern=LLS", "--window=8"], "none of the 2 layers is an S; leave it and"),
        (["--out_dir="], "out_dir is empty; name a folder"),
        (["--device=cuda:7"], "is not there"),
        (["--device=tpu"], "use auto, cpu"),
        (["--resume=/nowhere"], "not a whole checkpoint"),
        (["--log_to=wandbb"], "did you mean"),
    ],
)
def test_mistakes_are_found_before_the_first_step(data_dir, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        loop.run(config(data_dir, tmp_path, *arguments))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_data_are_looked_for_before_weights_are_fetched(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(weights_module, "load", lambda _: pytest.fail("weights were fetched"))
    for data in ("/nowhere", "/nowhere.jsonl")[: 1 + (command == "finetune")]:
        option = "--data=" if command == "finetune" else "--data_dir="
        assert main([command, "--init=gpt2", option + data, f"--out_dir={tmp_path}"]) == 2
        assert data in capsys.readouterr().err


@pytest.mark.fault(4, "a file where the folder should be")
def test_out_dir_that_cannot_be_written(data_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write to out_dir"):
        loop.run(config(data_dir, tmp_path / "file"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "state").write_text("where the checkpoints go")
    with pytest.raises(UserError, match=r"cannot write to out_dir=.*/state: File exists"):
        loop.run(config(data_dir, run))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.fault(14, "one of several shards cut by two bytes")
def test_missing_and_damaged_shards(data_dir, tmp_path, split):
    shutil.copytree(data_dir, tmp_path / "d")
    paths = sorted((tmp_path / "d").glob(f"*_{split}_*"))
    paths[0].write_bytes(paths[0].read_bytes()[:-2])
    with pytest.raises(UserError, match=r"header says .* file holds"):
        loop.run(config(tmp_path / "d", tmp_path / "out"))
    for path in paths:
        path.unlink()
    with pytest.raises(UserError, match=f"holds no .*_{split}_"):
        loop.run(config(tmp_path / "d", tmp_path / "out"))


@pytest.mark.fault(15, "the same while training")
def test_token_outside_the_vocabulary(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "d")
    bad = np.full(1000, 50257, dtype=np.uint16)
    write_shard(tmp_path / "d/text_train_000001.bin", bad)
    with pytest.raises(UserError, match="token 50257 at offset"):
        loop.run(config(tmp_path / "d", tmp_path / "out", "--max_steps=300"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bf16_and_fp16_train_on_a_cpu(data_dir, tmp_path, optimizer):
    for dtype in ("bfloat16", "float16"):
        out, recipe = tmp_path / dtype, [*FP16, f"--dtype={dtype}", f"--optimizer={optimizer}"]
        loop.run(config(data_dir, out, "--max_steps=8", "--learning_rate=4e-3", *recipe))
        losses = metrics(out)
        assert losses[8] < losses[1] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True, "mlp"])
def test_compiled_run_equals_the_plain_one(data_dir, tmp_path, checkpointing):
    if devices.choose_compile("True", torch.device("cpu"))[0] is False:
        pytest.skip(devices.choose_compile("True", torch.device("cpu"))[1])
    for flag in ("True", "False"):
        out = tmp_path / flag
        arguments = ["--max_steps=4", f"--compile_model={flag}"]
        if flag == "True":
            arguments += [f"--activation_checkpointing={checkpointing}"]
        loop.run(config(data_dir, out, *arguments))
    compiled, plain = metrics(tmp_path / "True"), metrics(tmp_path / "False")
    assert compiled == pytest.approx(plain, abs=1e-3)
    names = weights(tmp_path / "True/out_ckpt.pt").keys()
    assert names == weights(tmp_path / "False/out_ckpt.pt").keys()
    raw = torch.load(tmp_path / "True/out_ckpt.pt", weights_only=True)["model"]
    assert not any("_orig_mod" in name for name in raw)


def test_activation_checkpointing_changes_no_bit(data_dir, tmp_path):
    for flag in ("True", "False", "mlp"):
        arguments = ["--max_steps=4", "--eval_every=2", "--dropout=0.1"]
        arguments += [f"--activation_checkpointing={flag}"]
        loop.run(config(data_dir, tmp_path / flag, *arguments))
    plain = weights(tmp_path / "False" / "out_ckpt.pt")
    for flag in ("True", "mlp"):
        assert metrics(tmp_path / flag) == metrics(tmp_path / "False")
        assert same(weights(tmp_path / flag / "out_ckpt.pt"), plain)


@pytest.mark.parametrize(
    ("plan", "advice"),
    [
        (
            BatchPlan(64, 1024, 8, 1),
            "--batch_size=32 --grad_accum_steps=16: the same 524,288 tokens",
        ),
        (BatchPlan(9, 10, 2, 4), "--batch_size=3 --grad_accum_steps=6: the same 720 tokens"),
        (BatchPlan(7, 10, 2, 1), "--batch_size=1 --grad_accum_steps=14: the same 140 tokens"),
        (
            BatchPlan(1, 1024, 8, 1),
            "use --activation_checkpointing=True, or a smaller --block_size= or --size= "
            "(docs/troubleshooting.md#out-of-gpu-memory)",
        ),
    ],
)
def test_memory_advice_keeps_the_tokens_of_a_step(plan, advice):
    assert advice in out_of_memory(plan)
    assert "activation" not in out_of_memory(plan, checkpointing=True)


def test_out_of_memory_is_one_line_of_advice(data_dir, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", full)
    with pytest.raises(UserError, match="use --batch_size=1 --grad_accum_steps=4"):
        loop.run(config(data_dir, tmp_path))


def test_reading_numbers_a_step_late_changes_nothing(data_dir, tmp_path, monkeypatch):
    """As on a GPU: with saving, evaluating and early stopping between."""
    arguments = ["--max_steps=9", "--save_every=4", "--eval_every=3", "--log_every=2"]
    loop.run(config(data_dir, tmp_path / "now", *arguments))
    monkeypatch.setattr(runtime.Runtime, "steps_ahead", 2)
    loop.run(config(data_dir, tmp_path / "late", *arguments))
    timing = {"seconds", "tokens_per_second", "mfu", "time", "peak_gib"}

    def lines(name):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in row.items() if k not in timing} for row in rows]

    assert lines("late") == lines("now")
    for name, tensor in weights(tmp_path / "late" / "out_ckpt.pt").items():
        assert torch.equal(tensor, weights(tmp_path / "now" / "out_ckpt.pt")[name])


def test_signal_while_numbers_are_late_saves_the_last_step(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.Runtime, "steps_ahead", 1)
    step = step_module.train_step

    def interrupted(state, config, rt):
        if state.step == 3:
            rt.stop_signal = signal.SIGTERM
        return step(state, config, rt)

    monkeypatch.setattr(loop, "train_step", interrupted)
    assert loop.run(config(data_dir, tmp_path, "--max_steps=9")) == 143
    assert sorted(metrics(tmp_path)) == [1, 2, 3, 4, 5]  # the fifth had been launched
    assert training_state.find_state(tmp_path, "auto")[0].step == 5


def test_fp8_is_refused_where_it_cannot_be(data_dir, tmp_path):
    with pytest.raises(UserError, match="fp8=head needs --dtype=bfloat16 and a GPU"):
        loop.run(config(data_dir, tmp_path, "--fp8=head", "--device=cpu"))


@pytest.mark.fault(26)
def test_second_run_in_the_same_folder_is_refused(data_dir, tmp_path, monkeypatch):
    """Before it touches anything, such as what looks like leftovers of a crash."""
    half_written = tmp_path / "state/step_00000009.tmp"

    def second(state, config, rt):
        half_written.mkdir(parents=True)
        with pytest.raises(UserError, match=rf"run folder .* is in use by pid {os.getpid()} on"):
            loop.run(c)
        assert half_written.exists()
        monkeypatch.undo()
        return step_module.train_step(state, config, rt)

    c = config(data_dir, tmp_path, "--max_steps=1")
    monkeypatch.setattr(loop, "train_step", second)
    assert loop.run(c) == 0
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
@pytest.mark.fault(18)
def test_signals_save_and_stop_with_their_exit_code(data_dir, tmp_path, monkeypatch, name):
    step = step_module.train_step

    def interrupted(state, config, rt):
        if state.step == 3:
            signal.raise_signal(getattr(signal, name))
        return step(state, config, rt)

    monkeypatch.setattr(loop, "train_step", interrupted)
    code = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138, "SIGHUP": 129}[name]
    assert loop.run(config(data_dir, tmp_path, "--max_steps=9")) == code
    assert training_state.find_state(tmp_path, "auto")[0].step == 4


def test_nohup_goes_on_when_its_terminal_closes(data_dir, tmp_path, monkeypatch):
    step = step_module.train_step

    def interrupted(state, config, rt):
        signal.raise_signal(signal.SIGHUP)
        return step(state, config, rt)

    monkeypatch.setattr(loop, "train_step", interrupted)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert loop.run(config(data_dir, tmp_path, "--max_steps=3")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO], ids=["pipe", "terminal"])
def test_output_that_nobody_reads_any_more_ends_the_run_with_all_saved(
    number, data_dir, tmp_path, monkeypatch, capsys
):
    """As by `gpt2 train … | head`, and where the window of the terminal is closed."""

    class Unread(io.StringIO):
        def write(self, text):
            if text.startswith("step 2/"):
                raise OSError(number, os.strerror(number))
            return super().write(text)

    monkeypatch.setattr("sys.stdout", Unread())
    with pytest.raises(BrokenPipeError):
        loop.run(config(data_dir, tmp_path, "--max_steps=9", "--save_every=0"))
    monkeypatch.undo()
    (found,) = training_state.state_folders(tmp_path)
    step = int(found.name[5:])
    assert 2 <= step < 9
    assert (tmp_path / "out_ckpt.pt").exists()
    assert loop.run(config(data_dir, tmp_path, "--max_steps=9", "--save_every=0")) == 0
    assert f"continuing from {found}" in capsys.readouterr().out


def test_signal_before_the_first_step_ends_without_one(data_dir, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return network(*arguments)

    network = setup.network
    monkeypatch.setattr(setup, "network", interrupted)
    assert loop.run(config(data_dir, tmp_path, "--max_steps=9")) == 143
    assert not (tmp_path / "metrics.jsonl").exists()
    said = capsys.readouterr().out
    assert "stopped before the first step; nothing is saved, the same command begins anew" in said
    assert "continues" not in said
    assert not (tmp_path / "out_ckpt.pt").exists()
