"""Defaults of fine-tuning."""

import dataclasses

import pytest

from gpt2.config.finetune import FinetuneConfig, TuningData, TuningOptim, tuning_options
from gpt2.config.train import TrainConfig


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
