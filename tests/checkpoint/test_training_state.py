"""Files that come from anywhere, and crashes at any moment."""

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from gpt2 import files
from gpt2.checkpoint import model_file, training_state
from gpt2.config.model import GPT2Config
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.train import run_folder

from ..conftest import start_python
from ..states import save_state

SHAPE = GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(SHAPE)


def test_model_round_trip(model, tmp_path):
    model_file.save_model(tmp_path / "a" / "out_ckpt.pt", model, 7, 1.5)
    config, state, rest = model_file.load_model(tmp_path / "a/out_ckpt.pt")
    assert config == SHAPE
    assert rest == {"step": 7, "val_loss": 1.5, "format": 1}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module.module."]
)
@pytest.mark.fault(10, "four mixes of prefixes")
def test_prefixes_of_wrappers_are_removed(model, tmp_path, prefix):
    state = {prefix + n: t for n, t in model.state_dict().items()}
    state[prefix + "lm_head.weight"] = model.transformer.wte.weight.detach()  # tied, as in nanoGPT
    path = tmp_path / "x.pt"
    content = {"model": state, "config": {**vars(SHAPE)}}
    torch.save(content, path)
    config, state, _ = model_file.load_model(path)
    other = GPT(config)
    model_file.load_into(other, state, path)
    idx = torch.randint(0, 50, (1, 8))
    assert torch.equal(other(idx), model(idx))


def test_prefix_inside_a_name():
    names = model_file.strip_prefixes({"transformer.h.0._orig_mod.ln_1.weight": 1})
    assert list(names) == ["transformer.h.0.ln_1.weight"]


def test_names_and_shapes_that_do_not_fit(model, tmp_path):
    state = model.state_dict()
    wrong = {n: t for n, t in state.items() if n != "transformer.wpe.weight"}
    wrong["extra"] = torch.zeros(1)
    wrong["transformer.ln_f.bias"] = torch.zeros(3)
    with pytest.raises(UserError) as caught:
        model_file.load_into(GPT(SHAPE), wrong, "file.pt")
    text = str(caught.value)
    for part in ("missing transformer.wpe.weight", "unexpected extra", "(3,) instead of (16,)"):
        assert part in text


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("where", ["model", "config", "all"])
@pytest.mark.fault(11, "os.mkdir in a .pt, in three places and in the old format")
def test_hostile_pickle_is_refused(model, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    content = {"model": model.state_dict(), "config": dict(vars(SHAPE))}
    if where == "all":
        content = Bomb()
    else:
        content[where] = Bomb()
    torch.save(content, "evil.pt")
    with pytest.raises(UserError, match="refused"):
        model_file.load_model("evil.pt")
    assert not (tmp_path / "canary").exists()
    with open("old.pt", "wb") as file:
        pickle.dump(Bomb(), file)
    with pytest.raises(UserError):
        model_file.load_model("old.pt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable checkpoint|refused"),
        (b"PK\x03\x04 cut off", "not a readable checkpoint"),
        (b"just text", "refused|not a readable"),
    ],
)
def test_damaged_model_files(tmp_path, content, message):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        model_file.load_model(path)


@pytest.mark.fault(6, "out_ckpt.pt without its last bytes")
def test_truncated_model_file(model, tmp_path):
    path = tmp_path / "x.pt"
    model_file.save_model(path, model, 1, None)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        model_file.load_model(path)


