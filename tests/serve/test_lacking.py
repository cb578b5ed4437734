"""OpenAI's fields with values that mean "no"."""

import json
import typing

import pytest

from gpt2.serve.errors import ApiError
from gpt2.serve.lacking import LackingChatFields, LackingFields
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


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_null_is_accepted_for_every_documented_field(kind):
    names = documented(kind)
    assert len(names) > 15
    for name in names - NEEDED:
        accept(kind, **{name: None})
    accept(kind, **dict.fromkeys(names - NEEDED))
    for name in kind.model_fields.keys() - NEEDED:  # and for our own
        accept(kind, **{name: None})


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_none_as_a_word_turns_off_what_is_lacking(kind):
    names = set(LackingFields.model_fields)
    if kind is ChatRequest:
        names |= set(LackingChatFields.model_fields) | {"top_logprobs"}
    for name in names:
        accept(kind, **{name: "none"})


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
    (CompletionRequest, "suffix", "none"),
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
