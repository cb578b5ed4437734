"""OpenAI's requests, without the network: fields, their limits and what they turn into.

A field is one of three kinds. The first fields of `SamplingRequest` and its two subclasses do what
OpenAI documents. Bookkeeping fields (`user`, `metadata`, …) are accepted, since they change no
answer. Features that this server lacks (`tools`, `audio`, …) are accepted with a value that turns
them off (`lacking.py`). All other fields and values are refused: nothing is silently ignored.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ..data.chat_formats import check_messages
from ..data.chat_template import encode_prompt, fit
from ..errors import UserError
from ..generate.continuous_batch import Generation
from ..generate.sampling import MAX_PENALTY, MIN_PENALTY, Sampling
from ..untrusted.parsing import load_json
from .choice import Choice
from .engine import TextRequest
from .errors import ApiError, from_validation, quoted, unknown_field
from .lacking import LackingChatFields, LackingFields, without_word
from .messages import plain_messages
from .served_model import MAX_TEXTS, ServedModel

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256  # OpenAI: 4; tasks of lm-evaluation-harness have more
MAX_LOGPROBS, MAX_TOP_LOGPROBS = 5, 20  # OpenAI's, of completions and of chats
MAX_MESSAGES = 2048
LONGEST_TOKEN = 128  # bytes of GPT-2's longest token: bounds the tokens before encoding
DEFAULT_MAX_TOKENS = 16  # of a completion: OpenAI's default

Int64 = Field(default=None, ge=-(2**63), lt=2**63)


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding that hides lengths; never sent

    _none = model_validator(mode="before")(without_word)


class SamplingRequest(LackingFields):
    """The fields that completions and chat completions share."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_TEXTS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Int64
    stop: Any = None
    # not OpenAI's
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=MIN_PENALTY, le=MAX_PENALTY)
    # bookkeeping
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    _none = model_validator(mode="before")(without_word)

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: Any) -> list[str]:
        stops = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise ValueError("must be a string, or a list of strings, that are not empty")
        if len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_CHARACTERS for s in stops):
            raise ValueError(
                f"at most {MAX_STOPS} strings of at most {MAX_STOP_CHARACTERS} characters"
            )
        return stops

    @model_validator(mode="after")
    def _stream_options(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options needs stream=true", param="stream_options")
        return self

    def stops(self) -> list[str]:
        """Strings before which a text ends."""
        return self.stop or []

    def sampling(self) -> Sampling:
        """The sampling settings; fields that are missing take OpenAI's defaults.

        Raises:
            ApiError: a setting out of range.
        """
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names}
        try:
            return Sampling(**{name: v for name, v in given.items() if v is not None})
        except UserError as error:
            raise ApiError(str(error)) from None

    def max_new_tokens(self) -> int | None:
        """The number of new tokens that the request asks for; None if it gives none."""
        return self.max_tokens

    def likeliest(self) -> int | None:
        """Tokens per position whose log-probabilities are wanted; None for no log-probabilities."""
        raise NotImplementedError

    def includes_usage(self) -> bool:
        """Whether the stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def prompts(self, served: ServedModel) -> list[list[int]]:
        """The token ids of each prompt."""
        raise NotImplementedError


class CompletionRequest(SamplingRequest):
    """The body of /v1/completions."""

    prompt: Any = None
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    suffix: Any = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _no_logprobs(cls, value: Any) -> Any:
        if value is True:
            raise ValueError(f"use a number from 0 to {MAX_LOGPROBS}, of likeliest tokens")
        return None if value is False else value

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: Any) -> Any:
        if value not in (None, ""):
            raise ValueError("not supported; leave it out")
        return value

    @model_validator(mode="after")
    def _fitting(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n or 1):
            raise ApiError(
                "best_of: all texts are returned, none is chosen; use the value of n",
                param="best_of",
            )
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("max_tokens=0 needs echo=true; use 1 or more", param="max_tokens")
        return self

    def likeliest(self) -> int | None:
        """The value of `logprobs`."""
        return self.logprobs

    def prompts(self, served: ServedModel) -> list[list[int]]:
        """One prompt or several, each a text or token ids.

        Raises:
            ApiError: another type, ids outside the vocabulary, too many prompts.
        """
        value = "" if self.prompt is None else self.prompt
        one = isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0]))
        several = [value] if one else value
        if not isinstance(several, list) or not several:
            raise ApiError(
                "prompt must be a string, token ids, or a list of either", param="prompt"
            )
        if len(several) * (self.n or 1) > served.max_texts:
            raise ApiError(f"prompts times n must be at most {served.max_texts}", param="prompt")
        return [_prompt(item, served) for item in several]


class ChatRequest(SamplingRequest, LackingChatFields):
    """The body of /v1/chat/completions."""

    messages: Any = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    # not OpenAI's: drop the oldest messages when the conversation outgrows the context
    fit_context: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("messages")
    @classmethod
    def _messages(cls, value: Any) -> list[dict[str, str]]:
        if isinstance(value, list) and len(value) > MAX_MESSAGES:
            raise ValueError(f"at most {MAX_MESSAGES} messages")
        return check_messages(plain_messages(value))

    @field_validator("top_logprobs", mode="before")
    @classmethod
    def _no_top_logprobs(cls, value: Any) -> Any:
        return None if value is False else value

    @model_validator(mode="after")
    def _logprobs_are_on(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")
        return self

    def likeliest(self) -> int | None:
        """The value of `top_logprobs` if `logprobs` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def max_new_tokens(self) -> int | None:
        """The number of new tokens, under either of its names; None if neither is given.

        Raises:
            ApiError: both are given and differ.
        """
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise ApiError(
                "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens"
            )
        return next(iter(given), None)

    def prompts(self, served: ServedModel) -> list[list[int]]:
        """The one prompt; `fit_context` reserves at most half of the context for the answer.

        Raises:
            ApiError: the model cannot chat, or the conversation is too long.
        """
        if served.chat == "impossible":
            raise ApiError(
                "this model does not see past the end of a text (document_mask), which is what "
                "separates messages; use /v1/completions"
            )
        if (self.n or 1) > served.max_texts:
            raise ApiError(f"n must be at most {served.max_texts}", param="n")
        messages = self.messages
        if self.fit_context:
            longest = min(self.max_new_tokens() or served.block_size, served.block_size // 2)
            try:
                messages = fit(messages, served.block_size - longest, served.tokenizer)
            except UserError as error:
                raise _too_long(str(error), "messages") from None
        _check_bytes((m["content"] for m in messages), served, "messages")
        return [encode_prompt(messages, served.tokenizer)]


Body = TypeVar("Body", bound=SamplingRequest)


def parse(raw: bytes, kind: type[Body]) -> Body:
    """Parses the body of an HTTP request, and checks its fields.

    It stops at the first unknown field: pydantic would make an error for each of them before it
    returned one.

    Raises:
        ApiError: no JSON, no object, unknown fields, values out of range.
    """
    try:
        data = load_json(raw, "the body", dict)
    except UserError as error:
        raise ApiError(str(error)) from None
    _check_fields(data, kind)
    _check_fields(data.get("stream_options"), StreamOptions, "stream_options.")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_input=False)) from None


