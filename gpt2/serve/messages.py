"""Messages of other models in a chat's history: tools that were called, and what they answered.

The model was trained on the roles system, user and assistant. A client may continue a conversation
in which another model called tools. The rule is that the model sees all text of such a history:

- A message of role `tool` or `function` becomes a user's message with its text.
- `tool_calls` (or `function_call`) of an assistant's message become lines `name(arguments)` behind
  its content, which may be null.
- A `refusal` stands for content that is null.
"""

from typing import Any

from ..data.chat_formats import TOOL_KEYS
from ..errors import UserError

TOOL_ROLES = ("tool", "function")


def plain_messages(messages: Any) -> Any:
    """Messages without tools, for `check_messages`, which refuses all that is no message.

    Raises:
        UserError: a tool call without a name or without arguments; messages count from 1.
    """
    if not isinstance(messages, list):
        return messages
    return [_plain(message, f"message {n}") for n, message in enumerate(messages, 1)]


def _plain(message: Any, where: str) -> Any:
    if not isinstance(message, dict):
        return message
    if message.get("role") in TOOL_ROLES:
        return {**message, "role": "user"}
    if message.get("role") != "assistant":
        return message
    content = message.get("content")
    if content is None:
        content = message.get("refusal")
    lines = "\n".join(_calls(message, where))
    if isinstance(content, list) and lines:  # of parts
        content = [*content, {"type": "text", "text": "\n" * bool(content) + lines}]
    elif lines and not content:
        content = lines
    elif isinstance(content, str) and lines:
        content = f"{content}\n{lines}"
    if content is None:
        return message
    return {k: v for k, v in message.items() if k not in TOOL_KEYS} | {"content": content}


def _calls(message: dict, where: str) -> list[str]:
    """The tool calls of a message as texts."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise UserError(f"{where}: `tool_calls` is not a list")
    if message.get("function_call"):
        calls = [*calls, {"function": message["function_call"]}]
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> str:
    """A tool call as text: `name(arguments)`."""
    found = call.get("function") or call.get("custom") if isinstance(call, dict) else None
    name, given = (
        (found.get("name"), found.get("arguments", found.get("input")))
        if isinstance(found, dict)
        else (None, None)
    )
    if not isinstance(name, str) or not isinstance(given, str):
        raise UserError(f"{where}: a tool call needs `function` with `name` and `arguments`, texts")
    return f"{name}({given})"
