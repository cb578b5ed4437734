"""`gpt2 serve` as people's programs ask it: by OpenAI's client, langchain-openai and litellm.

A client that is not installed is left out. litellm is in the extra `clients`, which `make lowest`
and `make newest` install, and not in `dev`: it is 160 MB and takes six seconds to import.
"""

import importlib
from types import SimpleNamespace

import pytest

from gpt2.data.chat_template import encode_prompt
from gpt2.generate.stream import generate
from gpt2.serve.logprobs import token_name
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer

for needed in ("httpx", "openai"):  # extra `dev`
    pytest.importorskip(needed)

from .running import Server, save_model  # noqa: E402 - needs them

CALL = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": "{}"}}
HISTORY = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "Rain"},
]
SHOWN = [*HISTORY[:2], {"role": "assistant", "content": "sky({})"},
         {"role": "user", "content": "Rain"}]  # fmt: skip
TOKENS = 12


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a server, and what its model answers greedily to the history."""
    path = tmp_path_factory.mktemp("clients") / "tiny.pt"
    model = save_model(path)
    ids = generate(model, [encode_prompt(SHOWN)], TOKENS, temperature=0, stop_token=END_OF_TEXT)[0]
    running = Server(path, "--name=tiny", fork=True)
    yield SimpleNamespace(
        url=f"{running.url}/v1",
        client=running.client,
        answer=gpt2_tokenizer().decode(ids),
        tokens=[token_name(i) for i in ids],
        health=running.health,
    )
    running.stop()


def module(name: str):
    """An optional client."""
    pytest.importorskip(name)
    return importlib.import_module(name)


def test_openai(served):
    """In its version 2 or 3, by all that it sends of itself."""
    given = {"model": "tiny", "messages": HISTORY, "max_completion_tokens": TOKENS,
             "temperature": 0, "logprobs": True, "top_logprobs": 2, "n": 1, "tools": [],
             "tool_choice": "none", "response_format": {"type": "text"}}  # fmt: skip
    done = served.client.chat.completions.create(**given)
    assert done.choices[0].message.content == served.answer
    assert [entry.token for entry in done.choices[0].logprobs.content] == served.tokens
    with served.client.chat.completions.stream(
        model="tiny", messages=HISTORY, temperature=0, max_tokens=TOKENS, logprobs=True
    ) as stream:
        stream.until_done()
        final = stream.current_completion_snapshot
    assert final.choices[0].message.content == served.answer
    assert [entry.token for entry in final.choices[0].logprobs.content] == served.tokens
    raw = served.client.chat.completions.with_raw_response.create(**given)
    assert raw.http_response.status_code == 200
    text = served.client.completions.create(
        model="tiny", prompt=["a", [64]], n=2, best_of=2, max_tokens=2, logprobs=5, echo=True
    )
    assert [choice.logprobs.tokens[0] for choice in text.choices] == ["a"] * 4


def test_langchain(served):
    messages = module("langchain_core.messages")
    chat = module("langchain_openai").ChatOpenAI(
        base_url=served.url, api_key="none", model="tiny", temperature=0, max_tokens=TOKENS,
        max_retries=0, logprobs=True, top_logprobs=2,
    )  # fmt: skip
    call = {"name": "sky", "args": {}, "id": "c1"}
    history = [
        messages.SystemMessage("Be kind."),
        messages.HumanMessage("Weather?"),
        messages.AIMessage("", tool_calls=[call]),
        messages.ToolMessage("Rain", tool_call_id="c1"),
    ]
    done = chat.invoke(history)
    assert done.content == served.answer
    found = done.response_metadata["logprobs"]["content"]
    assert [entry["token"] for entry in found] == served.tokens
    assert done.usage_metadata["output_tokens"] == TOKENS
    chunks = list(chat.stream(history))
    assert "".join(chunk.content for chunk in chunks) == served.answer
    writer = module("langchain_openai").OpenAI(
        base_url=served.url, api_key="none", model="tiny", temperature=0, max_tokens=3,
        max_retries=0,
    )  # fmt: skip
    assert writer.invoke("Once") == "".join(writer.stream("Once"))


def test_litellm(served, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # nothing of the network
    litellm = module("litellm")
    given = {"model": "openai/tiny", "api_base": served.url, "api_key": "none", "temperature": 0,
             "max_tokens": TOKENS, "num_retries": 0}  # fmt: skip
    done = litellm.completion(messages=HISTORY, logprobs=True, top_logprobs=2, **given)
    assert done.choices[0].message.content == served.answer
    assert [e.token for e in done.choices[0].logprobs.content] == served.tokens
    chunks = litellm.completion(
        messages=HISTORY, stream=True, stream_options={"include_usage": True}, **given
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == served.answer
    text = litellm.text_completion(
        prompt="Once upon", logprobs=2, echo=True,
        **given | {"model": "text-completion-openai/tiny"},
    )  # fmt: skip
    assert text.choices[0].text.startswith("Once upon")
    with pytest.raises(litellm.BadRequestError, match="top_logprobs"):
        litellm.completion(messages=HISTORY, logprobs=True, top_logprobs=21, **given)


def test_nothing_of_theirs_stays_in_the_queue(served):
    health = served.health()
    assert (health["running"], health["waiting"], health["requests"]["failed"]) == (0, 0, 0)
