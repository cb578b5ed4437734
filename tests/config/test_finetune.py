"""Defaults of fine-tuning."""

import dataclasses

import pytest

from gpt2.config.finetune import (
    FinetuneConfig,
    TuningData,
    TuningOptim,
    TuningOptions,
    tuning_options,
)
from gpt2.config.train import TrainConfig
from gpt2.errors import UserError


def test_only_fine_tuning_has_its_options():
    assert tuning_options(TrainConfig()) is None
    config = FinetuneConfig()
    assert tuning_options(config) is config.tuning


def test_defaults_are_resolved_in_the_config_and_not_in_the_groups_it_was_given():
    optim, data = TuningOptim(), TuningData()
    config = FinetuneConfig(optim=optim, data=data)
    assert (config.optim.learning_rate, config.data.grad_accum_steps) == (2e-4, 1)
    assert (optim.learning_rate, data.grad_accum_steps) == (0.0, 0)


@pytest.mark.parametrize("given", [{"grad_accum_steps": 4}, {"total_batch_tokens": 4096}])
def test_a_given_batch_is_kept(given):
    data = TuningData(**given)
    assert FinetuneConfig(data=data).data == dataclasses.replace(data, batch_size=8)


@pytest.mark.parametrize("given", [{"lora_alpha": 3.0}, {"lora_targets": "c_attn"}])
def test_options_of_adapters_need_adapters(given):
    with pytest.raises(UserError, match="is for adapters; give lora_rank as well"):
        FinetuneConfig(tuning=TuningOptions(**given))
    assert FinetuneConfig(tuning=TuningOptions(**given, lora_rank=2)).tuning.lora_rank == 2


def test_epochs_may_be_0():
    assert TuningOptions(epochs=0).epochs == 0
    with pytest.raises(UserError, match="epochs=-1: use 0, or a number above 0"):
        TuningOptions(epochs=-1)
    with pytest.raises(UserError, match="val_share=0: use a number above 0"):
        TuningOptions(val_share=0)
