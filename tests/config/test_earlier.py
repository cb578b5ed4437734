"""Settings of earlier versions."""

from dataclasses import fields, replace

import pytest

from gpt2.config.command_line import parse
from gpt2.config.earlier import RENAMED, as_begun, comparable, current_names
from gpt2.config.options import flatten
from gpt2.config.train import OptimOptions, TrainConfig, with_floor


def test_settings_of_earlier_versions_get_the_names_of_today():
    earlier = {"batch_size": 8, "window_start": "document", "window": 128}
    now = {"batch_size": 8, "sequence_start": "document", "window": 128}
    assert current_names(earlier) == current_names(now) == now
    assert earlier["window_start"] == "document"  # a copy
    assert current_names({"window_start": "anywhere", "sequence_start": "document"}) == {
        "sequence_start": "document"
    }
    bools = {"activation_checkpointing": True}  # before `mlp` was a third value
    assert current_names(bools) == {"activation_checkpointing": "True"}


def test_every_renamed_option_keeps_its_earlier_name_as_an_alias():
    options = {f.name: f for group in fields(TrainConfig) for f in fields(group.type)}
    assert set(options) == set(flatten(TrainConfig()))
    for old, new in RENAMED.items():
        assert options[new].metadata["alias"] == old
        assert old not in options


@pytest.mark.parametrize(
    ("saved", "given", "goes_on_with"),
    [
        ({"schedule": "wsd", "cooldown": 0.4, "min_lr_ratio": 0.1}, [], (0.4, 0.1)),
        ({"schedule": "wsd", "cooldown": 0.4, "min_lr_ratio": 0.0}, [], (0.4, -1.0)),
        ({"schedule": "wsd", "cooldown": 0.4, "min_lr_ratio": 0.1}, ["--cooldown=0.5"], (0.5, 0.1)),
        ({"schedule": "wsd", "cooldown": 0.6, "min_lr_ratio": -1.0}, [], (0.6, -1.0)),
        ({"schedule": "cosine", "cooldown": 0.4, "min_lr_ratio": 0.1}, [], (0.6, -1.0)),
        ({}, [], (0.6, -1.0)),
    ],
)
def test_a_run_of_before_keeps_the_defaults_of_its_schedule(saved, given, goes_on_with):
    """What its command sets itself, or the checkpoint has otherwise, is no default."""
    config = parse(TrainConfig, ["--schedule=wsd", *given], "gpt2 train")
    kept = as_begun(config, {"settings": saved})
    assert (kept.optim.cooldown, kept.optim.min_lr_ratio) == goes_on_with
    assert replace(kept, optim=config.optim) == config
    assert as_begun(config, {}) == config


def test_runs_that_train_alike_have_equal_settings():
    """With the defaults of before or of today, spelt out or not."""
    today = flatten(TrainConfig())
    before = today | {"cooldown": 0.4, "min_lr_ratio": 0.1}
    assert comparable(before) == comparable(today)
    assert comparable(before | {"min_lr_ratio": 0.2})["min_lr_ratio"] == 0.2
    wsd = [value | {"schedule": "wsd"} for value in (before, today)]
    assert comparable(wsd[0]) == wsd[0]
    assert comparable(wsd[1]) == wsd[1] | {"min_lr_ratio": 0.0}
    folders = today | {"data_dir": "./a/:0.5,b/"}
    assert comparable(folders) == comparable(today | {"data_dir": "a:0.5,b"})
    assert comparable(today | {"data_dir": "b/../c"})["data_dir"] == "b/../c"  # b may be a link


def test_the_schedule_of_a_plugin_goes_on_as_it_began():
    config = TrainConfig(optim=OptimOptions(schedule="linear"))
    saved = {"settings": {"schedule": "linear", "cooldown": 0.4, "min_lr_ratio": 0.1}}
    assert as_begun(config, saved).optim.cooldown == 0.4
    assert with_floor(config.optim).min_lr_ratio == 0.1
