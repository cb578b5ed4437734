"""What options are made of."""

from dataclasses import FrozenInstanceError, dataclass

import pytest

from gpt2.config.command_line import parse
from gpt2.config.commands import PrepareConfig, ServeConfig
from gpt2.config.finetune import FinetuneConfig
from gpt2.config.options import at_least, option, resolve
from gpt2.config.train import TrainConfig
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


@pytest.mark.parametrize(
    ("cls", "argument", "limit"),
    [
        (TrainConfig, "batch_size", "65,536"),
        (TrainConfig, "grad_accum_steps", "1,048,576"),
        (TrainConfig, "total_batch_tokens", "1,099,511,627,776"),
        (TrainConfig, "eval_tokens", "1,000,000,000,000,000"),
        (TrainConfig, "hang_timeout_seconds", "10,000,000"),
        (TrainConfig, "n_layer", "4,096"),
        (TrainConfig, "block_size", "16,777,216"),
        (FinetuneConfig, "lora_rank", "65,536"),
        (PrepareConfig, "num_workers", "1,024"),
        (PrepareConfig, "max_document_mb", "2,000"),
        (ServeConfig, "slots", "4,096"),
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_asked_for(cls, argument, limit):
    given = {"init": "x"} if cls is FinetuneConfig else {}
    words = [f"--{name}={value}" for name, value in given.items()]
    with pytest.raises(UserError, match=f"{argument}=.*: use (at most )?{limit}"):
        parse(cls, [*words, f"--{argument}={10**30}"], "gpt2 x")


def test_networks_of_absurd_size_are_refused():
    with pytest.raises(UserError, match="make a network of over 1,000,000,000,000 parameters"):
        parse(TrainConfig, ["--n_layer=4000", "--n_embd=100000", "--n_head=100"], "gpt2 train")