def _check_fields(data: Any, kind: type[BaseModel], prefix: str = "") -> None:
    """Raises ApiError for the first field of `data` that a model does not have."""
    fields = kind.model_fields
    for name in data if isinstance(data, dict) else ():
        if name not in fields:
            raise unknown_field(name, fields, prefix + name)


def make_request(body: SamplingRequest, served: ServedModel) -> TextRequest:
    """Turns the body of an HTTP request into a `TextRequest`.

    Encoding long texts takes a moment: not for the event loop's thread.

    Raises:
        ApiError: another model's name, prompts or answers that do not fit.
    """
    check_model(body.model, served)
    chat = isinstance(body, ChatRequest)
    echo = not chat and bool(body.echo)
    prompts, sampling, likeliest = body.prompts(served), body.sampling(), body.likeliest()
    choices: list[Choice] = []
    for prompt in prompts:
        limit = _limit(body, served, len(prompt), chat)
        for _ in range(body.n or 1):
            index = len(choices)
            generation = Generation(
                tokens=list(prompt),
                limit=max(1, limit),
                sampling=sampling,
                seed=None if body.seed is None else body.seed + index,
                top_logprobs=likeliest,
                prompt_logprobs=echo and likeliest is not None,
            )
            stops, tokenizer = body.stops(), served.tokenizer
            choices.append(Choice(generation, index, stops, tokenizer, echo=echo, limit=limit))
    return TextRequest(choices, sum(map(len, prompts)))


def check_model(name: str | None, served: ServedModel) -> None:
    """Raises ApiError for the name of another model; None means the served one."""
    if name not in (None, served.name):
        raise ApiError(
            f"the model {quoted(name)} does not exist here; this server has {served.name!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def _limit(body: SamplingRequest, served: ServedModel, length: int, chat: bool) -> int:
    """The number of new tokens after a prompt of `length` tokens."""
    room, asked = served.block_size - length, body.max_new_tokens()
    most = served.max_new_tokens or served.block_size
    param = "messages" if chat else "prompt"
    if room < (asked != 0):
        raise _too_long(
            f"the prompt has {length:,} tokens and leaves no room for new ones in the context of "
            f"{served.block_size:,}; shorten it",
            param,
        )
    if asked is None:
        return min(room, most) if chat else min(DEFAULT_MAX_TOKENS, room, most)
    if asked > most and served.max_new_tokens:
        raise ApiError(
            f"max_tokens={asked}: this server writes at most {most:,}", param="max_tokens"
        )
    if asked > room and not (chat and body.fit_context):
        raise _too_long(
            f"{length:,} tokens of prompt and {asked:,} new ones do not fit into the context of "
            f"{served.block_size:,}; ask for at most {room:,}",
            param,
        )
    return min(asked, room)


def _too_long(message: str, param: str) -> ApiError:
    return ApiError(message, param=param, code="context_length_exceeded")


def _check_bytes(texts: Iterable[str], served: ServedModel, param: str) -> None:
    """Raises ApiError for texts that cannot fit, without encoding them."""
    total = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if total > LONGEST_TOKEN * served.block_size:
        raise _too_long(
            f"{total:,} bytes of text cannot fit into a context of {served.block_size:,} tokens",
            param,
        )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompt(item: Any, served: ServedModel) -> list[int]:
    if isinstance(item, str):
        _check_bytes([item], served, "prompt")
        begin = [served.tokenizer.end_of_text]  # the empty prompt begins a document
        return served.tokenizer.encode(item) or begin
    if not isinstance(item, list) or not item or not all(map(_is_id, item)):
        raise ApiError("prompt must be a string, token ids, or a list of either", param="prompt")
    if not all(0 <= i < served.vocab_size for i in item):
        raise ApiError(f"token ids must be from 0 to {served.vocab_size - 1}", param="prompt")
    return item
