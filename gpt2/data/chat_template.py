"""Conversations as tokens: a template on GPT-2's own vocabulary.

A message is the token `<|endoftext|>`, the role, a line break and the text; one more
`<|endoftext|>` ends the conversation. Only that token separates messages, and no text can contain
it (`tokenizer`), so nobody can write a message in another's name. That turns end with GPT-2's one
special token is also how DialoGPT was trained (Zhang et al. 2020, arXiv:1911.00536). Roles and
texts are encoded apart, so that what a model is asked at inference is, token for token, what it
was trained on.
"""

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..tokenizer import END_OF_TEXT, gpt2_tokenizer

ROLES = ("system", "user", "assistant")
OTHER_NAMES = {"developer": "system"}  # OpenAI's newer name

Message = dict[str, str]  # role, content


def encode_conversation(messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """(token ids, whether each of them is learned): the assistant's texts and what ends them.

    Args:
        messages: what `check_messages` gave.
    """
    ids: list[int] = []
    learned: list[bool] = []
    own = False  # whether the message before is the assistant's, and with it the token that ends it
    for message in messages:
        head, text = _head(message["role"]), gpt2_tokenizer().encode(message["content"])
        ids += head + text
        learned += [own] + [False] * (len(head) - 1)
        own = message["role"] == "assistant"
        learned += [own] * len(text)
    return [*ids, END_OF_TEXT], [*learned, own]


def encode_prompt(messages: Sequence[Message]) -> list[int]:
    """The tokens after which the assistant's next answer stands."""
    ids, _ = encode_conversation(messages)
    return ids[:-1] + _head("assistant")


def fit(messages: Sequence[Message], room: int) -> list[Message]:
    """The messages without as many of the oldest as it takes for their prompt to be short enough.

    System messages stay, and so does the last message.

    Args:
        messages: at least one.
        room: tokens.

    Raises:
        UserError: what stays is too long.
    """
    kept, answer = list(messages), len(_head("assistant"))
    lengths = [len(encode_prompt([message])) - answer for message in kept]  # texts are apart
    while (length := sum(lengths) + answer) > room:
        oldest = next((i for i, m in enumerate(kept[:-1]) if m["role"] != "system"), None)
        if oldest is None:
            raise UserError(
                f"the message takes {length:,} tokens with what belongs to it, and there is room "
                f"for {max(0, room):,}; shorten it, or ask for a shorter answer"
            )
        del kept[oldest], lengths[oldest]
    return kept


def _head(role: str) -> list[int]:
    return [END_OF_TEXT, *gpt2_tokenizer().encode(f"{role}\n")]


def messages_of(item: dict[str, Any]) -> list[Message]:
    """The conversation of a row: `messages` as OpenAI has them, or Alpaca's `instruction`.

    Raises:
        UserError: neither, a missing key, a role that is unknown, a text that is none.
    """
    if "messages" in item:
        return check_messages(item["messages"])
    if "instruction" in item:
        return _from_alpaca(item)
    hint = "; text is for `gpt2 prepare`, and then --data=FOLDER" if "text" in item else ""
    raise UserError(
        f"neither `messages` (OpenAI) nor `instruction` (Alpaca) among its keys "
        f"{', '.join(map(str, item)) or '(none)'}{hint}"
    )


def check_messages(value: Any) -> list[Message]:
    """Role and text of each message.

    A text may come in parts, `[{"type": "text", "text": …}]`. Other keys (`name`) are left out.

    Raises:
        UserError: what is missing or unknown, with the number of the message from 1.
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
    role = OTHER_NAMES.get(str(message["role"]), message["role"])
    if role not in ROLES:
        raise UserError(f"{where}: role {role!r} is unknown; use {', '.join(ROLES)}")
    content = message["content"]
    if isinstance(content, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise UserError(f"{where}: only parts of type text can be read")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: its `content` is not a text")
    return {"role": role, "content": content}


def _from_alpaca(item: dict[str, Any]) -> list[Message]:
    if "output" not in item:
        raise UserError("`instruction` without `output`")
    for key in ("instruction", "input", "output"):
        if not isinstance(item.get(key) or "", str):
            raise UserError(f"`{key}` is not a text")
    asked = [item["instruction"] or "", item.get("input") or ""]
    return [
        {"role": "user", "content": "\n\n".join(filter(None, asked))},
        {"role": "assistant", "content": item["output"] or ""},
    ]
