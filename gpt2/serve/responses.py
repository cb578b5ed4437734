"""OpenAI's answers and errors, without the network.

Shapes of https://platform.openai.com/docs/api-reference: completions and chat completions, whole or
as server-sent events.
"""

import difflib
import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .engine import TextRequest

MAX_TEXTS = 128  # of one request: prompts times n


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind.get(self.status, default),
                          "param": self.param, "code": self.code}}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """What is served, as far as requests depend on it."""

    name: str
    block_size: int
    vocab_size: int
    chat: str  # trained, untrained, impossible
    max_texts: int = MAX_TEXTS
    max_new_tokens: int = 0  # 0: what the context holds
    created: int = 0  # seconds since 1970

    def card(self) -> dict[str, Any]:
        """The model in the list of models."""
        longest = min(self.max_new_tokens or self.block_size, self.block_size)
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "gpt2",
            "context_length": self.block_size,
            "max_new_tokens": longest,
            "chat": self.chat,
        }


def from_validation(errors: list[dict[str, Any]], fields: Iterable[str]) -> ApiError:
    """The first of pydantic's complaints in OpenAI's form.

    Args:
        errors: as pydantic lists them, each `loc` behind "body".
        fields: names that the request may have.
    """
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(where) or None
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {first.get('ctx', {}).get('error', '')}")
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(where[-1], list(fields), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return ApiError(f"unknown field {where[-1]!r}{hint}", param=param, code="unknown_field")
    if not param:
        return ApiError("the body must be a JSON object")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(f"{param}: {message[:1].lower()}{message[1:]}", param=param)


class Answer:
    """The JSON of one request's answer, whole or in chunks.

    Args:
        job: what is written for it.
        name: of the model.
        chat: a chat's answer, or a completion's.
        stream: in chunks.
        with_usage: the stream ends with the counts.
    """

    def __init__(self, job: TextRequest, name: str, *, chat: bool, stream: bool, with_usage: bool):
        self.job, self.chat, self.with_usage = job, chat, with_usage
        kind = "chat.completion" if chat else "text_completion"
        if chat and stream:
            kind += ".chunk"
        prefix = "chatcmpl" if self.chat else "cmpl"
        self.frame = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind,
                      "created": int(time.time()), "model": name}  # fmt: skip

    def whole(self, texts: list[str]) -> dict[str, Any]:
        """The answer with the text of every choice."""
        choices = []
        for choice, text in zip(self.job.choices, texts, strict=True):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": choice.index, **(said if self.chat else {"text": text}),
                            "logprobs": None, "finish_reason": choice.finish})  # fmt: skip
        return {**self.frame, "choices": choices, "usage": self.usage()}

    def chunk(self, index: int, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """A part of a choice; with the text None the one that begins a chat's."""
        if not self.chat:
            said: dict[str, Any] = {"text": text or ""}
        elif text is None:
            said = {"delta": {"role": "assistant", "content": ""}}
        else:
            said = {"delta": {"content": text} if text else {}}
        made = {"index": index, **said, "logprobs": None, "finish_reason": finish}
        more = {"usage": None} if self.with_usage else {}
        return {**self.frame, "choices": [made], **more}

    def last(self) -> dict[str, Any]:
        """The chunk with the counts."""
        return {**self.frame, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and of what was written."""
        job = self.job
        return {"prompt_tokens": job.prompt_tokens, "completion_tokens": job.written,
                "total_tokens": job.prompt_tokens + job.written}  # fmt: skip


def event(data: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
