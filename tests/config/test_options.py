"""What options are made of."""

import pytest

from gpt2.config.options import at_least, option
from gpt2.errors import UserError


def test_an_option_carries_its_text():
    field = option(3, "how many", alias="n")
    assert (field.default, field.metadata["help"], field.metadata["alias"]) == (3, "how many", "n")


def test_what_is_too_small_is_named():
    at_least(1, steps=1)
    with pytest.raises(UserError, match="steps=0: use 1 or more"):
        at_least(1, steps=0)
