"""`Choice`: one text of a request, from tokens to the pieces that a client gets."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from ..data.chat_template import turn_end
from ..generate.continuous_batch import Generation
from ..generate.logprobs import TokenLogprobs
from ..generate.stream import TextWriter
from ..tokenizer import Tokenizer, gpt2_tokenizer


class ScoredToken(NamedTuple):
    """A token with its log-probability, and its place in the text of its choice."""

    begins: int  # characters of the text that are complete before the token
    logprobs: TokenLogprobs


class Choice:
    """One of the texts of a request (OpenAI's name for it).

    Args:
        generation: prompt and sampling settings. A `top_logprobs` makes pieces hold scored tokens.
        index: number of the text in the answer.
        stops: strings before which the text ends.
        tokenizer: the model's; by default GPT-2's.
        echo: the text begins with the prompt. Ids behind the vocabulary have no text.
        limit: new tokens of the text; None for the generation's own limit. With 0, the text is the
            prompt: the one token that is generated all the same is dropped.
    """

    def __init__(
        self,
        generation: Generation,
        index: int,
        stops: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
        *,
        echo: bool = False,
        limit: int | None = None,
    ):
        self.generation, self.index = generation, index
        self.limit = generation.limit if limit is None else limit
        self.tokenizer = tokenizer = tokenizer or gpt2_tokenizer()
        self.writer = TextWriter(stops, tokenizer)
        self.written = 0  # tokens, without the end-of-text token
        self.finish: str | None = None  # "stop" or "length" once the text has ended
        prompt = tokenizer.decode_bytes(generation.tokens if echo else ())
        self._echo = prompt.decode("utf-8", errors="replace")  # until it is sent
        self._sent = 0  # characters of the pieces so far
        self._places: _Places | None = None  # of tokens, if their log-probabilities are wanted
        if generation.top_logprobs is not None:
            self._places = _Places(tokenizer)
            if generation.prompt_logprobs:
                self._places.add(generation.tokens)
            self._places.begin_text(len(self._echo))

    def add(self, token: int) -> "Piece":
        """Adds a token that has arrived; returns what can be sent now."""
        text, self._echo = self._echo, ""
        if self.limit == 0:
            self.finish = "length"
        else:
            text += self._write(token)
            if self._places:
                self._places.add([token])
        self._sent += len(text)
        if self.finish:
            self.generation.ended = True
        return Piece(self, text, self.finish, self._scored() if self._places else ())

    def _write(self, token: int) -> str:
        if token in (self.tokenizer.end_of_text, turn_end(self.tokenizer)):
            self.finish = "stop"
            return self.writer.finish()
        self.written += 1
        text = self.writer.add(token)
        if self.writer.stopped:
            self.finish = "stop"
        elif self.written == self.limit:
            self.finish = "length"
            text += self.writer.finish()
        return text

    def _scored(self) -> tuple[ScoredToken, ...]:
        """Tokens that begin in the text sent so far; at its end, those behind it without text.

        Tokens of a stop string, which is not sent, are left out.
        """
        assert self._places is not None
        everything = self.finish is not None and not self.writer.stopped
        return self._places.take(self.generation.logprobs, None if everything else self._sent)


class Piece(NamedTuple):
    """New text of a choice; `finish` is set on the last piece and says why the text ended."""

    choice: Choice
    text: str
    finish: str | None
    scored: tuple[ScoredToken, ...] = ()


class _Places:
    """Where the tokens of a text begin, in characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._begins: list[int] = []
        self._taken = self._characters = 0
        self._decoder = _decoder()

    def add(self, tokens: Sequence[int]) -> None:
        """Adds tokens behind the last."""
        for token in tokens:
            self._begins.append(self._characters)
            raw = self._tokenizer.decode_bytes([token])
            self._characters += len(self._decoder.decode(raw))

    def begin_text(self, characters: int) -> None:
        """The next token is the first of the new text, behind so many characters of the prompt."""
        self._characters, self._decoder = characters, _decoder()

    def take(self, logprobs: Sequence[TokenLogprobs], end: int | None) -> tuple[ScoredToken, ...]:
        """The tokens not taken so far that begin before character `end`; all for None."""
        first = self._taken
        while self._taken < len(self._begins) and (end is None or self._begins[self._taken] < end):
            self._taken += 1
        return tuple(
            ScoredToken(self._begins[number], logprobs[number])
            for number in range(first, self._taken)
        )


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")
