"""Log-probabilities of a running batch, beside a forward pass of transformers' GPT-2."""

import pytest
import torch
import transformers

from gpt2.config.model import GPT2Config
from gpt2.generate.continuous_batch import BatchDecoder, Generation
from gpt2.generate.sampling import Sampling
from gpt2.huggingface.model_format import to_hf
from gpt2.model.gpt import GPT

from .test_continuous_batch import sharp_model

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 300}
SETTINGS = [
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3},
    {"temperature": 1.1, "top_p": 0.5, "min_p": 0.02},
]


@pytest.fixture(scope="module")
def model() -> GPT:
    return sharp_model(GPT2Config(**SHAPE))


@pytest.fixture(scope="module")
def theirs(model) -> transformers.GPT2LMHeadModel:
    """transformers' model with these weights."""
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=300, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    found = transformers.GPT2LMHeadModel(config).eval()
    found.load_state_dict(to_hf(model.state_dict()), strict=False)
    return found


def finish(batch: BatchDecoder, rows: list[Generation]) -> list[Generation]:
    for row in rows:
        batch.join(row)
    while batch.busy:
        batch.step()
    return rows


def check(row: Generation, prompt: int, theirs, tolerance: float = 1e-4):
    """Compares a row's log-probabilities with a plain forward pass over all of its tokens.

    Of its distribution: no setting of the sampling has an effect.
    """
    ids = torch.tensor(row.tokens)
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0].float().log_softmax(-1)
    first = 0 if row.prompt_logprobs else prompt
    assert [found.token for found in row.logprobs] == row.tokens[first:]
    for at, found in enumerate(row.logprobs, first):
        if at == 0:
            assert (found.logprob, found.top) == (None, ())
            continue
        expected = wanted[at - 1]
        assert found.logprob == pytest.approx(expected[found.token].item(), abs=tolerance)
        best = expected.topk(row.top_logprobs)
        assert len(found.top) == row.top_logprobs
        assert [p for _, p in found.top] == pytest.approx(best.values.tolist(), abs=tolerance)
        for token, p in found.top:
            assert p == pytest.approx(expected[token].item(), abs=tolerance)
        if found.token in dict(found.top):  # clients compare these floats for equality
            assert dict(found.top)[found.token] == found.logprob


def wanted_rows() -> list[Generation]:
    """Rows with and without log-probabilities, of the prompt as well, and of several counts."""
    prompts = [[5], [1, 2, 3], list(range(40)), [299, 7, 299, 8]]
    counts = [(5, True), (None, False), (0, True), (3, False)]
    return [
        Generation(
            tokens=list(prompt), limit=6 + i, sampling=Sampling(**SETTINGS[i % 3]), seed=i,
            top_logprobs=count, prompt_logprobs=whole,
        )
        for i, (prompt, (count, whole)) in enumerate(zip(prompts, counts, strict=True))
    ]  # fmt: skip


def test_they_are_those_of_transformers(model, theirs):
    rows = finish(BatchDecoder(model, 4), wanted_rows())
    for row, prompt in zip(rows, (1, 3, 40, 4), strict=True):
        if row.top_logprobs is None:
            assert row.logprobs == []
        else:
            check(row, prompt, theirs)


def test_whoever_asks_for_them_changes_no_token(model):
    """Beside the same rows without log-probabilities."""
    with_them = finish(BatchDecoder(model, 4), wanted_rows())
    plain = wanted_rows()
    for row in plain:
        row.top_logprobs, row.prompt_logprobs = None, False
    assert [r.tokens for r in finish(BatchDecoder(model, 4), plain)] == [
        r.tokens for r in with_them
    ]


def test_a_prompt_may_fill_the_context(model, theirs):
    """The one new token is predicted at the last position, and needs none itself."""
    row = Generation(tokens=list(range(64)), limit=1, top_logprobs=2, prompt_logprobs=True)
    finish(BatchDecoder(model, 1), [row])
    assert len(row.tokens) == len(row.logprobs) == 65
    row.tokens, row.logprobs = row.tokens[:64], row.logprobs[:64]
    check(row, 64, theirs)


def test_without_them_no_distribution_is_computed(model, monkeypatch):
    """A server's rate is that of its requests, most of which ask for none."""
    monkeypatch.setattr("gpt2.generate.continuous_batch.LogprobsCopy", None)
    finish(BatchDecoder(model, 1), [Generation(tokens=[1], limit=3)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_batch_gives_them_two_steps_late(model, theirs, dtype):
    batch = BatchDecoder(sharp_model(GPT2Config(**SHAPE)).cuda().to(dtype), 7, graph=True)
    rows = finish(batch, wanted_rows())
    for row, prompt in zip(rows, (1, 3, 40, 4), strict=True):
        if row.top_logprobs is not None:
            check(row, prompt, theirs, 1e-3 if dtype == torch.float32 else 0.6)
