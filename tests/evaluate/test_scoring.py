"""Scores of continuations against transformers, one row at a time."""

import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from gpt2.config.model import GPT2Config, to_dict
from gpt2.distributed.runtime import Runtime
from gpt2.evaluate.scoring import plan_batches, score
from gpt2.huggingface.model_format import to_hf
from gpt2.model.gpt import GPT
from gpt2.train.compilation import compile_network

RT = Runtime(torch.device("cpu"), torch.float32)
WINDOW = 24


def in_transformers(model: GPT) -> GPT2LMHeadModel:
    shape = {k: v for k, v in to_dict(model.config).items() if k not in ("block_size", "dropout")}
    theirs = GPT2LMHeadModel(HFConfig(n_positions=model.config.block_size, **shape)).eval()
    theirs.load_state_dict(to_hf(model.state_dict()), strict=False)
    return theirs


def small_model(window: int = WINDOW, spread: float = 8.0) -> GPT:
    """Weights that are large enough for one token to be clearly likelier than another."""
    torch.manual_seed(5)
    model = GPT(GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=window, dropout=0.4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return model


@torch.no_grad()
def by_transformers(theirs: GPT2LMHeadModel, context: list[int], ids: list[int]):
    tokens = torch.tensor([*context, *ids])[-theirs.config.n_positions - 1 :]
    logits = theirs(tokens[None, :-1]).logits[0]
    logprobs = logits.log_softmax(-1)[-len(ids) :]
    wanted = tokens[1:][-len(ids) :]
    nats = -logprobs.gather(-1, wanted[:, None]).sum().item()
    return nats, len(wanted), bool((logprobs.argmax(-1) == wanted).all())


def rows_of(model: GPT, count: int) -> list[tuple[list[int], list[int]]]:
    """Random rows of all lengths, some beyond the window; every third is what the model likes."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        length = int(torch.randint(2, 2 * WINDOW, (), generator=generator))
        ids = torch.randint(0, 50257, (length,), generator=generator).tolist()
        cut = int(torch.randint(1, length, (), generator=generator))
        row = (ids[:cut], ids[cut:])
        if i % 3 == 0:
            with torch.no_grad():
                likeliest = model.eval()(torch.tensor([ids[:cut][-WINDOW:]]))[0, -1].argmax()
            row = (ids[:cut], [int(likeliest)])
        rows.append(row)
    return rows


@pytest.mark.parametrize("batch_tokens", [0, 1, 64])
def test_every_row_equals_transformers(batch_tokens):
    model = small_model()
    theirs, rows = in_transformers(model), rows_of(model, 60)
    found = score(model.train(), rows, RT, batch_tokens=batch_tokens)
    assert model.training  # as before
    wanted = [by_transformers(theirs, *row) for row in rows]
    assert [s.nats for s in found] == pytest.approx([w[0] for w in wanted], rel=1e-5)
    assert [s[1:] for s in found] == [w[1:] for w in wanted]
    assert 20 <= sum(s.greedy for s in found) < 60


def test_random_numbers_are_left_alone():
    model = small_model().train()
    before = torch.get_rng_state()
    score(model, rows_of(model, 5), RT)
    assert torch.equal(before, torch.get_rng_state())


def test_a_signal_leaves_it():
    rt = Runtime(torch.device("cpu"), torch.float32, stop_signal=signal.SIGTERM)
    assert score(small_model(), [([1], [2])], rt) is None


@given(lengths=st.lists(st.integers(1, 300), max_size=80), budget=st.integers(1, 2000))
def test_batches_hold_every_row_once_and_keep_to_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(i for _, indices in batches for i in indices) == list(range(len(lengths)))
    for width, indices in batches:
        assert len(indices) == 1 or len(indices) * width <= budget
        assert max(lengths[i] for i in indices) <= width < max(lengths[i] for i in indices) + 16


@pytest.mark.slow
def test_compiled_model_compiles_nothing_more():
    from gpt2.distributed.devices import choose_compile

    if not choose_compile("True", torch.device("cpu"))[0]:
        pytest.skip("no torch.compile here")
    from torch._dynamo.utils import counters

    model = small_model()
    rows = rows_of(model, 30)
    plain = score(model, rows, RT, batch_tokens=32)
    model.compile(backend="eager")  # what is compiled is counted, not what comes of it
    x = torch.zeros(2, 8, dtype=torch.int64)
    with torch.no_grad():
        model.train()(x, x, reduction="sum")
        frames = dict(counters["frames"])
        assert frames["ok"] >= 1
        assert score(model, rows, RT, batch_tokens=32) == plain
        model(x, x, reduction="sum")
    assert dict(counters["frames"]) == frames


@pytest.mark.gpu
def test_on_a_gpu():
    rt = Runtime(torch.device("cuda", 0), torch.float32)
    model = small_model()
    rows = rows_of(model, 40)
    plain = score(model, rows, RT)
    found = score(model.to(rt.device), rows, rt)
    assert [s.nats for s in found] == pytest.approx([s.nats for s in plain], rel=1e-2)
    assert [s.tokens for s in found] == [s.tokens for s in plain]


def test_no_length_is_compiled():
    """Blocks that are compiled alone would be compiled anew for each new length."""
    model = small_model()
    rows = rows_of(model, 12)
    expected = score(model, rows, RT)
    compile_network(model, sharded=False)
    assert model.compiled_apart
    before = dict(torch._dynamo.utils.counters["stats"])
    assert score(model, rows, RT) == expected
    assert dict(torch._dynamo.utils.counters["stats"]) == before
    model(torch.tensor([[1, 2]]))  # the counter counts
    assert dict(torch._dynamo.utils.counters["stats"]) != before
