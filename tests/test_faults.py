"""Faults injected into files, disks, processes and numbers; `tests/faults.py` lists the cases."""

import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from gpt2 import files
from gpt2.api import GPT2
from gpt2.checkpoint import model_file, training_state
from gpt2.cli import main
from gpt2.config.model import GPT2Config
from gpt2.data.shards import write_manifest, write_shard
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.report import metrics as metrics_module
from gpt2.train import loop
from gpt2.train import step as step_module

from .conftest import ROOT, TINY, TORCHRUN, run_python
from .models import reference
from .states import save_state
from .train.test_loop import config, metrics, same, weights

SHAPE = GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50)
FLIPS = 100


def kills(*arguments) -> dict:
    return json.loads(run_python("-m", "tests.kills", *arguments).stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.fault(1, "SIGKILL while the thread of a run saves, 50 times")
def test_fifty_kills_while_saving(tmp_path, record_property):
    found = kills("saving", tmp_path, 50)
    assert found["problems"] == []
    assert found["leftovers"] > 5  # they fell into saves, not between
    assert max(found["steps"]) >= 2
    record_property("survived", f"{found['kills']} of 50 resumable, no announced step lost "
                    f"({found['leftovers']} left half a folder)")  # fmt: skip


@pytest.mark.slow
@pytest.mark.fault(2, "SIGKILL before each file is written, hashed, synced, renamed, deleted")
def test_kill_at_each_operation_of_a_save(tmp_path, record_property):
    found = kills("operations", tmp_path)
    assert found["problems"] == []
    assert found["kills"] >= 12
    assert {place.split()[0] for place in found["places"]} == {
        "save_file", "save", "fingerprint", "sync", "replace", "rmtree",
    }  # fmt: skip
    record_property("survived", f"{found['kills']} of {found['kills']} places")


@pytest.mark.slow
@pytest.mark.fault(1, "SIGKILL of a whole run, 20 times, started again each time")
def test_twenty_kills_while_training_give_the_same_bits(data_dir, tmp_path, record_property):
    found = kills("training", data_dir, tmp_path, 20)
    assert found["equal"]
    assert found["kills"] >= 15
    record_property("survived", f"{found['kills']} kills of runs, final weights equal")


@pytest.mark.fault(3, "RLIMIT_FSIZE of 1 MB while a checkpoint of 19 MB is written")
def test_disk_that_takes_no_more(gpt2_data_dir, tmp_path, monkeypatch, capsys):
    """Real errors of the system in the middle of a file; later there is room again."""
    before, step = resource.getrlimit(resource.RLIMIT_FSIZE), step_module.train_step

    def limited(state, config, rt):
        if state.step in (1, 3):
            state.saver.wait()
            limit = 2**20 if state.step == 1 else before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        return step(state, config, rt)

    monkeypatch.setattr(loop, "train_step", limited)
    try:
        code = loop.run(config(gpt2_data_dir, tmp_path, "--max_steps=4", "--save_every=2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 0
    err = capsys.readouterr().err
    assert "step_00000002 not written: " in err
    assert "(needs 0.02 GiB, " in err
    assert "out_ckpt.pt not written: " in err
    assert [p.name for p in training_state.state_folders(tmp_path)] == ["step_00000004"]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.fixture
def saved(tmp_path):
    """A model, two states of it and its out_ckpt.pt."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64)).backward()
    optimizer.step()
    for step in (1, 2):
        save_state(tmp_path, step, model, {"optimizer": optimizer.state_dict(), "seconds": 1.5}, 2)
    model_file.save_model(tmp_path / "out_ckpt.pt", model, 2, 3.0)
    return model


def flip(path, rng) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.fault(5, "one flipped bit at a random place of any file of a state, 100 times")
def test_one_flipped_bit_in_any_file_of_a_state(saved, tmp_path, record_property):
    rng, folder, noticed = random.Random(5), tmp_path / "state/step_00000002", 0
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["manifest.json", "model.safetensors", "train_state.pt"]
    for number in range(FLIPS):
        path = folder / names[number % 3]
        whole = path.read_bytes()
        flip(path, rng)
        with pytest.raises(UserError, match=r"damaged|not a whole checkpoint"):
            training_state.load_state(folder)
        found, passed_over = training_state.find_state(tmp_path, "auto")
        noticed += found.step == 1 and len(passed_over) == 1
        path.write_bytes(whole)
    assert noticed == FLIPS
    assert training_state.load_state(folder).step == 2
    record_property("survived", f"{noticed} of {FLIPS} in the files of a state")


@pytest.mark.fault(
    5, "one flipped bit in the weights of out_ckpt.pt (not in its zip headers), 100 times"
)
def test_one_flipped_bit_in_the_weights_of_a_model(saved, tmp_path, record_property):
    """torch.load notices none of them."""
    rng, path, noticed = random.Random(6), tmp_path / "out_ckpt.pt", 0
    whole = path.read_bytes()
    tensors = [t.numpy().tobytes() for t in saved.state_dict().values()]
    places = [(whole.index(raw), len(raw)) for raw in tensors if len(raw) >= 64 and any(raw)]
    for _ in range(FLIPS):
        begin, length = rng.choice(places)
        data = bytearray(whole)
        data[begin + rng.randrange(length)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        torch.load(path, weights_only=True)
        with pytest.raises(UserError, match="damaged"):
            model_file.load_model(path)
        noticed += 1
    record_property("survived", f"{noticed} of {FLIPS} in out_ckpt.pt")


@pytest.mark.fault(5, "one flipped bit in a shard, 100 times, by `gpt2 shards verify`")
def test_one_flipped_bit_in_a_shard(tmp_path, capsys, record_property):
    rng, noticed = random.Random(7), 0
    tokens = np.random.default_rng(0).integers(0, 50257, 3000).astype(np.uint16)
    path = tmp_path / "x_train_000001.bin"
    digest = write_shard(path, tokens)
    entry = {"name": path.name, "split": "train", "tokens": 3000, "sha256": digest}
    entry["documents"] = int((tokens == 50256).sum())
    totals = {key: entry[key] for key in ("tokens", "documents")}
    write_manifest(tmp_path, {"prefix": "x", "complete": True, **totals, "shards": [entry]})
    assert main(["shards", "verify", str(tmp_path)]) == 0
    whole = path.read_bytes()
    for _ in range(FLIPS):
        flip(path, rng)
        noticed += main(["shards", "verify", str(tmp_path)]) != 0
        path.write_bytes(whole)
    capsys.readouterr()
    assert noticed == FLIPS
    record_property("survived", f"{noticed} of {FLIPS} in a shard")


@pytest.mark.fault(9, "the optimizer's state of a narrower network, with right hashes")
def test_optimizer_of_another_shape(data_dir, tmp_path):
    loop.run(config(data_dir, tmp_path, "--max_steps=1"))
    found = training_state.load_state(tmp_path / "state/step_00000001")
    moments = found.state["optimizer"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"][:4, :4].clone()
    shape = GPT2Config(**vars(found.config))
    training_state.write_state(tmp_path, 1, shape, found.model, found.state, keep_last=1)
    with pytest.raises(UserError, match=r"exp_avg of transformer\.\S+ is \(4, 4\) instead of"):
        loop.run(config(data_dir, tmp_path, "--max_steps=2"))


def safetensors_bytes(header: dict | bytes, body=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "header of 8 EB": safetensors_bytes(b"{}", length=2**63),
    "overlapping tensors": safetensors_bytes({"a": ONE, "b": ONE}, b"\0" * 8),
    "offsets beyond the file": safetensors_bytes({"a": ONE | {"data_offsets": [0, 2**40]}}, b"1"),
    "shape that overflows": safetensors_bytes({"a": ONE | {"shape": [2**40, 2**40]}}, b"\0" * 8),
    "names twice": safetensors_bytes(
        b'{"a":%b,"a":%b}' % (json.dumps(ONE).encode(), json.dumps(ONE).encode()), b"\0" * 8
    ),
    "no JSON": safetensors_bytes(b"\xff" * 20),
    "a deep header": safetensors_bytes(b"[" * 100_000),
    "nothing": b"",
}


@pytest.mark.fault(12, "headers that lie: 8 EB, overlaps, overflow, depth")
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors(saved, tmp_path, content):
    reference().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"hf") as caught:
        GPT2.from_checkpoint(tmp_path / "hf", device="cpu")
    assert "\n" not in str(caught.value)
    path = tmp_path / "state/step_00000002"
    (path / "model.safetensors").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = files.fingerprint(path / "model.safetensors")
    del manifest["sha256"]
    manifest["sha256"] = training_state._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="step_00000002"):  # a name twice is found to be a misfit
        model_file.load_into(saved, training_state.load_state(path).model, path)


@pytest.mark.fault(12, "NaN in a tensor of a Hugging Face folder")
def test_weights_of_others_that_are_not_numbers(tmp_path):
    theirs = reference()
    with torch.no_grad():
        theirs.transformer.ln_f.bias[1] = float("inf")
    theirs.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="NaN or infinity in"):
        GPT2.from_checkpoint(tmp_path / "hf", device="cpu")


@pytest.mark.fault(13, "an index of weights, and a manifest of a state, that name ../../x")
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b", ""])
def test_index_cannot_point_elsewhere(tmp_path, name):
    reference().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"transformer.wte.weight": name}}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=r"weight_map is not a table of files beside it|missing or damaged"
    ):
        GPT2.from_checkpoint(tmp_path / "hf", device="cpu")


@pytest.mark.fault(17, "os.truncate of a shard that a run is reading")
def test_shard_cut_short_during_a_run(data_dir, tmp_path, monkeypatch, capsys):
    shutil.copytree(data_dir, tmp_path / "d")
    step = step_module.train_step

    def cutting(state, config, rt):
        if state.step == 2:
            for path in (tmp_path / "d").glob("*_train_*"):
                os.truncate(path, 2000)
        return step(state, config, rt)

    monkeypatch.setattr(loop, "train_step", cutting)
    argv = [f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/out", *TINY, "--max_steps=50"]
    assert main(["train", *argv, "--save_every=1"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "ends early (was it changed during the run?)" in err
    assert training_state.find_state(tmp_path / "out", "auto")[0].step >= 2


@pytest.mark.fault(22, "a loss that is infinite while its gradient is finite")
def test_loss_that_is_not_finite_changes_nothing(data_dir, tmp_path, monkeypatch):
    seen, update = [], step_module._update

    def watched(state, skip):
        update(state, skip)
        seen.append(state.model.transformer.wte.weight.detach().clone())

    forward = GPT.forward

    def infinite(self, *arguments, **keywords):
        loss = forward(self, *arguments, **keywords)
        return loss + (float("inf") if len(seen) == 2 else 0.0)

    monkeypatch.setattr(step_module, "_update", watched)
    monkeypatch.setattr(GPT, "forward", infinite)
    loop.run(config(data_dir, tmp_path, "--max_steps=4"))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])


@pytest.mark.fault(26, "metrics.jsonl deleted during a run, a clock that jumps back a day")
def test_lost_log_and_jumping_clock(data_dir, tmp_path, monkeypatch):
    import time

    step, now = step_module.train_step, time.time

    def disturbed(state, config, rt):
        if state.step == 3:
            (tmp_path / "metrics.jsonl").unlink()
            monkeypatch.setattr(time, "time", lambda: now() - 86_400)
        return step(state, config, rt)

    monkeypatch.setattr(loop, "train_step", disturbed)
    assert loop.run(config(data_dir, tmp_path, "--max_steps=6")) == 0
    assert sorted(metrics(tmp_path)) == [4, 5, 6]
    rows = metrics_module.read_metrics(tmp_path / "metrics.jsonl")
    assert all(0 < row["seconds"] < 600 and row["tokens_per_second"] > 0 for row in rows[:3])


@pytest.mark.slow
@pytest.mark.fault(26, "LC_ALL=C, no HOME, a folder with an umlaut")
def test_other_locale_and_no_home(data_dir, tmp_path):
    folder = tmp_path / "Übung 漢"
    shutil.copytree(data_dir, folder)
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "PYTHONUTF8")}
    environment |= {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0"}
    argv = [f"--data_dir={folder}", f"--out_dir={folder}/out", *TINY, "--max_steps=2"]
    run_python("train_gpt2.py", *argv, env=environment, real=True)
    assert sorted(metrics(folder / "out")) == [1, 2]


# ---- signals in every phase ---------------------------------------------------------------------

PHASES = {  # where in the program the signal arrives; its file, function and call
    "while the model is made": ("train.setup", "network", 1),
    "first step": ("train.loop", "train_step", 1),
    "evaluation": ("train.validation", "evaluate", 1),
    "copying for a save": ("train.save", "write", 1),
    "writing a save": ("checkpoint.training_state", "save_file", 1),
    "committing a save": ("files", "discard", 1),
    "writing out_ckpt.pt": ("train.save", "write_model", 2),
}
SIGNALLED = """
import importlib, os, signal, sys
from gpt2.cli import main
name, function, call, number = sys.argv[1:5]
module = importlib.import_module("gpt2." + name)
original, calls = getattr(module, function), 0
def signalled(*arguments, **keywords):
    global calls
    calls += 1
    if calls == int(call):
        os.kill(os.getpid(), int(number))
        os.kill(os.getpid(), int(number))  # torchrun passes on what the group gets as well
    return original(*arguments, **keywords)
setattr(module, function, signalled)
sys.exit(main(["train", *sys.argv[5:]]))
"""


@pytest.mark.slow
@pytest.mark.fault(
    18,
    "one of the three signals, sent twice, in each of seven phases (start, first step, evaluation, "
    "saving)",
)
@pytest.mark.parametrize("phase", PHASES)
def test_signal_in_any_phase(phase, data_dir, tmp_path):
    """One whole checkpoint, the documented exit code, and the bits of an undisturbed run."""
    number = list(PHASES).index(phase) % 3
    sent = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1][number]
    argv = [f"--data_dir={data_dir}", *TINY, "--max_steps=5", "--save_every=2", "--eval_every=2"]
    out = f"--out_dir={tmp_path / 'out'}"
    module, function, call = PHASES[phase]
    done = run_python(
        "-c",
        SIGNALLED,
        module,
        function,
        str(call),
        str(int(sent)),
        *argv,
        out,
        check=False,
        real=True,
    )
    assert done.returncode == 128 + sent, done.stderr
    if phase == "while the model is made":
        assert "stopped before the first step; nothing is saved" in done.stdout
        stopped = 0
    else:
        stopped = int(done.stdout.split("stopped at step ")[1].split(";")[0])
    assert "Traceback" not in done.stderr
    found, damaged = training_state.find_state(tmp_path / "out", "auto")
    assert not damaged
    assert (found.step if found else 0) == stopped
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert main(["train", *argv, out]) == 0
    assert main(["train", *argv, f"--out_dir={tmp_path / 'whole'}"]) == 0
    a, b = (weights(tmp_path / n / "out_ckpt.pt") for n in ("out", "whole"))
    assert same(a, b)


@pytest.mark.slow
@pytest.mark.fault(18, "SIGTERM between the start and the end of a compiled first step")
def test_signal_while_compiling(data_dir, tmp_path):
    """The first step, if it has begun, ends and is saved; no other follows."""
    from gpt2.distributed.devices import choose_compile

    if not choose_compile("True", torch.device("cpu"))[0]:
        pytest.skip(choose_compile("True", torch.device("cpu"))[1])
    process = subprocess.Popen(
        [sys.executable, "train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", *TINY,
         "--compile_model=True", "--max_steps=100000"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if "training tokens per epoch" in line:
                break
        process.terminate()
        text, _ = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 143, text
    found, _ = training_state.find_state(tmp_path, "auto")
    assert (found.step if found else 0) <= 1


POISONED = """
import sys
import torch
from gpt2.cli import main
from gpt2.train import loop
step = loop.train_step
def poisoned(state, config, rt):
    hooks = []
    if state.step == 2 and rt.rank == 1:
        weight = state.model.transformer.h[0].ln_1.weight
        hooks.append(weight.register_hook(lambda gradient: gradient * float("nan")))
    before = state.model.transformer.wte.weight.detach().clone()
    launched = step(state, config, rt)
    for hook in hooks:
        hook.remove()
    kept = torch.equal(before, state.model.transformer.wte.weight)
    print(f"rank {rt.rank} step {state.step} kept {kept}", flush=True)
    return launched
loop.train_step = poisoned
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.fault(22, "NaN in a gradient of rank 1 only, two ranks")
def test_nan_on_one_rank_is_skipped_on_both(data_dir, tmp_path):
    (tmp_path / "poisoned.py").write_text(POISONED)
    done = run_python(
        *TORCHRUN, "--nproc_per_node=2",
        tmp_path / "poisoned.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}", *TINY,
        "--max_steps=4", env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    for rank in (0, 1):
        kept = [f"rank {rank} step {n} kept {n == 3}" in done.stdout for n in (1, 2, 3, 4)]
        assert all(kept), done.stdout
    rows = metrics_module.read_metrics(tmp_path / "out/metrics.jsonl")
    assert [row["step"] for row in rows if "nonfinite" in row] == [3]
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "out/out_ckpt.pt").values())
