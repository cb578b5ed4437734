"""FSDP2 on two CPU processes (gloo): the run that DDP does, in parts; its states go anywhere."""

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch

from gpt2.checkpoint import training_state
from gpt2.config.train import SystemOptions
from gpt2.distributed import runtime
from gpt2.errors import UserError

from ..conftest import ROOT, TINY, TORCHRUN, run_python
from ..test_distributed import command
from ..train.test_loop import metrics, same, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv on Windows"),
]
FSDP, MUON = "--parallel=fsdp", "--optimizer=muon"
RUN = ["--max_steps=6", "--eval_every=3", "--save_every=3", "--keep_last=9", MUON]
STEPS = """
import json, sys
from dataclasses import replace
import torch
from gpt2.config.command_line import parse
from gpt2.config.train import TrainConfig
from gpt2.distributed import fsdp, random_state, runtime
from gpt2.evaluate.scoring import score
from gpt2.train import setup, step, weight_average

ROWS = [([1, 2, 3], [4, 5]), ([7] * 20, [3]), ([9, 8], [1, 2, 3])]  # three batches of one row

def go(config, world):
    rt = replace(world, dtype=getattr(torch, config.system.dtype),
                 sharded=config.system.parallel == "fsdp")
    random_state.seed(1337)
    state = setup.build(config, rt, None)
    steps = [step.train_step(state, config, rt).read()[:2] for _ in range(3)]
    scores = score(state.model, ROWS, rt, batch_tokens=16)
    weight_average.update_average(state.optimizer, weight_average.EVERY, 10)
    step.train_step(state, config, rt)
    def own():
        return score(state.model, ROWS, rt, batch_tokens=16)

    def mean():
        with weight_average.averaged(state.model, state.optimizer):
            return own()

    orders = []
    for order in ((own, mean, own), (mean, own, mean)):
        state.model.state_dict()  # frees what a forward has gathered
        orders += [[function() for function in order]]
    (a, b, a2), (b2, a3, b3) = orders
    assert a == a2 == a3 != b == b2 == b3
    weight_average.forget_average(state.optimizer)
    found = {n: fsdp.whole(p).clone() for n, p in state.model.state_dict().items()}
    for p in state.model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    step._update(state, torch.ones((), dtype=torch.bool))
    for n, p in state.model.state_dict().items():
        assert torch.equal(found[n], fsdp.whole(p)), n  # a bad gradient changes nothing
    state.loader.close()
    return steps, [s.nats for s in scores], found

with runtime.start(parse(TrainConfig, sys.argv[2:], "test").system) as world:
    for name, extra in json.loads(sys.argv[1]).items():
        configs = [parse(TrainConfig, [*sys.argv[2:], *extra, f"--parallel={how}"], "test")
                   for how in ("ddp", "fsdp")]
        (a, s, v), (b, t, w) = (go(config, world) for config in configs)
        if world.is_main:
            loss = max(abs(x[0] - y[0]) for x, y in zip(a, b))
            norm = max(abs(x[1] / y[1] - 1) for x, y in zip(a, b))
            weights = max((v[n] - w[n]).abs().max().item() for n in v)
            scores = max(abs(x - y) for x, y in zip(s, t))
            print("RESULT", json.dumps([name, loss, norm, weights, scores]), flush=True)
"""
SWITCHES = [
    *("--positions=rotary", "--qk_norm=True", "--norm=rmsnorm", "--mlp=relu2", "--softcap=15"),
    *("--skips=unet+input", "--value_embeddings=1", "--untied_head=True", "--window_pattern=SL"),
    *("--window=16", "--document_mask=True", "--zero_init=True", MUON),
]
CASES = {
    "Muon": [MUON, "--activation_checkpointing=mlp"],
    "AdamW": ["--dropout=0.1", "--activation_checkpointing=True"],
    "switches": SWITCHES,
    "sampled softmax": [MUON, "--loss=sampled_softmax+second"],
    "bfloat16": ["--dtype=bfloat16", "--activation_checkpointing=True"],
}


