"""Options that mean nothing together are refused by name."""

import pytest

from gpt2.config import GPT2Config, ModelOptions, ModernConfig, TrainConfig, UserError
from gpt2.flags import parse


def test_defaults_are_the_faithful_network():
    assert type(ModelOptions().shape()) is GPT2Config
    assert type(ModelOptions(qk_norm=True).shape()) is ModernConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--muon_lr=1"], "muon_lr is for --optimizer=muon"),
        (["--optimizer=muon", "--dtype=float16"], "does not work with dtype=float16"),
        (["--cooldown=0.1"], "cooldown is for --schedule=wsd"),
        (["--head_lr=1"], "head_lr is for --untied_head"),
        (["--window_warmup=0.5"], "window_warmup is for --window_pattern"),
        (["--softcap=15", "--fp8=head"], "does not work with softcap"),
        (["--batch_warmup=2"], "use a share"),
        (["--window=5"], "give both"),
    ],
)
def test_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(TrainConfig, arguments, "gpt2 train")
