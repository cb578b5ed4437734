"""What options are made of."""

from dataclasses import FrozenInstanceError, dataclass

import pytest

from gpt2.config.options import at_least, option, resolve
from gpt2.errors import UserError


def test_an_option_carries_its_text():
    field = option(3, "how many", alias="n")
    assert (field.default, field.metadata["help"], field.metadata["alias"]) == (3, "how many", "n")


def test_what_is_too_small_is_named():
    at_least(1, steps=1)
    with pytest.raises(UserError, match="steps=0: use 1 or more"):
        at_least(1, steps=0)


def test_a_frozen_config_resolves_its_own_defaults_only():
    @dataclass(frozen=True)
    class Config:
        size: str = option("auto", "how large")

        def __post_init__(self):
            resolve(self, size="small" if self.size == "auto" else self.size)

    assert (Config().size, Config("large").size) == ("small", "large")
    with pytest.raises(FrozenInstanceError):
        Config().size = "auto"
