"""Values of wrong kinds in a training state: "not a whole checkpoint", with the file."""

import copy

import pytest
import torch

from gpt2.checkpoint import training_state
from gpt2.checkpoint.state_schema import OPTIONAL, SCHEMA, check_complete, check_kinds, whole
from gpt2.config.command_line import parse
from gpt2.config.train import TrainConfig
from gpt2.errors import UserError
from gpt2.train import loop

from ..conftest import TINY


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """(arguments, state) of a run of one step."""
    out = tmp_path_factory.mktemp("run")
    argv = [f"--data_dir={data_dir}", f"--out_dir={out}", *TINY]
    loop.run(parse(TrainConfig, [*argv, "--max_steps=1"], "x"))
    return argv, training_state.load_state(training_state.state_folders(out)[-1])


def test_a_state_has_every_kind(run):
    _, found = run
    assert {*SCHEMA} == {*found.state}
    check_kinds(found.state, found.path)
    check_complete(found.state, found.path)


NUMBERS = ("seconds", "first_steps", "time_was_up", "best_val_loss", "val_loss")  # any will do
WRONG = (None, -1, "x", [], {}, [[1]], {"a": []}, float("nan"), 2**63, torch.ones(2))
ALLOWED = {  # values of WRONG that fit
    "scaler": ({},),
    "rng": ([],),
    "val_loss": (None,),
    "evaluated_at": (-1,),
    "settings": ({},),
    "tokenizer": ({}, {"a": []}),  # read by `kept_tokenizer`, with one line of its own
}


@pytest.mark.parametrize("name", SCHEMA)
def test_values_of_wrong_kinds(run, name):
    _, found = run
    for value in WRONG:
        if name in NUMBERS and isinstance(value, float | int):
            continue
        if repr(value) in map(repr, ALLOWED.get(name, ())):
            continue
        with pytest.raises(UserError, match=f"p: not a whole checkpoint .{name} is of another"):
            check_kinds(found.state | {name: value}, "p")


@pytest.mark.parametrize("name", [name for name in SCHEMA if name not in OPTIONAL])
def test_missing_values(run, name):
    _, found = run
    state = {key: value for key, value in found.state.items() if key != name}
    check_kinds(state, "p")
    with pytest.raises(UserError, match=f"p: not a whole checkpoint .without {name}"):
        check_complete(state, "p")


CHANGES = {
    "a generator of another length": lambda s: s["rng"][0].update(torch=torch.zeros(9).byte()),
    "words of a generator": lambda s: s["rng"][0].update(python=(3, (1, 2), None)),
    "moments without exp_avg_sq": lambda s: s["optimizer"]["state"][0].pop("exp_avg_sq"),
    "moments of whole numbers": lambda s: s["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(50257, 32, dtype=torch.int64)
    ),
    "a moment that is a number": lambda s: s["optimizer"]["state"][0].update(exp_avg=3.0),
    "a moment that is missing": lambda s: s["optimizer"]["state"][0].update(exp_avg=None),
    "a moment of one number": lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.ones(())),
    "steps of two numbers": lambda s: s["optimizer"]["state"][0].update(step=torch.ones(2)),
    "fewer groups": lambda s: s["optimizer"]["param_groups"].pop(),
    "a dataset without shards": lambda s: s["data"]["datasets"][0].update(shards=[]),
    "no datasets": lambda s: s["data"].update(datasets=[]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_states_that_cannot_be_resumed(run, name, tmp_path):
    argv, found = run
    state = copy.deepcopy(found.state)
    CHANGES[name](state)
    training_state.write_state(tmp_path, 1, found.config, found.model, state, keep_last=1)
    argv = [*argv, f"--resume={tmp_path / 'state/step_00000001'}", f"--out_dir={tmp_path / 'out'}"]
    config = parse(TrainConfig, [*argv, "--max_steps=2"], "x")
    if name == "no datasets":  # a new dataset begins at its beginning
        assert loop.run(config) == 0
        return
    with pytest.raises(UserError) as caught:
        loop.run(config)
    assert "step_00000001" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_hidden():
    with pytest.raises(UserError, match=r"p: not a whole checkpoint .KeyError"), whole("p"):
        raise KeyError
    with pytest.raises(UserError, match=r"^as it was$"), whole("p"):
        raise UserError("as it was")
    with pytest.raises(torch.OutOfMemoryError), whole("p"):
        raise torch.OutOfMemoryError("on the GPU")
    with pytest.raises(OSError, match="disk"), whole("p"):
        raise OSError("disk")
