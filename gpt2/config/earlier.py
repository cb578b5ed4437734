"""Settings that earlier versions wrote, read as today's."""

import os
from dataclasses import replace
from typing import Any

from .model import OLD_SIZES
from .train import OptimOptions, TrainConfig, with_floor

RENAMED = {"window_start": "sequence_start"}  # options of earlier versions; aliases today
WORDS = {"activation_checkpointing"}  # options that were True or False, and have a third value now
EARLIER_DEFAULTS = {"cooldown": 0.4, "min_lr_ratio": 0.1}


def as_begun(config: TrainConfig, state: dict[str, Any]) -> TrainConfig:
    """The settings of a run that an earlier version began with its defaults of the schedule.

    Args:
        config: of the command that goes on with it; what it sets itself stays.
        state: of the checkpoint; its `settings` are those of the run so far.
    """
    before, today = state.get("settings", {}), OptimOptions()
    schedule = config.optim.schedule
    if schedule == "cosine" or before.get("schedule") != schedule:
        return config
    kept: dict[str, Any] = {
        name: value
        for name, value in EARLIER_DEFAULTS.items()
        if before.get(name) == value and getattr(config.optim, name) == getattr(today, name)
    }
    return replace(config, optim=replace(config.optim, **kept))


def current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint or config.toml under today's names of the options."""
    renamed = {new: settings[old] for old, new in RENAMED.items() if old in settings}
    renamed |= {name: value for name, value in settings.items() if name not in RENAMED}
    renamed |= {name: str(renamed[name]) for name in WORDS & renamed.keys()}
    size = renamed.get("size")
    return renamed | ({"size": OLD_SIZES[size]} if size in OLD_SIZES else {})


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run, so that runs that train alike have equal ones.

    The floor of the learning rate is a number, a cosine has no cooldown, and `./data` is `data`.
    """
    schedule, ratio = settings["schedule"], settings["min_lr_ratio"]
    optim = with_floor(OptimOptions(schedule=schedule, min_lr_ratio=ratio))
    cooldown = optim.cooldown if schedule == "cosine" else settings["cooldown"]
    data = ",".join(map(_plain_folder, settings["data_dir"].split(",")))
    return settings | {
        "min_lr_ratio": optim.min_lr_ratio,
        "cooldown": cooldown,
        "data_dir": data,
    }


def _plain_folder(text: str) -> str:
    """A folder of `--data_dir=`, with its share if it has one. One with `..` stays, for links."""
    path, colon, share = text.rpartition(":")
    if ".." in text.split("/"):
        return text
    return os.path.normpath(path) + colon + share if colon else os.path.normpath(text)
