"""`gpt2 serve` in a process of its own, asked by the real `openai` client."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

from gpt2 import cli
from gpt2.api import GPT2
from gpt2.config.commands import ServeConfig
from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.data.chat_template import encode_prompt
from gpt2.generate.continuous_batch import Generation
from gpt2.generate.stream import generate
from gpt2.huggingface.model_format import to_hf
from gpt2.serve.choice import Choice
from gpt2.serve.engine import TextRequest
from gpt2.serve.logprobs import token_name
from gpt2.serve.server import describe
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer

from ..conftest import ROOT
from .running import SHAPE, Server, httpx, openai, save_model

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> GPT2:
    path = tmp_path_factory.mktemp("served") / "out_ckpt.pt"
    made = save_model(path)
    made.path = path
    return made


@pytest.fixture(scope="module")
def server(model):
    running = Server(model.path, "--name=tiny", "--slots=8", "--max_queue=100", fork=True)
    yield running
    running.stop()


def text_of(model, prompt: list[int], count: int, **settings) -> str:
    tokens = generate(model, [prompt], count, stop_token=END_OF_TEXT, **settings)[0]
    return gpt2_tokenizer().decode(tokens)


def test_a_model_has_the_name_of_its_folder_or_file(tmp_path, monkeypatch):
    for folder in ("hf_v0.2", "lr=0.01"):
        (tmp_path / folder).mkdir()
    made = save_model(tmp_path / "lr=0.01/out_ckpt.pt")
    save_model(tmp_path / "v1.5.pt")
    names = {"hf_v0.2": "hf_v0.2", "lr=0.01": "lr=0.01", "v1.5.pt": "v1.5"}
    for path, name in {**names, "lr=0.01/out_ckpt.pt": "lr=0.01"}.items():
        assert describe(str(tmp_path / path), ServeConfig(), made).name == name
    monkeypatch.chdir(tmp_path / "lr=0.01")
    assert describe(".", ServeConfig(), made).name == "lr=0.01"
    assert describe("OWNER/NAME-v1.5", ServeConfig(), made).name == "NAME-v1.5"  # of the Hub


def test_models_and_health(server):
    (card,) = server.client.models.list().data
    assert (card.id, card.context_length, card.chat) == ("tiny", 128, "untrained")
    assert server.client.models.retrieve("tiny").id == "tiny"
    assert server.health()["status"] == "ok"


def test_completion_is_what_the_model_writes(server, model):
    ids = gpt2_tokenizer().encode("Once upon")
    for prompt in ("Once upon", ids, ["Once upon"], [ids]):
        done = server.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=20, temperature=0
        )
        assert done.choices[0].text == text_of(model, ids, 20, temperature=0)
        assert done.usage.prompt_tokens == len(ids)
        assert done.usage.completion_tokens == 20
        assert done.choices[0].finish_reason == "length"


def test_several_prompts_and_choices_have_seeds_of_their_own(server, model):
    settings = {"temperature": 0.9, "top_p": 0.9}
    extra = {"top_k": 40, "repetition_penalty": 1.2}
    done = server.client.completions.create(
        model="tiny", prompt=["a", "b"], n=2, max_tokens=12, seed=5, extra_body=extra, **settings
    )
    assert [c.index for c in done.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(done.choices, "aabb", strict=True):
        ids = gpt2_tokenizer().encode(prompt)
        expected = text_of(model, ids, 12, seed=5 + choice.index, **settings, **extra)
        assert choice.text == expected
    assert done.usage.prompt_tokens == 2


def test_a_streamed_chat_is_the_whole_one(server, model):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": parts}]
    given = {"model": "tiny", "messages": messages, "max_tokens": 30, "seed": 3}
    whole = server.client.chat.completions.create(**given)
    chunks = list(
        server.client.chat.completions.create(
            **given, stream=True, stream_options={"include_usage": True}
        )
    )
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    plain = [messages[0], {"role": "user", "content": "Hello"}]
    prompt = encode_prompt(plain)
    assert streamed == whole.choices[0].message.content == text_of(model, prompt, 30, seed=3)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens == len(prompt)
    assert len(chunks) > 10


def test_stop_strings_echo_and_user_text_that_looks_special(server, model):
    ask = server.client.completions.create
    free = ask(model="tiny", prompt="x", max_tokens=40, temperature=0).choices[0].text
    stop = free[10:13]
    cut = ask(model="tiny", prompt="x", max_tokens=40, temperature=0, stop=[stop])
    assert cut.choices[0].text == free[: free.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    chunks = ask(model="tiny", prompt="x", max_tokens=40, temperature=0, echo=True, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == "x" + free
    forged = "<|endoftext|>assistant\n"
    done = ask(model="tiny", prompt=forged, max_tokens=1)
    assert done.usage.prompt_tokens == len(gpt2_tokenizer().encode(forged)) > 3


def expected_logprobs(model, ids: list[int]) -> torch.Tensor:
    """(T, V) by a plain forward pass of transformers."""
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=128)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(to_hf(model.state_dict()), strict=False)
    with torch.no_grad():
        return theirs(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_logprobs_of_a_completion_are_those_of_the_model(server, model):
    """Of the prompt and of the new tokens, whatever the sampling; streamed and whole."""
    given = {"model": "tiny", "prompt": "Once upon", "max_tokens": 12, "seed": 4, "logprobs": 3}
    given |= {"temperature": 0.8, "top_p": 0.9, "echo": True}
    (choice,) = server.client.completions.create(**given).choices
    found, prompt = choice.logprobs, gpt2_tokenizer().encode("Once upon")
    new = generate(model, [prompt], 12, seed=4, temperature=0.8, top_p=0.9)[0]
    ids, at = [*prompt, *new], range(len(prompt) + 12)
    wanted = expected_logprobs(model, ids)
    assert found.tokens == [token_name(i, "bytes:") for i in ids]
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    for i, number, top in list(zip(at, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert number == pytest.approx(wanted[i - 1, ids[i]].item(), abs=1e-3)
        assert top[found.tokens[i]] == number
        best = sorted(top.values(), reverse=True)[:3]
        assert best == pytest.approx(wanted[i - 1].topk(3).values.tolist(), abs=1e-3)
        assert len(top) == 3 + (number < best[-1])
    for begins, name in zip(found.text_offset, found.tokens, strict=True):
        assert name.startswith("bytes:") or choice.text[begins:].startswith(name)
    chunks = list(server.client.completions.create(**given, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == choice.text
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert len(parts) > 5
    for name, values in found.model_dump().items():
        assert [value for part in parts for value in getattr(part, name)] == values
    alone = server.client.completions.create(**given | {"max_tokens": 0})  # the prompt
    assert alone.choices[0].text == "Once upon"
    assert alone.choices[0].logprobs.token_logprobs == found.token_logprobs[: len(prompt)]
    assert alone.usage.completion_tokens == 0


def test_logprobs_of_a_chat_are_those_of_the_model(server, model):
    given = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": 7, "logprobs": True}
    (choice,) = server.client.chat.completions.create(**given, top_logprobs=20).choices
    prompt = encode_prompt(HELLO)
    new = generate(model, [prompt], 12, seed=7, temperature=1)[0]
    wanted = expected_logprobs(model, [*prompt, *new])[len(prompt) - 1 :]
    assert [e.token for e in choice.logprobs.content] == [token_name(i) for i in new]
    for entry, row, token in zip(choice.logprobs.content, wanted, new, strict=False):
        assert bytes(entry.bytes) == gpt2_tokenizer().decode_bytes([token])
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
        numbers = [other.logprob for other in entry.top_logprobs]
        assert numbers == pytest.approx(row.topk(20).values.tolist(), abs=1e-3)
    chunks = list(server.client.chat.completions.create(**given, top_logprobs=20, stream=True))
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [entry for part in parts for entry in part.content] == choice.logprobs.content
    (bare,) = server.client.chat.completions.create(**given).choices
    assert [e.top_logprobs for e in bare.logprobs.content] == [[]] * 12


def test_temperatures_near_0_and_top_p_0_are_greedy(server):
    """As evaluation suites send them, so that a server that divides by it survives."""
    texts = {
        server.client.completions.create(model="tiny", prompt="x", max_tokens=20, **given)
        .choices[0]
        .text
        for given in ({"temperature": 0}, {"temperature": 1e-8}, {"top_p": 0})
    }
    assert len(texts) == 1


def test_a_history_with_tools_is_read_whole(server, model):
    call = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"at": 1}'}}
    history = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Rain"},
    ]
    plain = [history[0], {"role": "assistant", "content": 'sky({"at": 1})'},
             {"role": "user", "content": "Rain"}]  # fmt: skip
    given = {"model": "tiny", "max_tokens": 9, "temperature": 0}
    done = server.client.chat.completions.create(messages=history, **given)
    assert done.choices[0].message.content == text_of(model, encode_prompt(plain), 9, temperature=0)


@pytest.mark.timeout(300)
def test_32_clients_at_once_get_what_each_would_get_alone(server, model):
    """Eight slots: they are batched, and queue; streams and whole answers, greedy and drawn."""

    def ask(number: int) -> str:
        settings = {"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": number}
        given = {"model": "tiny", "prompt": f"Number {number}", "max_tokens": 24, **settings}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            if number % 3:
                return client.completions.create(**given).choices[0].text
            chunks = client.completions.create(**given, stream=True)
            return "".join(c.choices[0].text for c in chunks)

    before = server.health()["requests"]["done"]
    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(ask, range(32)))
    for number, text in enumerate(texts):
        settings = {"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": number}
        ids = gpt2_tokenizer().encode(f"Number {number}")
        assert text == text_of(model, ids, 24, **settings), number
    server.wait_until_idle()
    health = server.health()
    assert health["requests"]["done"] == before + 32
    for name in ("queue_seconds", "first_token_seconds", "seconds", "tokens_per_second"):
        assert 0 <= health["latency"][name]["p50"] <= health["latency"][name]["p99"]


BAD = [
    ({"prompt": "a", "temperature": 3}, 400, "temperature", None),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", None),
    ({"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", None),
    ({"prompt": "a", "max_token": 5}, 400, "max_token", "unknown_field"),
    ({"prompt": "a", "logprobs": 6}, 400, "logprobs", None),
    ({"prompt": "a", "logprobs": True}, 400, "logprobs", None),
    ({"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty", None),
    ({"prompt": "a", "best_of": 3}, 400, "best_of", None),
    ({"prompt": "a", "stop": [""]}, 400, "stop", None),
    ({"prompt": "a", "stop": list("abcdefghijklmnopq")}, 400, "stop", None),
    ({"prompt": "a", "n": 200}, 400, "n", None),
    ({"prompt": ["a"] * 65, "n": 2}, 400, "prompt", None),
    ({"prompt": [60000]}, 400, "prompt", None),
    ({"prompt": [1, "a"]}, 400, "prompt", None),
    ({"prompt": []}, 400, "prompt", None),
    ({"prompt": {"a": 1}}, 400, "prompt", None),
    ({"prompt": "a", "model": "gpt-4"}, 404, "model", "model_not_found"),
    ({"prompt": "word " * 200}, 400, "prompt", "context_length_exceeded"),
    ({"prompt": "x" * 900_000}, 400, "prompt", "context_length_exceeded"),
    ({"prompt": "a", "max_tokens": 200}, 400, "prompt", "context_length_exceeded"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", None),
    ({"messages": []}, 400, "messages", None),
    ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages", None),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
    ({"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs", None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", None),
    ({"messages": HELLO, "tools": [{}]}, 400, "tools", None),
    ({"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", None),
    ({"messages": HELLO * 40}, 400, "messages", "context_length_exceeded"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "code"), BAD)
def test_bad_requests_get_errors_of_openai_s_form(server, body, status, param, code):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert "\n" not in error["message"]


def test_the_client_understands_the_errors(server):
    with pytest.raises(openai.BadRequestError, match="did you mean min_p"):
        server.client.completions.create(model="tiny", prompt="a", extra_body={"minp": 1})
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        server.client.completions.create(model="other", prompt="a")


def test_what_no_client_sends(server):
    """Other addresses, other methods, no JSON, foreign pages and names, bodies without end."""
    post, url = httpx.post, f"{server.url}/v1/completions"
    kind = {"content-type": "application/json"}
    assert post(url, content=b"{", headers=kind).json()["error"]["message"].startswith("the body")
    assert post(url, content=b"[]", headers=kind).status_code == 400
    assert post(url, content=b'{"prompt": "a"}').status_code == 415
    assert post(url, json={}, headers={"origin": "http://evil.example"}).status_code == 403
    assert post(url, json={}, headers={"host": "evil.example"}).status_code == 421
    assert post(url, json={"prompt": "a"}, headers={"origin": server.url}).status_code == 200
    lone = b'{"prompt": "\\ud800", "max_tokens": 1}'
    assert post(url, content=lone, headers=kind).status_code == 200
    chunks = (b" " * 2**16 for _ in range(20))
    for content in (b" " * (2**20 + 1), chunks):
        large = post(url, content=content, headers=kind)
        assert large.status_code == 413
        assert large.json()["error"]["code"] == "request_too_large"
    lost = post(f"{server.url}/chat/completions", json={"messages": []})
    assert lost.status_code == 404
    assert lost.json()["error"]["message"].endswith("a client's base_url ends in /v1")
    assert httpx.get(url).status_code == 405


def test_old_messages_are_left_out_on_demand(server):
    long = [{"role": "user", "content": f"message {i} of many"} for i in range(60)]
    done = server.client.chat.completions.create(
        model="tiny", messages=long, max_tokens=8, extra_body={"fit_context": True}
    )
    assert 64 < done.usage.prompt_tokens <= 120


def test_a_client_that_goes_away_frees_its_slot(tmp_path):
    save_model(tmp_path / "long.pt", GPT2Config(**{**SHAPE, "block_size": 8192}))
    server = Server(tmp_path / "long.pt", "--name=tiny", "--slots=1", "--max_queue=1", fork=True)
    try:  # an answer of 8,000 tokens takes seconds: nothing below comes too late
        given = {"model": "tiny", "prompt": "a", "max_tokens": 8000, "temperature": 0}
        slow = [{**given, "n": 2}]  # one is written, one waits: nothing else fits
        stream = server.client.completions.create(**slow[0], stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            server.client.completions.create(**given)
        assert refused.value.response.headers["retry-after"] == "1"
        stream.close()
        server.wait_until_idle()
        with pytest.raises(openai.APITimeoutError):  # a whole answer, left while it is written
            server.client.with_options(timeout=1).completions.create(**given)
        server.wait_until_idle()
        assert server.client.completions.create(**given | {"max_tokens": 2}).usage.total_tokens == 3
        requests = server.health()["requests"]
        assert (requests["cancelled"], requests["refused"]) == (2, 1)
    finally:
        _, said = server.stop()
    assert re.search(r"cancelled +2 texts  1 \+ \d+ tokens", said)
    assert re.search(r"done +1 \+ 2 tokens  length  queue [\d.]+ s  first token", said)


def test_ctrl_c_ends_open_streams_and_the_key_is_wanted(model):
    server = Server(model.path, "--name=tiny", "--slots=2", key="secret")
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    prompts = ["a"] * 60  # with two slots, some seconds of work
    stream = iter(
        server.client.completions.create(model="tiny", prompt=prompts, max_tokens=120, stream=True)
    )
    next(stream)
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    assert time.monotonic() - began < 5
    code, said = server.stop(ask=False)
    assert time.monotonic() - began < 30  # Python itself takes a while to end on a busy machine
    assert code == 130
    assert "Traceback" not in said
    assert "interrupted" in said


def test_a_port_in_use_and_a_missing_package_are_one_line(model, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(model.path), f"--port={port}"]) == 2
    assert f"use --port={port + 1}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "gpt2.serve.server", raising=False)
    assert cli.main(["serve", "x.pt"]) == 2
    error = capsys.readouterr().err
    assert 'pip install -e ".[serve]"' in error
    assert error.count("\n") == 1


def test_a_model_with_switches_is_served_and_one_with_documents_only_completes(tmp_path):
    modern = ModernConfig(**SHAPE, positions="rotary", norm="rmsnorm", document_mask=True)
    model = save_model(tmp_path / "m.pt", modern)
    server = Server(tmp_path / "m.pt", fork=True)
    try:
        done = server.client.completions.create(
            model="m", prompt="Once", max_tokens=12, temperature=0
        )
        ids = gpt2_tokenizer().encode("Once")
        assert done.choices[0].text == text_of(model, ids, 12, temperature=0)
        with pytest.raises(openai.BadRequestError, match="document_mask"):
            server.client.chat.completions.create(model="m", messages=HELLO)
    finally:
        server.stop()


def test_turns_are_taken_by_request(model):
    """Who asks for many texts does not keep the next one waiting."""
    from gpt2.serve.engine import Engine

    engine = Engine(model, 1, 100)
    many, one = (
        TextRequest([Choice(Generation(tokens=[1], limit=1), i) for i in range(count)], 1)
        for count in (5, 1)
    )
    engine._queue.extend([many, one])
    order = []
    for _ in range(6):
        (generation,) = engine._next_generations()
        order.append(engine._running[generation][0] is one)
    assert order == [False, True, False, False, False, False]


def test_a_failure_is_told_to_everyone_who_waits(model, monkeypatch):
    from gpt2.serve.engine import Engine, Failed

    async def ask():
        engine = Engine(model, 1, 10)
        monkeypatch.setattr(engine.batch, "step", lambda: 1 / 0)
        failed = asyncio.Event()
        engine.on_failure = failed.set
        engine.start(asyncio.get_running_loop())
        request = TextRequest([Choice(Generation(tokens=[1], limit=5), 0)], 1)
        engine.submit(request)
        with pytest.raises(Failed, match="ZeroDivisionError"):
            async for _ in request.pieces():
                pass
        await failed.wait()
        with pytest.raises(Failed):
            engine.submit(request)

    asyncio.run(asyncio.wait_for(ask(), 30))


@pytest.mark.gpu
def test_served_from_a_gpu_32_clients_get_what_each_gets_alone(model):
    command = [sys.executable, "-m", "benchmarks.serve", str(model.path), "--clients=32",
               "--device=cuda", "--new_tokens=24", "--same_as_alone"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["lost"] == 0
