"""`gpt2 average`: the mean of saved states is exact, and what cannot be averaged is one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from gpt2 import files
from gpt2.checkpoint import model_file, training_state
from gpt2.cli import main
from gpt2.config.model import GPT2Config
from gpt2.model.gpt import GPT

from ..states import save_state

SHAPE = GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=20)


def a_model(seed: int, shape=SHAPE) -> GPT:
    torch.manual_seed(seed)
    return GPT(shape)


@pytest.fixture
def run(tmp_path):
    """A run with states of steps 1 to 4, whose weights are known."""
    models = [a_model(step) for step in range(1, 5)]
    for step, model in enumerate(models, 1):
        save_state(tmp_path, step, model, {}, keep_last=9)
    return tmp_path, models


def complaint(capsys, *argv) -> str:
    capsys.readouterr()
    assert main(["average", *map(str, argv)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def change_manifest(folder, change):
    """Applies a change to a manifest and signs it anew."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest.pop("sha256", None)
    manifest["sha256"] = training_state._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_mean_is_exact(run, capsys):
    out, models = run
    assert main(["average", str(out), "--last=3", f"--out={out / 'x.pt'}"]) == 0
    assert "the mean of 3 saved states, steps 2 to 4" in capsys.readouterr().out
    config, state, rest = model_file.load_model(out / "x.pt")
    assert config == SHAPE
    assert (rest["step"], rest["val_loss"]) == (4, None)
    states = [model.state_dict() for model in models[1:]]
    assert state.keys() == states[0].keys()
    for name, tensor in state.items():
        exact = sum(s[name].double() for s in states) / 3  # to the bit, rounded once
        assert torch.equal(tensor, exact.float()), name
        assert tensor.dtype == torch.float32


def test_the_mean_of_one_is_it(run):
    out, models = run
    assert main(["average", str(out), "--last=1"]) == 0
    state = model_file.load_model(out / "mean.pt")[1]
    assert all(torch.equal(state[n], t) for n, t in models[-1].state_dict().items())


def test_too_few_states(run, capsys):
    err = complaint(capsys, run[0])
    assert "holds 4 saved states, not 8; use --last=4, or train with --keep_last=8" in err
    assert not (run[0] / "mean.pt").exists()


def test_fsdp_parts_are_refused(run, capsys):
    out, _ = run
    folder = out / "state/step_00000003"
    part = "shard-00001-model-00001-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / part)
    change_manifest(
        folder, lambda m: m["files"].update({part: m["files"].pop("model.safetensors")})
    )
    err = complaint(capsys, out, "--last=2")
    assert "step_00000003 holds FSDP parts, which are not averaged; continue the run without" in err


def test_damage_other_networks_and_adapters(run, capsys):
    out, _ = run
    folder = out / "state/step_00000004"
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "model.safetensors is damaged (its sha256 differs)" in complaint(capsys, out, "--last=2")
    adapters = a_model(4).state_dict() | {"transformer.h.0.attn.c_attn.lora_A": torch.ones(1, 8)}
    save_file(adapters, path)
    change_manifest(folder, lambda m: m["files"].update({path.name: files.fingerprint(path)}))
    assert "holds LoRA adapters" in complaint(capsys, out, "--last=2")
    save_state(out, 5, a_model(5, GPT2Config(**vars(SHAPE) | {"block_size": 5})), {}, keep_last=9)
    path.write_bytes(whole)
    change_manifest(folder, lambda m: m["files"].update({path.name: files.fingerprint(path)}))
    assert "are of different networks; use a smaller --last" in complaint(capsys, out, "--last=2")


def test_only_a_checkpoint_is_replaced(run, capsys):
    out, _ = run
    (out / "notes.txt").write_text("mine")
    argv = (out, "--last=2", f"--out={out / 'notes.txt'}")
    assert "is there and no checkpoint of this project" in complaint(capsys, *argv)
    assert (out / "notes.txt").read_text() == "mine"
    for _ in range(2):
        assert main(["average", str(out), "--last=2"]) == 0


@pytest.mark.parametrize("name", ["out_ckpt.pt", "best_ckpt.pt"])
def test_the_models_of_the_run_are_not_replaced(run, capsys, name):
    out, models = run
    assert main(["average", str(out), "--last=2", f"--out={out / name}"]) == 0  # there is none
    model_file.write_model(out / name, SHAPE, models[0].state_dict(), 1, 2.5)
    before = (out / name).read_bytes()
    for path in (out / name, out / ".." / out.name / name):
        told = complaint(capsys, out, "--last=2", f"--out={path}")
        assert "the run wrote this file itself" in told
    assert (out / name).read_bytes() == before
