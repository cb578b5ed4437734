"""OpenAI's requests, without the network: fields, their limits and what they turn into.

A field is one of three kinds. The first fields of `SamplingRequest` and its two subclasses do what
OpenAI documents. Bookkeeping fields (`user`, `metadata`, …) are accepted, since they change no
answer. Features that this server lacks (`logprobs`, `tools`, …) are accepted with a value that
turns them off. All other fields and values are refused: nothing is silently ignored.
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

from ..data.chat_template import check_messages, encode_prompt, fit
from ..errors import UserError
from ..generate.continuous_batch import Generation
from ..generate.sampling import MAX_PENALTY, MIN_PENALTY, Sampling
from ..tokenizer import END_OF_TEXT, gpt2_tokenizer
from ..untrusted.parsing import load_json
from .engine import Choice, TextRequest
from .errors import ApiError, from_validation, quoted, unknown_field
from .served_model import MAX_TEXTS, ServedModel

MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_MESSAGES = 2048
LONGEST_TOKEN = 128  # bytes of GPT-2's longest token: bounds the tokens before encoding
DEFAULT_MAX_TOKENS = 16  # of a completion: OpenAI's default

Int64 = Field(default=None, ge=-(2**63), lt=2**63)


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding that hides lengths; never sent


class SamplingRequest(BaseModel):
    """The fields that completions and chat completions share."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_TEXTS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
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
    # accepted only with the value that turns the feature off
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None

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

    @field_validator("frequency_penalty", "presence_penalty")
    @classmethod
    def _no_penalty(cls, value: Any) -> Any:
        return _only(value, "use repetition_penalty (1 for none, 1.2 for few)", 0, 0.0)

    @field_validator("logit_bias", "logprobs")
    @classmethod
    def _lacking(cls, value: Any) -> Any:
        return _only(value, "leave it out", {}, False)

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
            ApiError: a temperature that is neither 0 nor at least 0.001.
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

    def includes_usage(self) -> bool:
        """Whether the stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def prompts(self, served: ServedModel) -> list[list[int]]:
        """The token ids of each prompt."""
        raise NotImplementedError


class CompletionRequest(SamplingRequest):
    """The body of /v1/completions."""

    prompt: Any = None
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None

    @field_validator("best_of", "suffix")
    @classmethod
    def _neither(cls, value: Any) -> Any:
        return _only(value, "leave it out", 1, "")

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


class ChatRequest(SamplingRequest):
    """The body of /v1/chat/completions."""

    messages: Any = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    # not OpenAI's: drop the oldest messages when the conversation outgrows the context
    fit_context: bool | None = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    parallel_tool_calls: Any = None
    response_format: Any = None
    modalities: Any = None
    reasoning_effort: Any = None

    @field_validator("messages")
    @classmethod
    def _messages(cls, value: Any) -> list[dict[str, str]]:
        if isinstance(value, list) and len(value) > MAX_MESSAGES:
            raise ValueError(f"at most {MAX_MESSAGES} messages")
        return check_messages(value)

    @field_validator(
        "top_logprobs",
        "tools",
        "tool_choice",
        "functions",
        "parallel_tool_calls",
        "response_format",
        "modalities",
        "reasoning_effort",
    )
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        plain = (0, [], "none", False, True, {"type": "text"}, ["text"])
        return _only(value, "the model writes plain text; leave it out", *plain)

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
                messages = fit(messages, served.block_size - longest)
            except UserError as error:
                raise _too_long(str(error), "messages") from None
        _check_bytes((m["content"] for m in messages), served, "messages")
        return [encode_prompt(messages)]


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


def make_request(body: SamplingRequest, served: ServedModel) -> tuple[TextRequest, list[list[int]]]:
    """Turns the body of an HTTP request into a `TextRequest`; also returns the prompts' ids.

    Encoding long texts takes a moment: not for the event loop's thread.

    Raises:
        ApiError: another model's name, prompts or answers that do not fit.
    """
    check_model(body.model, served)
    chat = isinstance(body, ChatRequest)
    prompts, sampling, count = body.prompts(served), body.sampling(), body.n or 1
    choices = []
    for prompt in prompts:
        limit = _limit(body, served, len(prompt), chat)
        for _ in range(count):
            index = len(choices)
            seed = None if body.seed is None else body.seed + index
            generation = Generation(tokens=list(prompt), limit=limit, sampling=sampling, seed=seed)
            choices.append(Choice(generation, index, body.stops()))
    return TextRequest(choices, sum(map(len, prompts))), prompts


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
    if room < 1:
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
        return gpt2_tokenizer().encode(item) or [END_OF_TEXT]  # the empty prompt begins a document
    if not isinstance(item, list) or not item or not all(map(_is_id, item)):
        raise ApiError("prompt must be a string, token ids, or a list of either", param="prompt")
    if not all(0 <= i < served.vocab_size for i in item):
        raise ApiError(f"token ids must be from 0 to {served.vocab_size - 1}", param="prompt")
    return item


def _only(value: Any, way_out: str, *neutral: Any) -> Any:
    """Accepts None and the values that turn a feature off; the type counts: 0 is not False."""
    same = any(value == other and type(value) is type(other) for other in neutral)
    if value is not None and not same:
        raise ValueError(f"not supported; {way_out}")
    return value
