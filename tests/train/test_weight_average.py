"""The EMA of the weights: the mean by its formula, training untouched, the same bits resumed."""

import contextlib
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from gpt2.checkpoint import training_state
from gpt2.checkpoint.weights import load
from gpt2.config.train import OptimOptions
from gpt2.errors import UserError
from gpt2.train import loop
from gpt2.train.optimizer import build_optimizer
from gpt2.train.weight_average import averaged, forget_average, update_average

from .test_loop import config, metrics, same, weights


def trained(name="adamw"):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimOptions(optimizer=name))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


def test_the_mean_follows_its_formula():
    model, optimizer = trained()
    wanted = None
    for step in range(1, 21):
        with torch.no_grad():
            model.weight += step
        update_average(optimizer, step, 10)
        if step % 5 == 0:
            now, keep = model.weight.detach().clone(), math.exp(-5 / 10)
            wanted = now if wanted is None else keep * wanted + (1 - keep) * now
    before = [p.detach().clone() for p in model.parameters()]
    with averaged(model, optimizer):
        torch.testing.assert_close(model.weight.detach(), (before[0] + wanted) / 2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_weights_come_back_after_an_error():
    model, optimizer = trained()
    update_average(optimizer, 5, 10)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    with contextlib.suppress(KeyError), averaged(model, optimizer):
        assert not torch.equal(model.weight, before + 1)
        raise KeyError
    assert torch.equal(model.weight, before + 1)


def test_without_a_horizon_there_is_no_mean():
    model, optimizer = trained()
    update_average(optimizer, 5, 0)
    assert "ema" not in optimizer.state[model.weight]
    update_average(optimizer, 5, 9)
    assert "ema" in optimizer.state[model.weight]
    forget_average(optimizer)
    assert "ema" not in optimizer.state[model.weight]


ARGUMENTS = ["--max_steps=12", "--save_every=6", "--eval_every=6", "--keep_last=9"]


def test_a_run_trains_as_without_and_exports_the_mean(data_dir, tmp_path):
    """Losses and states equal those of a run without EMA; the model for use is the mean."""
    plain, ema = tmp_path / "plain", tmp_path / "ema"
    assert loop.run(config(data_dir, plain, *ARGUMENTS)) == 0
    assert loop.run(config(data_dir, ema, *ARGUMENTS, "--ema_steps=10")) == 0
    assert metrics(plain) == metrics(ema)
    assert metrics(plain, "val_loss")[12] != metrics(ema, "val_loss")[12]
    states = [training_state.state_folders(run)[-1] for run in (plain, ema)]
    own = [load_file(state / training_state.MODEL_FILE) for state in states]
    assert same(*own)
    stored = torch.load(states[1] / training_state.STATE_FILE, weights_only=True)["optimizer"]
    names = [name for group in stored["param_groups"] for name in group["names"]]
    exported = weights(ema / "out_ckpt.pt")
    for number, name in enumerate(names):
        wanted = (own[1][name] + stored["state"][number]["ema"]) / 2
        torch.testing.assert_close(exported[name], wanted)
    assert not same(exported, own[1])
    assert load(ema / "out_ckpt.pt").config == load(plain / "out_ckpt.pt").config


def test_an_interrupted_run_gives_the_same_bits(data_dir, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [*ARGUMENTS, "--ema_steps=10"]
    loop.run(config(data_dir, whole, *arguments))
    shutil.copytree(whole, parts)
    shutil.rmtree(training_state.state_folders(parts)[-1])
    (parts / "out_ckpt.pt").unlink()
    assert loop.run(config(data_dir, parts, *arguments)) == 0
    assert same(weights(whole / "out_ckpt.pt"), weights(parts / "out_ckpt.pt"))


def test_going_on_without_forgets_the_mean(data_dir, tmp_path):
    loop.run(config(data_dir, tmp_path, *ARGUMENTS[:-1], "--ema_steps=10", "--keep_last=1"))
    loop.run(config(data_dir, tmp_path, "--max_steps=18", "--save_every=6", "--keep_last=1"))
    state = training_state.state_folders(tmp_path)[-1]
    stored = torch.load(state / training_state.STATE_FILE, weights_only=True)["optimizer"]["state"]
    assert not any("ema" in values for values in stored.values())


def test_a_negative_horizon_is_refused(data_dir, tmp_path):
    with pytest.raises(UserError, match="ema_steps"):
        config(data_dir, tmp_path, "--ema_steps=-1")