@pytest.mark.timeout(500)
def test_losses_equal_those_of_ddp(data_dir, tmp_path):
    """Tolerances in float32: 1e-6 in loss, 1e-5 in weights, 1e-4 of the norm; 0.01 in bf16.

    Also: contexts are scored alike where one rank has a batch less, and a gradient that is NaN
    changes no weight.
    """
    script = tmp_path / "steps.py"
    script.write_text(STEPS, encoding="utf-8")
    options = [
        f"--data_dir={data_dir}",
        f"--out_dir={tmp_path / 'out'}",
        *TINY,
        "--batch_size=1",
        "--vocab_size=512",
    ]  # of data_dir
    done = run_python(*TORCHRUN, "--nproc_per_node=2", script, json.dumps(CASES), *options,
                      env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=480)  # fmt: skip
    lines = [json.loads(line[7:]) for line in done.stdout.splitlines() if "RESULT" in line]
    assert [line[0] for line in lines] == list(CASES)
    for name, loss, norm, weight, score in lines:
        if name == "bfloat16":
            assert max(loss, score) < 0.01
        else:
            assert loss < 1e-6 and norm < 1e-4 and weight < 1e-5, name  # noqa: PT018
            assert score < 1e-4, name


@pytest.fixture(scope="module")
def ddp(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    run_python(*command(2, data_dir, out, *RUN))
    return out


@pytest.fixture(scope="module")
def fsdp(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdp")
    done = run_python(*command(2, data_dir, out, *RUN, FSDP))
    assert "each with a part of the weights (fsdp)" in done.stdout
    return out


def at_step_3(run, folder):
    """A copy of a run as it was after three steps."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "state/step_00000006")
    return folder


def close(found, wanted):
    assert metrics(found) == pytest.approx(metrics(wanted), abs=2e-6)
    assert metrics(found, "val_loss") == pytest.approx(metrics(wanted, "val_loss"), abs=2e-6)
    ours, theirs = weights(found / "out_ckpt.pt"), weights(wanted / "out_ckpt.pt")
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=0)


def test_run_and_its_model_are_those_of_ddp(fsdp, ddp):
    close(fsdp, ddp)
    state = fsdp / "state/step_00000006"
    manifest = json.loads((state / "manifest.json").read_text("utf-8"))
    parts = [name for name in manifest["files"] if name.startswith("shard-")]
    assert len(parts) == 2  # one of each rank
    assert {p.name for p in state.iterdir()} == {*manifest["files"], "manifest.json"}
    sizes = [manifest["files"][name][0] for name in parts]
    assert max(sizes) < 0.51 * sum(sizes)


def test_continues_with_the_same_bits(fsdp, data_dir, tmp_path):
    out = at_step_3(fsdp, tmp_path / "out")
    assert "continuing from" in run_python(*command(2, data_dir, out, *RUN, FSDP)).stdout
    assert same(weights(out / "out_ckpt.pt"), weights(fsdp / "out_ckpt.pt"))
    assert metrics(out) == metrics(fsdp)


@pytest.mark.parametrize("saved_by", ["fsdp", "ddp"])
def test_states_go_to_the_other_way(saved_by, fsdp, ddp, data_dir, tmp_path):
    out = at_step_3(fsdp if saved_by == "fsdp" else ddp, tmp_path / "out")
    other = [] if saved_by == "fsdp" else [FSDP]
    assert "continuing from" in run_python(*command(2, data_dir, out, *RUN, *other)).stdout
    close(out, ddp)


def test_states_go_to_one_rank(fsdp, ddp, data_dir, tmp_path):
    out = at_step_3(fsdp, tmp_path / "out")
    done = run_python("train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={out}", *TINY, *RUN,
                      FSDP, "--grad_accum_steps=4")  # fmt: skip
    assert "one rank holds all weights" in done.stdout
    close(out, ddp)


def half_written(states) -> set[str]:
    """Folders with a part of a state that are not committed."""
    try:
        found = {name for name in os.listdir(states) if name.endswith(".tmp")}
        return {
            name for name in found if any(".safetensors" in p for p in os.listdir(states / name))
        }
    except FileNotFoundError:  # committed meanwhile, or not begun
        return set()


def committed(states) -> list[int]:
    """Steps of the whole states."""
    return sorted(int(path.name[5:]) for path in states.glob("step_????????"))


@pytest.mark.fault(1, "SIGKILL of both ranks while they save their parts, 5 times")
@pytest.mark.timeout(400)
def test_killed_while_parts_are_saved_goes_on_from_the_state_before(data_dir, tmp_path):
    """When the folder that is not whole yet appears; it never counts, and the end is the same."""
    arguments = [*RUN, "--save_every=1", "--keep_last=19", "--max_steps=12", FSDP]
    run_python(*command(2, data_dir, tmp_path / "whole", *arguments))
    out, states = tmp_path / "out", tmp_path / "out/state"
    for saves in (0, 1, 1, 1, 1):  # that go well before
        process = subprocess.Popen(
            [sys.executable, *command(2, data_dir, out, *arguments)], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        before, leftover = len(committed(states)), half_written(states)
        while not (half_written(states) - leftover and len(committed(states)) >= before + saves):
            assert process.poll() is None, "it ended before it was killed"
            leftover &= half_written(states)  # of the run before, until this one removes it
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        process.wait(10)
        while any(m.is_running() and m.status() != psutil.STATUS_ZOMBIE for m in family[1:]):
            time.sleep(0.01)
        whole = committed(states)
        found, problems = training_state.find_state(out, "auto")
        assert not problems
        assert (found.step if found else 0) == max(whole, default=0)
    assert len(whole) >= 4
    run_python(*command(2, data_dir, out, *arguments))
    assert same(weights(out / "out_ckpt.pt"), weights(tmp_path / "whole/out_ckpt.pt"))
    assert metrics(out) == metrics(tmp_path / "whole")


def test_damaged_part_is_noticed(fsdp, tmp_path):
    """A flipped bit, a part that is not there and one that does not belong there."""
    out = tmp_path / "out"
    shutil.copytree(fsdp, out)
    part = out / "state/step_00000006/shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    found, passed_over = training_state.find_state(out, "auto")
    assert found.step == 3 and found.in_parts  # noqa: PT018
    assert f"{part.name} is damaged" in passed_over[0]
    part.unlink()
    assert "not a whole checkpoint" in training_state.find_state(out, "auto")[1][0]
    extra = out / "state/step_00000003/shard-00009-model-00001-of-00001.safetensors"
    extra.write_bytes(content)
    with pytest.raises(UserError, match="is not in its manifest"):
        training_state.load_state(extra.parent)


def test_adapters_in_parts(ddp, data_dir, tmp_path):
    """LoRA: frozen weights and trained ones in the same unit; merged and alone in the exports."""
    losses = {}
    for how in ("ddp", "fsdp"):
        out = tmp_path / how
        arguments = [*TORCHRUN, "--nproc_per_node=2", "-m", "gpt2", "finetune",
                     f"--init={ddp / 'out_ckpt.pt'}", f"--data={data_dir}", f"--out_dir={out}",
                     "--lora_rank=2", "--max_steps=3", f"--parallel={how}",
                     *(a for a in TINY if not a.startswith(("--n_", "--block")))]  # fmt: skip
        run_python(*arguments)
        losses[how] = metrics(out)
        assert (out / "out_adapter/adapter_model.safetensors").exists()
    assert losses["fsdp"] == pytest.approx(losses["ddp"], abs=2e-6)
    ours, theirs = (weights(tmp_path / how / "out_ckpt.pt") for how in ("fsdp", "ddp"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-5, rtol=0)


def test_float16_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match="parallel=fsdp does not scale the loss"),
        runtime.start(SystemOptions(device="cpu", dtype="float16", parallel="fsdp")),
    ):
        pass
