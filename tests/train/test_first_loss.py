import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.model.gpt import GPT
from gpt2.model.modern import Modern
from gpt2.tokenizer import gpt2_tokenizer
from gpt2.train import first_loss
from gpt2.train.first_loss import check_first_loss, expected_on, read_tokens

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 256, "block_size": 32}
MAIN = SimpleNamespace(is_main=True)


@pytest.fixture(scope="module")
def code() -> np.ndarray:
    """Source code, in which spaces follow spaces."""
    return np.array(gpt2_tokenizer().encode(Path(argparse.__file__).read_text("utf-8")), np.uint16)


def state_of(model, tokens, start, sequences):
    """What `check_first_loss` looks at: the first sequences of a run."""
    shard = SimpleNamespace(read=lambda at, count: tokens[at : at + count])
    places = [(shard, start + 32 * i) for i in range(sequences)]
    order = SimpleNamespace(locate=lambda first, count: places[first:count])
    plan = SimpleNamespace(block_size=32)
    return SimpleNamespace(model=model, plan=plan, loader=SimpleNamespace(order=order))


def loss_of(model, tokens, start, sequences, shift=1):
    rows = np.array([tokens[start + 32 * i :][:33] for i in range(sequences)], np.int64)
    x, y = torch.tensor(rows[:, :-1]), torch.tensor(rows[:, shift : 32 + shift])
    with torch.no_grad():
        return model(x, y).item()


def check(loss, state, capsys, init=""):
    check_first_loss(loss, 32 * len(state.loader.order.locate(0, 999)), state, MAIN, init)
    return capsys.readouterr()


@pytest.mark.parametrize(
    "switches", [{}, {"mlp": "relu2", "positions": "rotary"}, {"zero_init": True}]
)
def test_code_in_small_steps_is_no_alarm(code, capsys, switches):
    lowest = 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        config = ModernConfig(**SHAPE, **switches) if switches else GPT2Config(**SHAPE)
        model = (Modern if switches else GPT)(config).eval()
        start, sequences = 1777 * seed, 1 + seed % 4
        state = state_of(model, code, start, sequences)
        loss = loss_of(model, code, start, sequences)
        lowest = min(lowest, loss - model.expected_first_loss())
        assert check(loss, state, capsys).out.endswith(": as expected\n")
    assert lowest < -0.5  # which was an alarm before


def test_a_token_that_sees_its_target_is_an_alarm(code, capsys):
    torch.manual_seed(1)
    model = GPT(GPT2Config(**SHAPE)).eval()
    rare = np.random.default_rng(0).permutation(50257).astype(np.uint16)
    state = state_of(model, rare, 0, 16)
    said = check(loss_of(model, rare, 0, 16, shift=0), state, capsys).err
    assert "of which 0% repeat the one before: a token sees its target" in said
    assert "learning rate" not in said
    assert said.count("\n") == 1
    assert check(loss_of(model, rare, 0, 16), state, capsys).err == ""


def test_another_initialisation_is_an_alarm(code, capsys):
    model = GPT(GPT2Config(**SHAPE)).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(5)
    state = state_of(model, code, 0, 16)
    said = check(loss_of(model, code, 0, 16), state, capsys).err
    assert "the initialisation or the scale of the logits was changed" in said


def test_tokens_of_a_step_are_counted(code):
    tokens = np.array([5, 5, 5, 7, 7, 9] * 20, np.uint16)
    seen = read_tokens(state_of(None, tokens, 0, 3), 96)
    # 32 inputs of each row: 5 5 5 7 7 9 5 5 …; targets repeat thrice in six
    assert (seen.count, seen.repeats) == (96, pytest.approx(0.5, abs=0.02))
    assert seen.spread == pytest.approx((0.5**2 + 0.33**2 + 0.17**2) ** 0.5, abs=0.02)


def test_more_tokens_leave_less_to_chance():
    model = GPT(GPT2Config(**SHAPE))
    state = SimpleNamespace(model=model)
    few, many = (first_loss.StepTokens(9, 0.1, spread) for spread in (0.5, 0.01))
    assert expected_on(few, state, 10.0)[1] > 2 * expected_on(many, state, 10.0)[1]
    assert expected_on(few, state, 10.0)[0] == pytest.approx(10 - 0.1 * model.own_logit())


def test_given_weights_are_compared_with_guessing(code, capsys):
    state = state_of(GPT(GPT2Config(**SHAPE)), code, 0, 1)
    assert "of the weights of box\n" in check(3.0, state, capsys, "box").out
    said = check(12.0, state, capsys, "box").err
    assert "is no better than guessing" in said and "of one tokenizer?" in said  # noqa: PT018
    first_loss.check_first_loss(12.0, 32, state, SimpleNamespace(is_main=True), "box", chat=True)
    said = capsys.readouterr().err
    assert said.endswith("the model knows nothing of such conversations yet\n")


@pytest.mark.parametrize("switches", [{}, {"mlp": "relu2"}, {"norm_embedding": True}])
def test_the_logit_of_the_token_just_read(switches):
    torch.manual_seed(0)
    shape = SHAPE | {"n_layer": 4}
    model = Modern(ModernConfig(**shape, **switches)) if switches else GPT(GPT2Config(**shape))
    x = torch.randint(0, 50257, (8, 32))
    with torch.no_grad():
        own = model(x).gather(-1, x[..., None]).mean().item()
    assert own == pytest.approx(model.own_logit(), rel=0.25)
