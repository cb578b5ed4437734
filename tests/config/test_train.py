"""Shapes, sizes and the arithmetic of batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.config.model import GPT2Config, to_dict
from gpt2.config.train import (
    DataOptions,
    ModelOptions,
    OptimOptions,
    TrainConfig,
    plan_batch,
    warmup_steps,
)
from gpt2.errors import UserError


def test_defaults_are_gpt2_124m():
    shape = TrainConfig().model.shape()
    assert to_dict(shape) == {
        "block_size": 1024,
        "vocab_size": 50257,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
    }
    assert shape.padded_vocab_size == 50304


def test_default_step_is_half_a_million_tokens_on_1_2_4_8_ranks():
    for ranks in (1, 2, 4, 8):
        assert plan_batch(DataOptions(), 1024, ranks).tokens_per_step == 524_288


@given(
    batch=st.integers(1, 64),
    block=st.integers(1, 2048),
    accum=st.integers(1, 64),
    world=st.integers(1, 64),
)
def test_both_ways_to_give_a_batch_agree(batch, block, accum, world):
    by_steps = plan_batch(DataOptions(batch_size=batch, grad_accum_steps=accum), block, world)
    total = batch * block * accum * world
    by_total = plan_batch(DataOptions(batch_size=batch, total_batch_tokens=total), block, world)
    assert by_steps == by_total
    assert by_steps.tokens_per_step == total == by_steps.sequences_per_step * block
    both = DataOptions(batch_size=batch, grad_accum_steps=accum, total_batch_tokens=total)
    assert plan_batch(both, block, world) == by_steps


@given(total=st.integers(1, 10_000), batch=st.integers(1, 9), world=st.integers(1, 9))
@pytest.mark.fault(24, "totals that no number of micro-batches gives")
def test_values_named_in_the_error_work(total, batch, world):
    data = DataOptions(batch_size=batch, total_batch_tokens=total)
    try:
        plan = plan_batch(data, 16, world)
    except UserError as error:
        named = str(error).split("--total_batch_tokens=")[1].split(",")[0].split(" or ")
        for value in map(int, named):
            fixed = DataOptions(batch_size=batch, total_batch_tokens=value)
            assert plan_batch(fixed, 16, world).tokens_per_step == value
    else:
        assert plan.tokens_per_step == total


def test_disagreeing_totals_name_the_right_one():
    data = DataOptions(batch_size=8, grad_accum_steps=4, total_batch_tokens=1000)
    with pytest.raises(UserError, match="--total_batch_tokens=32768"):
        plan_batch(data, 1024, 1)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="use n_embd=763 or 770"):
        GPT2Config(n_head=7)


@pytest.mark.parametrize(
    ("field", "value"), [("n_layer", 0), ("block_size", -1), ("dropout", 1.0), ("n_embd", 1.5)]
)
def test_impossible_shapes(field, value):
    with pytest.raises(UserError, match=field):
        GPT2Config(**{field: value})


def test_size_and_overrides():
    shape = ModelOptions(size="gpt2-xl", n_layer=2, block_size=64).shape()
    assert (shape.n_layer, shape.n_head, shape.n_embd, shape.block_size) == (2, 25, 1600, 64)


def test_foreign_config_is_refused():
    good = to_dict(GPT2Config())
    assert GPT2Config.from_dict(good) == GPT2Config()
    with pytest.raises(UserError, match="rotary"):
        GPT2Config.from_dict(good | {"rotary": True})
    assert GPT2Config.from_dict(good | {"bigram_rows": 0}) == GPT2Config()  # of an older version
    with pytest.raises(UserError, match=r"describe a GPT-2: a\\nb$"):
        GPT2Config.from_dict(good | {"a\nb": 1})
    with pytest.raises(UserError, match="bigram_rows"):
        GPT2Config.from_dict(good | {"bigram_rows": 9})
    with pytest.raises(UserError, match="n_head"):
        GPT2Config.from_dict({k: v for k, v in good.items() if k != "n_head"})


def test_warmup_default_is_a_share_of_the_run():
    assert warmup_steps(OptimOptions()) == 715
    assert warmup_steps(OptimOptions(max_steps=1000)) == 37
    assert warmup_steps(OptimOptions(warmup_steps=0)) == 0
