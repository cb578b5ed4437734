"""OpenAI's fields with values that mean "no"."""

import json
import typing

import pytest

from gpt2.serve.errors import ApiError
from gpt2.serve.lacking import TEXTS
from gpt2.serve.requests import ChatRequest, CompletionRequest, parse

HELLO = [{"role": "user", "content": "Hello"}]
NEEDED = {"messages"}  # null means nothing there


def documented(kind) -> set[str]:
    """All fields in OpenAI's own client, in the version that is installed."""
    types = pytest.importorskip("openai.types")
    if kind is ChatRequest:
        params = types.chat.completion_create_params.CompletionCreateParams
    else:
        params = types.completion_create_params.CompletionCreateParams
    return {name for part in typing.get_args(params) for name in part.__annotations__}


def accept(kind, **fields):
    body = {"messages": HELLO} | fields if kind is ChatRequest else fields
    return parse(json.dumps(body).encode(), kind)


@pytest.mark.parametrize("nothing", [None, "none"])
@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_null_and_none_leave_out_every_documented_field(kind, nothing):
    names = (documented(kind) | kind.model_fields.keys()) - NEEDED  # and our own
    assert len(names) > 15
    if nothing == "none":
        names -= TEXTS
    plain = accept(kind, stop=[]).model_dump()
    for fields in (*({name: nothing} for name in names), dict.fromkeys(names, nothing)):
        body = accept(kind, **fields)
        assert body.model_dump() | {"stop": body.stops()} == plain
    options = {"include_usage": nothing, "include_obfuscation": nothing}
    assert not accept(kind, stream=True, stream_options=options).includes_usage()


def test_none_is_a_text_where_a_text_is_meant():
    body = accept(CompletionRequest, prompt="none", stop="none")
    assert (body.prompt, body.stops()) == ("none", ["none"])
    assert accept(CompletionRequest, stop=["none"]).stops() == ["none"]
    with pytest.raises(ApiError, match="messages"):
        accept(ChatRequest, messages="none")


@pytest.mark.parametrize(("kind", "name", "value"), [
    (ChatRequest, "tool_choice", "auto"),
    (ChatRequest, "function_call", "auto"),
    (ChatRequest, "tools", []),
    (ChatRequest, "parallel_tool_calls", True),
    (ChatRequest, "response_format", {"type": "text"}),
    (ChatRequest, "modalities", ["text"]),
    (ChatRequest, "verbosity", "medium"),
    (ChatRequest, "prompt_cache_retention", "24h"),
    (ChatRequest, "prompt_cache_options", {"mode": "explicit"}),
    (ChatRequest, "logprobs", False),
    (ChatRequest, "top_logprobs", 0),
    (CompletionRequest, "logprobs", False),
    (CompletionRequest, "suffix", ""),
    (CompletionRequest, "frequency_penalty", 0),
    (CompletionRequest, "logit_bias", {}),
    (CompletionRequest, "best_of", 1),
])  # fmt: skip
def test_values_that_change_nothing(kind, name, value):
    accept(kind, **{name: value})


@pytest.mark.parametrize(("kind", "name", "value"), [
    (ChatRequest, "audio", {"voice": "alloy", "format": "wav"}),
    (ChatRequest, "function_call", {"name": "f"}),
    (ChatRequest, "tools", True),
    (ChatRequest, "tools", [{"type": "function"}]),
    (ChatRequest, "web_search_options", {}),
    (ChatRequest, "verbosity", "low"),
    (ChatRequest, "reasoning_effort", "high"),
    (ChatRequest, "moderation", {"model": "omni-moderation-latest"}),
    (ChatRequest, "prediction", {"type": "content", "content": "a"}),
    (ChatRequest, "parallel_tool_calls", 1),
    (ChatRequest, "logit_bias", {"5": 100}),
    (CompletionRequest, "suffix", "a text"),
    (CompletionRequest, "presence_penalty", 0.1),
    (CompletionRequest, "best_of", 2),
    (CompletionRequest, "best_of", 0),
])  # fmt: skip
def test_values_that_ask_for_something_are_refused(kind, name, value):
    with pytest.raises(ApiError) as refused:
        accept(kind, **{name: value})
    assert refused.value.param == name


def test_best_of_may_equal_n():
    accept(CompletionRequest, n=3, best_of=3)
    with pytest.raises(ApiError, match="use the value of n"):
        accept(CompletionRequest, n=3, best_of=4)
