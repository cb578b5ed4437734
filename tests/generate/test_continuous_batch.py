"""Rows that join and leave a running batch get the tokens that they get alone."""

import random

import pytest
import torch

from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.generate.continuous_batch import BatchDecoder, Generation
from gpt2.generate.sampling import Sampling
from gpt2.generate.stream import generate
from gpt2.train.setup import network

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 300}
CONFIGS = {
    "gpt2": GPT2Config(**SHAPE),
    "rotary": ModernConfig(**SHAPE, positions="rotary", norm="rmsnorm", qk_norm=True),
    "windows": ModernConfig(**SHAPE, window_pattern="SL", window=8, document_mask=True),
}
SETTINGS = [
    {"temperature": 0},
    {"temperature": 0.9, "top_k": 40, "repetition_penalty": 1.3},
    {"temperature": 1.1, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 1.2},
]


def sharp_model(config):
    """Weights that make some tokens clearly likelier, so that rounding seldom decides."""
    torch.manual_seed(0)
    model = network(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.eval()


def requests(count: int) -> list[dict]:
    """Prompts of many lengths, some with the end-of-text token in them, and settings in turn."""
    dice = random.Random(0)
    made = []
    for i in range(count):
        prompt = [dice.randrange(300) for _ in range(dice.choice([1, 2, 5, 40]))]
        made.append({"tokens": prompt, "limit": dice.randint(1, 16), "seed": i, "at": i // 3,
                     "settings": SETTINGS[i % 4]})  # fmt: skip
    made[4]["tokens"] = [5, 299, 7, 299]
    return made


def alone(model, wanted: list[dict]) -> list[list[int]]:
    return [
        generate(model, [r["tokens"]], r["limit"], seed=r["seed"], **r["settings"])[0]
        for r in wanted
    ]


def together(batch: BatchDecoder, wanted: list[dict]) -> list[list[int]]:
    """Every request joins in the step it names, or as soon as there is a slot."""
    rows = [
        Generation(tokens=list(r["tokens"]), limit=r["limit"], seed=r["seed"],
            sampling=Sampling(**r["settings"]))
        for r in wanted
    ]  # fmt: skip
    waiting, step = list(zip(wanted, rows, strict=True)), 0
    while waiting or batch.busy:
        batch.leave()
        while waiting and waiting[0][0]["at"] <= step and len(batch.running) < batch.slots:
            batch.join(waiting.pop(0)[1])
        batch.step()
        step += 1
    return [r.tokens[len(w["tokens"]) :] for r, w in zip(rows, wanted, strict=True)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_get_the_tokens_that_they_get_alone(kind):
    model, wanted = sharp_model(CONFIGS[kind]), requests(20)
    expected = alone(model, wanted)
    assert len({tuple(row) for row in expected}) > 12
    batch = BatchDecoder(model, 6)
    for _ in range(2):  # used again
        assert together(batch, wanted) == expected
        assert not batch.running


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_recorded_batch_gives_the_same_tokens(kind):
    model, wanted = sharp_model(CONFIGS[kind]), requests(20)
    expected = alone(model, wanted)
    batch = BatchDecoder(model.cuda(), 7, graph=True)
    assert together(batch, wanted) == expected
    assert together(batch, wanted) == expected


@pytest.mark.gpu
def test_in_a_recorded_batch_of_bf16_no_row_changes_another():
    model, wanted = sharp_model(CONFIGS["gpt2"]).cuda().bfloat16(), requests(20)
    batch = BatchDecoder(model, 8, graph=True)
    assert together(batch, wanted) == [together(batch, [w | {"at": 0}])[0] for w in wanted]


def test_a_row_that_is_ended_from_outside_leaves_and_the_others_go_on():
    model = sharp_model(CONFIGS["gpt2"])
    batch = BatchDecoder(model, 4)
    rows = [
        Generation(tokens=[i, i + 1], limit=20, sampling=Sampling(temperature=0)) for i in range(4)
    ]
    for row in rows:
        batch.join(row)
    for _ in range(5):
        batch.step()
    rows[1].ended = True
    late = Generation(tokens=[9], limit=20, sampling=Sampling(temperature=0))
    batch.leave()
    assert len(batch.running) == 3
    batch.join(late)
    while batch.busy:
        batch.step()
    assert len(rows[1].tokens) == 7
    for row, prompt in ((rows[0], [0, 1]), (rows[2], [2, 3]), (rows[3], [3, 4]), (late, [9])):
        assert row.tokens == prompt + generate(model, [prompt], 20, temperature=0)[0]


def test_memory_grows_with_the_rows():
    batch = BatchDecoder(sharp_model(CONFIGS["gpt2"]), 32)
    assert batch.forward.cache.keys.shape[1] == 1
    for i in range(5):
        batch.join(Generation(tokens=[i], limit=3))
    assert batch.forward.cache.keys.shape[1] == 8


def test_without_a_seed_tokens_differ_every_time():
    model = sharp_model(CONFIGS["gpt2"])
    rows = [Generation(tokens=[1], limit=20) for _ in range(2)]
    batch = BatchDecoder(model, 2)
    for row in rows:
        batch.join(row)
    while batch.busy:
        batch.step()
    assert rows[0].tokens != rows[1].tokens
