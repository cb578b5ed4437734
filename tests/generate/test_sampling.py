"""Filters, penalty and draws, beside transformers' and plain Python."""

import math

import pytest
import torch
import transformers

from gpt2.errors import UserError
from gpt2.generate.sampling import (
    MAX_PENALTY,
    MIN_PENALTY,
    Sampling,
    choose,
    filter_logits,
    penalise,
    uniforms,
)


@pytest.fixture
def logits():
    return torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p_equals_transformers(logits, min_p):
    theirs = transformers.MinPLogitsWarper(min_p)(None, logits / 0.7)
    torch.testing.assert_close(filter_logits(logits, 0.7, min_p=min_p), theirs)
    assert (theirs > -1e9).sum() < theirs.numel()


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty_equals_transformers(logits, penalty):
    ids = torch.tensor([[5, 6, 5], [1, 2, 3], [0, 299, 0], [7, 7, 7]])
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    seen = torch.zeros(4, 300, dtype=torch.bool).scatter(1, ids, True)
    torch.testing.assert_close(penalise(logits, seen, penalty), theirs)


def test_all_filters_together_equal_transformers(logits):
    theirs = logits / 0.8
    for warper in (
        transformers.TopKLogitsWarper(40),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.05),
    ):
        theirs = warper(None, theirs)
    ours = filter_logits(logits, 0.8, top_k=40, top_p=0.9, min_p=0.05)
    torch.testing.assert_close(ours, theirs)


def test_draw_is_the_inverse_of_the_cumulative_distribution():
    p = torch.tensor([[0.5, 0.0, 0.25, 0.25]])
    drawn = [choose(p.log(), torch.tensor([u]), Sampling()).item()
             for u in (0.0, 0.499, 0.501, 0.749, 0.751, 1 - 2**-24)]  # fmt: skip
    assert drawn == [0, 0, 2, 2, 3, 3]


def test_a_filtered_token_is_never_drawn(logits):
    allowed = filter_logits(logits, 1.0, top_k=3) > -1e9
    for u in torch.linspace(0, 1 - 2**-24, 500):
        token = choose(logits, u.expand(4), Sampling(top_k=3))
        assert allowed.gather(1, token[:, None]).all()


def test_numbers_of_a_row_depend_on_seed_and_row_alone():
    numbers = uniforms(5, 3, 50)
    assert torch.equal(numbers[:20], uniforms(5, 3, 20))
    assert torch.equal(numbers[:, 2], uniforms(7, 1, 50)[:, 0])
    assert not torch.equal(numbers[:, 0], numbers[:, 1])
    assert not torch.equal(uniforms(None, 1, 50), uniforms(None, 1, 50))


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": t} for t in (-1e-9, math.inf, math.nan)),
        *({"top_p": p} for p in (-0.1, 1.1, math.nan)),
        {"min_p": -0.1},
        {"min_p": 1.1},
        *({"repetition_penalty": p} for p in (-1.0, 0.0, 1e-30, 0.009, 101, 1e300, math.nan)),
    ],
)
def test_settings_that_mean_nothing(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e-8}, {"temperature": 9e-4}, {"top_p": 0}, {"top_p": 0, "top_k": 9}],
)
def test_temperatures_near_0_and_top_p_0_are_greedy(logits, settings):
    """Also where two tokens are equally likely: the first of them, whatever is drawn."""
    logits[:, 7] = logits[:, 3] = 99.0
    for u in (0.0, 0.5, 1 - 2**-24):
        tokens = choose(logits * 1e30, torch.full((4,), u), Sampling(**settings))
        assert tokens.tolist() == [3] * 4
    assert Sampling(**settings).temperature == 0


def test_the_lowest_temperature_that_draws():
    assert Sampling(temperature=1e-3).temperature == 1e-3


@pytest.mark.parametrize("penalty", [MIN_PENALTY, MAX_PENALTY])
def test_the_strongest_penalties_leave_numbers(logits, penalty):
    """Also where logits are large and the temperature is as low as it may be."""
    seen = torch.ones(4, 300, dtype=torch.bool)
    filtered = filter_logits(penalise(logits * 1e4, seen, penalty), 1e-3)
    assert filtered.softmax(-1).isfinite().all()
