"""Rows of conversations in the forms in which people publish them, as messages.

| form | keys of a row |
|---|---|
| OpenAI | `messages`: role, content, weight (of an answer: 0 is not learned) |
| ShareGPT | `conversations`: from, value |
| Alpaca | `instruction`, `input`, `output` |
| LLaMA-Factory's Alpaca | also `history`: pairs of question and answer |
| Dolly | `instruction`, `context`, `response` |
| prompt and completion | `prompt`, `completion`: texts, or lists of OpenAI's messages |

Each may have a `system`. Keys that no form has are not read, and counted (`unread_keys`). Calls of
tools and what they return are refused: a template for them is not learned.
"""

from collections.abc import Callable
from typing import Any

from ..errors import UserError
from ..untrusted.display import shown
from .chat_template import Message
from .model_template import NOT_LEARNED

ROLES = ("system", "user", "assistant")
TOOL_KEYS = ("tool_calls", "function_call")  # of OpenAI's messages, newer and older
OTHER_NAMES = {"developer": "system"}  # OpenAI's newer name of the role
SHAREGPT_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"chatgpt": "assistant", "model": "assistant", "system": "system"},
}


def messages_of(item: dict[str, Any]) -> list[Message]:
    """The conversation in a row, in one of the forms above.

    Raises:
        UserError: a key is missing, a role is unknown, or a text is not a string.
    """
    if key := _form_of(item):
        read, _ = FORMS[key]
        return _with_system(item.get("system"), read(item))
    hint = "; text is for `gpt2 prepare`, and then --data=FOLDER" if "text" in item else ""
    raise UserError(
        f"neither {', '.join(f'`{key}`' for key in FORMS)} among its keys "
        f"{shown(', '.join(map(str, item))) or '(none)'}{hint}"
    )


def unread_keys(item: dict[str, Any]) -> set[str]:
    """Keys of a row, and of its messages, that hold something and are not read."""
    form = _form_of(item)
    keys = FORMS[form][1] if form else ()
    found = {str(k) for k, value in item.items() if k not in (*keys, "system") and _says(value)}
    for name, known in MESSAGE_KEYS.items():
        listed = item.get(name)
        for message in listed if isinstance(listed, list) else ():
            if isinstance(message, dict):
                found |= {f"{name}.{k}" for k, v in message.items() if k not in known and _says(v)}
    return found


def _form_of(item: dict[str, Any]) -> str:
    """The key of FORMS by which a row is read; empty without one.

    Files that were joined of several forms have the columns of all of them, and null in the others.
    """
    there = [key for key in FORMS if key in item]
    return next((key for key in there if _says(item[key])), next(iter(there), ""))


def _says(value: Any) -> bool:
    return value not in (None, "", [], {})


def check_messages(value: Any) -> list[Message]:
    """Role and text of each message of a list in OpenAI's format.

    A text may be split into parts, `[{"type": "text", "text": …}]`. Other keys, such as `name`, are
    dropped.

    Raises:
        UserError: a key is missing or a role unknown; messages are numbered from 1.
    """
    if not isinstance(value, list) or not value:
        raise UserError("`messages` must be a list of at least one message")
    return [_check_message(message, f"message {n}") for n, message in enumerate(value, 1)]


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where} is not an object with `role` and `content`")
    for key in ("role", "content"):
        if key not in message:
            raise UserError(f"{where} has no `{key}`")
    role = message["role"]
    role = OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise UserError(f"{where}: role {shown(repr(role))} is unknown; use {', '.join(ROLES)}")
    content = message["content"]
    if role == "assistant" and any(_says(message.get(key)) for key in TOOL_KEYS):
        raise UserError(f"{where} calls a tool, which is not learned; leave the conversation out")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise UserError(f"{where}: only parts of type text can be read")
        content = "".join(part["text"] for part in content)
    return _weighed(role, content, message.get("weight"), where)


def _weighed(role: str, content: Any, weight: Any, where: str) -> Message:
    """A message; with OpenAI's weight 0, an answer that is not learned."""
    if not isinstance(content, str):
        raise UserError(f"{where}: its `content` is not a text")
    made = {"role": role, "content": content}
    if weight is None:
        return made
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UserError(f"{where}: weight {shown(repr(weight))}; use 0 (not learned) or 1")
    return made if weight or role != "assistant" else made | {"weight": NOT_LEARNED}


def _with_system(system: Any, messages: list[Message]) -> list[Message]:
    """The messages behind a row's system message, if it has one."""
    if not _says(system):
        return messages
    if not isinstance(system, str):
        raise UserError("`system` is not a text")
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == system:
            return messages
        raise UserError("`system` and the first message are two system messages; keep one")
    return [{"role": "system", "content": system}, *messages]


def _from_messages(item: dict[str, Any]) -> list[Message]:
    return check_messages(item["messages"])


def _from_sharegpt(item: dict[str, Any]) -> list[Message]:
    value = item["conversations"]
    if not isinstance(value, list) or not value:
        raise UserError("`conversations` must be a list of at least one message")
    if all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        return check_messages(value)
    found = []
    for number, message in enumerate(value, 1):
        where = f"message {number}"
        if not isinstance(message, dict) or not {"from", "value"} <= set(message):
            raise UserError(f"{where} is not an object with `from` and `value`")
        name = message["from"]
        role = SHAREGPT_ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise UserError(f"{where}: from {shown(repr(name))} is unknown; use {known}")
        found.append(_weighed(role, message["value"], message.get("weight"), where))
    return found


def _from_instruction(item: dict[str, Any]) -> list[Message]:
    """Alpaca's row, LLaMA-Factory's with a history, or Dolly's."""
    of_dolly = "output" not in item or _says(item.get("response"))  # joined files have both
    answer, more = ("response", "context") if of_dolly else ("output", "input")
    if answer not in item:
        raise UserError("`instruction` without `output` (Alpaca) or `response` (Dolly)")
    for key in ("instruction", more, answer):
        if not isinstance(item.get(key) or "", str):
            raise UserError(f"`{key}` is not a text")
    messages: list[Message] = []
    for number, turn in enumerate(item.get("history") or (), 1):
        if not (
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)
        ):
            raise UserError(f"`history`: turn {number} is not a question and an answer")
        messages += _turn(*turn)
    asked = [item["instruction"] or "", item.get(more) or ""]
    return messages + _turn("\n\n".join(filter(None, asked)), item[answer] or "")


def _from_prompt(item: dict[str, Any]) -> list[Message]:
    if "completion" not in item:
        raise UserError("`prompt` without `completion`")
    parts = item["prompt"], item["completion"]
    if all(isinstance(part, list) for part in parts):
        return check_messages([*parts[0], *parts[1]])
    for key, part in zip(("prompt", "completion"), parts, strict=True):
        if not isinstance(part, str):
            raise UserError(f"`{key}` is not a text")
    return _turn(*parts)


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# Key by which a form is known: (how it is read, keys that are read).
FORMS: dict[str, tuple[Callable[[dict[str, Any]], list[Message]], tuple[str, ...]]] = {
    "messages": (_from_messages, ("messages",)),
    "conversations": (_from_sharegpt, ("conversations",)),
    "instruction": (
        _from_instruction,
        ("instruction", "input", "output", "context", "response", "history"),
    ),
    "prompt": (_from_prompt, ("prompt", "completion")),
}
MESSAGE_KEYS = {
    "messages": ("role", "content", "weight"),
    "conversations": ("from", "value", "role", "content", "weight"),
    "prompt": ("role", "content", "weight"),
    "completion": ("role", "content", "weight"),
}
