"""One text of a request: its pieces, and the places of its tokens."""

import pytest

from gpt2.generate.continuous_batch import Generation
from gpt2.generate.logprobs import TokenLogprobs
from gpt2.serve.choice import Choice
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer


def ids(text: str) -> list[int]:
    return gpt2_tokenizer().encode(text)


def written(prompt, new, *, stops=(), echo=False, limit=None, logprobs=True):
    """All pieces of a choice that gets these tokens, with the log-probability -n for token n."""
    generation = Generation(
        tokens=list(prompt), limit=len(new), top_logprobs=0 if logprobs else None,
        prompt_logprobs=echo and logprobs,
    )  # fmt: skip
    choice = Choice(generation, 0, stops, echo=echo, limit=limit)
    if generation.prompt_logprobs:
        generation.logprobs += [TokenLogprobs(i, -float(i), ()) for i in prompt]
    pieces = []
    for token in new:
        generation.logprobs.append(TokenLogprobs(token, -float(token), ()))
        pieces.append(choice.add(token))
        if choice.finish:
            break
    return choice, pieces


def places(pieces) -> list[tuple[int, int]]:
    return [(found.logprobs.token, found.begins) for piece in pieces for found in piece.scored]


def test_tokens_come_with_the_text_that_they_begin():
    smile = ids("🙂")  # of several tokens
    new = [*ids("Hi"), *smile, *ids(" there")]
    assert len(smile) > 1
    choice, pieces = written([1], new)
    assert "".join(p.text for p in pieces) == "Hi🙂 there"
    assert places(pieces) == list(zip(new, [0, *[2] * len(smile), 3], strict=True))
    (half,) = [p for p in pieces if "🙂" in p.text]
    assert len(half.scored) == len(smile)
    assert choice.finish == "length"


def test_echo_begins_with_the_prompt():
    prompt, new = ids("Once upon"), ids(" a time")
    _, pieces = written(prompt, new, echo=True)
    assert [p.text for p in pieces] == ["Once upon a", " time"]
    assert places(pieces) == list(zip([*prompt, *new], [0, 4, 9, 11], strict=True))
    _, plain = written(prompt, new, echo=True, logprobs=False)
    assert [p.text for p in plain] == ["Once upon a", " time"]
    assert places(plain) == []


def test_a_character_that_the_prompt_begins_and_the_text_goes_on_with():
    """Each half is U+FFFD, in the text and in the places."""
    first, *rest = ids("🙂")
    _, pieces = written([first], [*rest, *ids("a")], echo=True)
    text = "".join(p.text for p in pieces)
    assert text.endswith("a")
    assert places(pieces)[-1] == (ids("a")[0], len(text) - 1)


def test_ids_without_text_are_empty_text():
    """An added token of another model: neither the prompt nor the answer fails."""
    _, pieces = written([50258], [50259, *ids("a"), 50258], echo=True)
    assert "".join(p.text for p in pieces) == "a"
    assert places(pieces) == [(50258, 0), (50259, 0), (64, 0), (50258, 1)]


def test_the_end_of_text_token_is_the_last_one():
    choice, pieces = written([1], [*ids("Hi"), END_OF_TEXT, 5])
    assert places(pieces) == [(17250, 0), (END_OF_TEXT, 2)]
    assert (choice.finish, choice.written) == ("stop", 1)


@pytest.mark.parametrize("stop", [" there", " th", "e"])
def test_tokens_of_a_stop_string_are_left_out(stop):
    """A token that begins before it belongs to the text."""
    choice, pieces = written([1], [*ids("Hi there"), *ids(" x")], stops=[stop])
    text = "Hi there"[: "Hi there".index(stop)]
    assert "".join(p.text for p in pieces) == text
    assert choice.finish == "stop"
    wanted = [(17250, 0)] + [(612, 2)] * (len(text) > 2)
    assert places(pieces) == wanted


def test_limit_0_is_the_prompt_alone():
    prompt = ids("Once upon")
    choice, pieces = written(prompt, [5], echo=True, limit=0)
    assert [p.text for p in pieces] == ["Once upon"]
    assert places(pieces) == list(zip(prompt, [0, 4], strict=True))
    assert (choice.finish, choice.written) == ("length", 0)
