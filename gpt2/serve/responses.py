"""OpenAI's answers, without the network.

Formats of https://platform.openai.com/docs/api-reference: completions and chat completions, as one
JSON object or as server-sent events.
"""

import json
import time
import uuid
from typing import Any

from .engine import TextRequest


class Answer:
    """Builds the JSON of one request's answer, whole or in chunks.

    Args:
        request: the texts.
        name: of the model.
        chat: a chat completion; False for a completion.
        stream: in chunks.
        with_usage: the stream ends with the token counts.
    """

    def __init__(
        self, request: TextRequest, name: str, *, chat: bool, stream: bool, with_usage: bool
    ):
        self.request, self.chat, self.with_usage = request, chat, with_usage
        kind = "chat.completion" if chat else "text_completion"
        if chat and stream:
            kind += ".chunk"
        prefix = "chatcmpl" if self.chat else "cmpl"
        self.frame = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, texts: list[str]) -> dict[str, Any]:
        """The answer as one object, with the text of every choice."""
        choices = []
        for choice, text in zip(self.request.choices, texts, strict=True):
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self.chat else {"text": text}
            choices.append(
                {
                    "index": choice.index,
                    **content,
                    "logprobs": None,
                    "finish_reason": choice.finish,
                }
            )
        return {**self.frame, "choices": choices, "usage": self.usage()}

    def chunk(self, index: int, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """A chunk with new text of a choice; text None makes the first chunk of a chat."""
        if not self.chat:
            content: dict[str, Any] = {"text": text or ""}
        elif text is None:
            content = {"delta": {"role": "assistant", "content": ""}}
        else:
            content = {"delta": {"content": text} if text else {}}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish}
        more = {"usage": None} if self.with_usage else {}
        return {**self.frame, "choices": [choice], **more}

    def last(self) -> dict[str, Any]:
        """The final chunk, with the token counts."""
        return {**self.frame, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, of the new texts, and their sum."""
        prompt, written = self.request.prompt_tokens, self.request.written
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
        }


def event(data: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
