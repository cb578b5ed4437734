"""OpenAI's answers, without the network.

Formats of https://platform.openai.com/docs/api-reference: completions and chat completions, as one
JSON object or as server-sent events.
"""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from .choice import Piece, ScoredToken
from .engine import TextRequest
from .logprobs import of_chat, of_completion


class Answer:
    """Builds the JSON of one request's answer, whole or in chunks.

    Args:
        request: the texts.
        name: of the model.
        chat: a chat completion; False for a completion.
        stream: in chunks.
        with_usage: the stream ends with the token counts.
        logprobs: with the log-probabilities of the tokens.
    """

    def __init__(
        self,
        request: TextRequest,
        name: str,
        *,
        chat: bool,
        stream: bool,
        with_usage: bool,
        logprobs: bool,
    ):
        self.request, self.chat, self.stream = request, chat, stream
        self.with_usage, self.logprobs = with_usage, logprobs
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

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer as one object, of all pieces of all choices."""
        texts: list[list[str]] = [[] for _ in self.request.choices]
        scored: list[list[ScoredToken]] = [[] for _ in self.request.choices]
        for piece in pieces:
            texts[piece.choice.index].append(piece.text)
            scored[piece.choice.index] += piece.scored
        choices = []
        for choice in self.request.choices:
            text = "".join(texts[choice.index])
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self.chat else {"text": text}
            choices.append(
                {
                    "index": choice.index,
                    **content,
                    "logprobs": self._logprobs(scored[choice.index]),
                    "finish_reason": choice.finish,
                }
            )
        return {**self.frame, "choices": choices, "usage": self.usage()}

    def _logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        tokenizer = self.request.choices[0].tokenizer
        return of_chat(scored, tokenizer) if self.chat else of_completion(scored, tokenizer)

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a piece; the last one of a chat has no text, as in OpenAI's API."""
        index, text, finish = piece.choice.index, piece.text, piece.finish
        logprobs = self._logprobs(piece.scored) if piece.scored else None
        if self.chat and text and finish:
            return [self.chunk(index, text, None, logprobs), self.chunk(index, "", finish)]
        return [self.chunk(index, text, finish, logprobs)]

    def chunk(
        self,
        index: int,
        text: str | None,
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A chunk with new text of a choice; text None makes the first chunk of a chat."""
        if not self.chat:
            content: dict[str, Any] = {"text": text or ""}
        elif text is None:
            content = {"delta": {"role": "assistant", "content": ""}}
        else:
            content = {"delta": {"content": text} if text else {}}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
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
