"""OpenAI's two forms of log-probabilities."""

import json
import math
from types import SimpleNamespace

import pytest

from gpt2.generate.logprobs import TokenLogprobs
from gpt2.serve.choice import ScoredToken
from gpt2.serve.logprobs import of_chat, of_completion, token_name
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer

HALF = gpt2_tokenizer().encode("🙂")[0]  # no text of its own


def test_completion():
    found = of_completion([
        ScoredToken(0, TokenLogprobs(64, None, ())),
        ScoredToken(1, TokenLogprobs(65, -2.5, ((66, -0.5), (HALF, -1.5)))),
        ScoredToken(2, TokenLogprobs(66, -0.25, ((66, -0.25), (65, -4.0)))),
    ])  # fmt: skip
    half = token_name(HALF, "bytes:")
    assert half.startswith("bytes:\\xf0\\x9f")
    assert found == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -2.5, -0.25],
        "top_logprobs": [None, {"c": -0.5, half: -1.5, "b": -2.5}, {"c": -0.25, "b": -4.0}],
        "text_offset": [0, 1, 2],
    }


def test_chat():
    found = of_chat([
        ScoredToken(0, TokenLogprobs(HALF, -1.0, ((HALF, -1.0), (END_OF_TEXT, -2.0)))),
        ScoredToken(1, TokenLogprobs(END_OF_TEXT, -0.5, ())),
    ])  # fmt: skip
    raw = list(gpt2_tokenizer().decode_bytes([HALF]))
    half = {"token": "".join(f"\\x{b:02x}" for b in raw), "bytes": raw, "logprob": -1.0}
    end = {"token": "<|endoftext|>", "bytes": None, "logprob": -2.0}
    assert found == {"content": [{**half, "top_logprobs": [half, end]}], "refusal": None}


def test_chat_of_a_model_whose_answers_end_by_another_token():
    """It is no part of the answer, as the end of text is none."""
    tokenizer = gpt2_tokenizer()
    brought = SimpleNamespace(turn_end=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tokenizer), "template", brought)
        found = of_chat([ScoredToken(i, TokenLogprobs(i + 6, -1.0, ())) for i in range(2)])
    assert [entry["token"] for entry in found["content"]] == [tokenizer.decode([6])]


def test_every_id_has_a_name_of_its_own():
    """`top_logprobs` of a completion has names as its keys."""
    names = [token_name(i, "bytes:") for i in range(50300)]
    assert len(set(names)) == len(names)
    assert names[50299] == "token_id:50299"


def test_what_is_no_number_is_openai_s_number_for_unlikely_tokens():
    """JSON has neither NaN nor infinity."""
    scored = [ScoredToken(0, TokenLogprobs(64, math.nan, ((65, -math.inf),)))]
    for form in (of_completion, of_chat):
        assert json.dumps(form(scored), allow_nan=False).count("-9999.0") >= 2
