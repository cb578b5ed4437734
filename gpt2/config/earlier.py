"""Settings that earlier versions wrote, read as today's."""

from dataclasses import replace
from typing import Any

from .model import OLD_SIZES
from .train import EARLIER_DEFAULTS, OptimOptions, TrainConfig

RENAMED = {"window_start": "sequence_start"}  # options of earlier versions; aliases today


def as_begun(config: TrainConfig, state: dict[str, Any]) -> TrainConfig:
    """The settings of a run that an earlier version began with `--schedule=wsd` and its defaults.

    Args:
        config: of the command that goes on with it; what it sets itself stays.
        state: of the checkpoint; its `settings` are those of the run so far.
    """
    before, today = state.get("settings", {}), OptimOptions()
    if not config.optim.schedule == before.get("schedule") == "wsd":
        return config
    kept: dict[str, Any] = {
        name: value
        for name, value in EARLIER_DEFAULTS.items()
        if before.get(name) == value and getattr(config.optim, name) == getattr(today, name)
    }
    return replace(config, optim=replace(config.optim, **kept))


def current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint or config.toml under today's names of the options.

    What a cosine schedule does not read, or has by default today, gets today's default.
    """
    renamed = {new: settings[old] for old, new in RENAMED.items() if old in settings}
    renamed |= {name: value for name, value in settings.items() if name not in RENAMED}
    if renamed.get("schedule") == "cosine":
        for name, earlier in EARLIER_DEFAULTS.items():
            if renamed.get(name) == earlier:
                renamed[name] = getattr(OptimOptions(), name)
    size = renamed.get("size")
    return renamed | ({"size": OLD_SIZES[size]} if size in OLD_SIZES else {})
