"""Requests in the queue of an application in this process: each one ends, whatever happens."""

import json

import pytest

from gpt2.api import GPT2
from gpt2.config.model import GPT2Config
from gpt2.serve import log as log_module
from gpt2.serve import server
from gpt2.serve.engine import Engine, TextRequest
from gpt2.serve.responses import Answer
from gpt2.serve.served_model import ServedModel

TestClient = pytest.importorskip("starlette.testclient").TestClient  # needs httpx, extra `dev`

SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 256}
ADDED = 50260  # ids, of which three have no text in GPT-2's vocabulary


@pytest.fixture(scope="module")
def engine():
    return Engine(GPT2(GPT2Config(**SHAPE, vocab_size=ADDED)).eval(), 1, 20)


@pytest.fixture(scope="module")
def client(engine):
    served = ServedModel("added", 256, ADDED, "trained")
    with TestClient(server.make_app(engine, served), raise_server_exceptions=False) as opened:
        yield opened


def complete(client, **fields):
    return client.post("/v1/completions", json={"max_tokens": 4, **fields})


def test_echo_of_ids_that_gpt2_lacks(client, engine):
    """They have no text. The answer failed after the request was queued, and left it there."""
    answer = complete(client, prompt=[50258], echo=True, logprobs=1, max_tokens=60)
    assert answer.status_code == 200
    (choice,) = answer.json()["choices"]
    assert choice["logprobs"]["tokens"][0] == "token_id:50258"
    assert choice["logprobs"]["text_offset"][:2] == [0, 0]
    assert engine.count_texts() == (0, 0)


FAILING = {  # what raises, streamed or not: how the request is counted
    (server, "_cancel_when_gone", False): "failed",
    (server, "_cancel_when_gone", True): "failed",
    (server, "StreamingResponse", True): "failed",
    (server, "JSONResponse", False): "failed",
    (server, "event", True): "failed",
    (TextRequest, "pieces", False): "failed",
    (TextRequest, "pieces", True): "failed",
    (Answer, "whole", False): "failed",
    (Answer, "chunks", True): "failed",
    (Answer, "last", True): "done",  # behind the last token
}


@pytest.mark.parametrize(("owner", "name", "stream"), FAILING)
def test_whatever_raises_frees_the_slot_and_is_counted(
    client, engine, monkeypatch, owner, name, stream
):
    def fail(*_, **__):
        raise ZeroDivisionError

    before = dict(engine.counts)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        answer = complete(client, prompt="a", max_tokens=40, n=3, temperature=0, **options)
    assert stream or answer.status_code == 500
    how = FAILING[owner, name, stream]
    changed = {key: count - before[key] for key, count in engine.counts.items()}
    assert changed == dict.fromkeys(before, 0) | {how: 1}
    assert not engine._alive
    assert engine.count_texts() == (0, 0)
    assert complete(client, prompt="a").status_code == 200


def test_a_stream_that_fails_says_so(client, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(Answer, "last", fail)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    lines = complete(client, prompt="a", **options).text.split("\n\n")
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["error"]["message"] == "internal error (ZeroDivisionError)"


def test_a_log_that_nobody_reads_does_not_end_the_server(client, engine, monkeypatch):
    """As in `gpt2 serve … | head -2`."""

    def closed(_):
        raise BrokenPipeError

    monkeypatch.setattr(log_module.console, "log", closed)
    done = engine.counts["done"]
    assert complete(client, prompt="a").status_code == 200
    assert engine.counts["done"] == done + 1


def test_a_prompt_that_fills_the_context_is_scored(client):
    whole = list(range(256))
    answer = complete(client, prompt=whole, echo=True, logprobs=0, max_tokens=0)
    assert len(answer.json()["choices"][0]["logprobs"]["token_logprobs"]) == 256
    assert complete(client, prompt=whole, max_tokens=1).status_code == 400
    assert complete(client, prompt=[*whole, 1], max_tokens=0, echo=True).status_code == 400
    assert complete(client, prompt=whole, max_tokens=0).json()["error"]["param"] == "max_tokens"