@pytest.mark.parametrize(
    "content",
    [
        *[[1, 2], {"weights": {}}, {"model": {}, "config": 3}, {"model": 3, "config": {}}],
        *[{"model": {"a": 1}, "config": {}}, {"model": {1: torch.ones(1)}, "config": {}}],
        {"model": {}, "config": {**vars(SHAPE), "dropout": "a"}},
    ],
)
def test_foreign_content(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt"):
        model_file.load_model(tmp_path / "x.pt")


def test_missing_file():
    with pytest.raises(UserError, match="no such checkpoint"):
        model_file.load_model("nowhere.pt")


@pytest.mark.fault(12, "NaN in out_ckpt.pt")
def test_weights_that_are_not_numbers(model, tmp_path):
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = float("nan")
    model_file.save_model(tmp_path / "x.pt", model, 1, None)
    with pytest.raises(UserError, match=r"NaN or infinity in transformer\.ln_f\.weight"):
        model_file.load_model(tmp_path / "x.pt")


# ---- states -------------------------------------------------------------------------------------


def save(out, model, step, keep=2):
    return save_state(out, step, model, {"number": step, "t": torch.ones(3)}, keep)


def test_state_round_trip_and_retention(model, tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, model, step, keep=2)
    assert [p.name[-1] for p in training_state.state_folders(tmp_path)] == ["3", "4"]
    found, damaged = training_state.find_state(tmp_path, "auto")
    assert not damaged
    assert (found.step, found.config, found.state["number"]) == (4, SHAPE, 4)
    assert all(torch.equal(found.model[n], t) for n, t in model.state_dict().items())
    assert not list(tmp_path.rglob("*.tmp"))


def test_same_step_may_be_saved_again(model, tmp_path):
    save(tmp_path, model, 5)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(7)
    save(tmp_path, model, 5)
    found, damaged = training_state.find_state(tmp_path, "auto")
    assert not damaged
    assert (found.model["transformer.ln_f.bias"] == 7).all()
    assert len(list((tmp_path / "state").iterdir())) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
@pytest.mark.fault(6, "half, empty and missing files of a state")
def test_any_damage_is_noticed(model, tmp_path, name, damage):
    save(tmp_path, model, 1)
    path = save(tmp_path, model, 2) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-40] ^= 4
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2 if damage == "cut" else 0])
    found, damaged = training_state.find_state(tmp_path, "auto")
    assert found.step == 1
    assert len(damaged) == 1
    assert "step_00000002" in damaged[0]
    with pytest.raises(UserError):
        training_state.load_state(tmp_path / "state/step_00000002")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("always", "no such folder"),
        ("run/state/step_00000009", "no such folder"),
        ("run/out_ckpt.pt", "a file, no folder"),
        ("run/state", "a folder without manifest.json"),
        ("run", "the folder of a run"),
    ],
)
def test_a_name_of_no_state_is_answered_with_one(model, tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        save(Path("run"), model, step)
        save(Path("other"), model, step + 7)
    Path("run/out_ckpt.pt").touch()
    near = "other/state/step_00000009" if name == "always" else "run/state/step_00000002"
    with pytest.raises(UserError) as caught:
        training_state.find_state(Path("other"), name)
    assert str(caught.value) == (
        f"{name}: not a whole checkpoint ({reason}); use --resume=auto, --resume=never or a folder "
        f"such as --resume={near}"
    )
    with pytest.raises(UserError, match="resume is empty; use --resume=auto or never"):
        training_state.find_state(Path("other"), "")
    with pytest.raises(UserError, match="such as --resume=new/state/step_00000250"):
        training_state.find_state(Path("new"), "always")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}', '{"step": "x", "files": {}}'])
@pytest.mark.fault(6, "manifests that are empty, cut or of another shape")
def test_damaged_manifest(model, tmp_path, text):
    path = save(tmp_path, model, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        training_state.load_state(path)


@pytest.mark.fault(13)
def test_manifest_cannot_point_elsewhere(model, tmp_path):
    """A file named in the manifest with a path is not opened; only the two known names are."""
    path = save(tmp_path, model, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = manifest["files"].pop("train_state.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        training_state.load_state(path)


@pytest.mark.fault(11, "the same in train_state.pt with right hashes")
def test_hostile_state_is_refused(model, tmp_path, monkeypatch):
    """Even with a manifest whose hashes are right."""
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, model, 1)
    torch.save({"number": Bomb()}, path / "train_state.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["train_state.pt"] = files.fingerprint(path / "train_state.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="refused"):
        training_state.load_state(path)
    assert not (tmp_path / "canary").exists()


def test_clean_removes_what_a_crash_left(model, tmp_path):
    save(tmp_path, model, 1)
    for name in ("step_00000002.tmp", "step_00000003.0123abcd.tmp"):  # older versions', and ours
        (tmp_path / "state" / name).mkdir()
        (tmp_path / "state" / name / "half").touch()
    (tmp_path / "out_ckpt.pt.tmp").write_bytes(b"half")
    assert sorted(run_folder.clean(tmp_path)) == [
        "out_ckpt.pt.tmp", "step_00000002.tmp", "step_00000003.0123abcd.tmp",
    ]  # fmt: skip
    assert training_state.find_state(tmp_path, "auto")[0].step == 1


KILLED = """
import sys, torch
from pathlib import Path
from gpt2.config.model import GPT2Config
from gpt2.model.gpt import GPT
from tests.states import save_state
model = GPT(GPT2Config(n_layer=2, n_head=2, n_embd=64, block_size=8, vocab_size=20000))
step = 0
while True:
    step += 1
    for p in model.parameters():
        p.data.fill_(step)
    state = {"number": step, "t": torch.full((100_000,), float(step))}
    save_state(Path(sys.argv[1]), step, model, state, 2)
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_kill_while_saving_loses_no_acknowledged_step(tmp_path):
    """Ten kills at odd moments: what was announced is there, whole, and of one step."""
    for attempt in range(10):
        out = tmp_path / str(attempt)
        child = start_python("-c", KILLED, out)
        child.stdout.readline()
        time.sleep(0.013 * attempt)
        child.send_signal(signal.SIGKILL)
        announced = [1, *map(int, child.stdout.read().split())][-1]
        found, damaged = training_state.find_state(out, "auto")
        assert not damaged
        assert found.step >= announced
        assert (found.state["t"] == found.step).all()
        assert all((t == found.step).all() for t in found.model.values())
