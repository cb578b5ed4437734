"""Bodies of requests: what is refused, and how long that takes."""

import json
import time

import pytest

from gpt2.serve import requests
from gpt2.serve.errors import ApiError
from gpt2.serve.requests import ChatRequest, CompletionRequest, parse

MANY = {f"field_{number}": number for number in range(60_000)}


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
@pytest.mark.parametrize("body", [{"n": 1, **MANY}, {"stream_options": MANY}], ids=["top", "below"])
def test_60_000_unknown_fields_cost_no_more_than_their_json(kind, body, monkeypatch):
    raw, load_json, parsed = json.dumps(body).encode(), requests.load_json, []

    def timed(*args):
        began = time.thread_time()
        parsed.append(load_json(*args))  # kept, since freeing it takes time as well
        parsed.append(time.thread_time() - began)
        return parsed[-2]

    monkeypatch.setattr(requests, "load_json", timed)
    beyond = []
    for _ in range(5):
        began = time.thread_time()
        error = refusal(raw, kind)
        beyond.append(time.thread_time() - began - parsed[-1])
    assert str(error) == "unknown field 'field_0'"
    assert error.code == "unknown_field"
    assert min(beyond) < 0.005


def refusal(raw: bytes, kind=CompletionRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(raw, kind)
    return caught.value


@pytest.mark.parametrize(("raw", "message"), [
    (b"", "the body is not JSON in UTF-8"),
    (b"[]", "the body is not a JSON object"),
    (b"{", "the body is not JSON in UTF-8 (Expecting property name"),
    (b'{"prompt": "\xff"}', "the body is not JSON in UTF-8"),
    (b'{"": 1}', "unknown field ''"),
    (b'{"mxa_tokens": 1}', "unknown field 'mxa_tokens'; did you mean max_tokens?"),
    (b'{"stream": true, "stream_options": {"includeusage": 1}}',
     "unknown field 'includeusage'; did you mean include_usage?"),
    (b'{"stream": true, "stream_options": 1}', "stream_options: input should be a valid"),
    (b'{"temperature": NaN}', "temperature: input should be a finite number"),
])  # fmt: skip
def test_what_is_wrong_with_a_body_is_said(raw, message):
    assert str(refusal(raw)).startswith(message)


@pytest.mark.parametrize("penalty", [0, 1e-30, 0.009, 101, 1e300])
def test_a_repetition_penalty_has_bounds(penalty):
    """Beyond them logits become infinite, and the text "!!!!"."""
    error = refusal(json.dumps({"repetition_penalty": penalty}).encode())
    assert error.param == "repetition_penalty"
    for good in (0.01, 1, 1.2, 100):
        parse(json.dumps({"repetition_penalty": good}).encode(), CompletionRequest)
