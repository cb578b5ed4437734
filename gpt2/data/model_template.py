"""Conversations as tokens by the chat template that a model brings.

A special token in the text of a message is text: a placeholder stands for it while the template is
rendered, so that no message can forge another one.
"""

import secrets
from collections.abc import Sequence

from ..errors import UserError
from ..tokenizer import Tokenizer
from ..untrusted.templates import ModelTemplate

NOT_LEARNED = "0"


def is_learned(message: dict[str, str]) -> bool:
    """Whether a message is an answer whose tokens are learned."""
    return message["role"] == "assistant" and message.get("weight") != NOT_LEARNED


def prompt_ids(
    messages: Sequence[dict[str, str]], template: ModelTemplate, tokenizer: Tokenizer
) -> list[int]:
    """Token ids of a conversation, ending with the head of the assistant's next message.

    Raises:
        UserError: the template refuses the messages.
    """
    plain, hidden = _hide(messages, template)
    return _ids(template.render(plain, ask=True), hidden, template, tokenizer)


def conversation_ids(
    messages: Sequence[dict[str, str]], template: ModelTemplate, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and a mask of the learned tokens.

    An answer is what the template adds to the prompt of the messages before it, with the token that
    ends it.

    Raises:
        UserError: the template refuses the messages, or changes earlier ones.
    """
    plain, hidden = _hide(messages, template)
    ids: list[int] = []
    learned: list[bool] = []
    done = ""  # the text of the messages so far

    def add(text: str, is_learned: bool) -> None:
        found = _ids(text, hidden, template, tokenizer)
        ids.extend(found)
        learned.extend([is_learned] * len(found))

    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(plain[:number], ask=True) if number else ""
        whole = template.render(plain[: number + 1], ask=False)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise UserError(
                f"{template.where}: its chat template changes earlier messages, so that it is not "
                "known which tokens are the assistant's; use a model without it"
            )
        add(prompt[len(done) :], False)
        add(whole[len(prompt) :], is_learned(message))
        done = whole
    return ids, learned


def _hide(
    messages: Sequence[dict[str, str]], template: ModelTemplate
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """(messages with placeholders for special tokens, the text of each placeholder)."""
    key, hidden = secrets.token_hex(8), {}
    plain = []
    for message in messages:
        text = message["content"]
        for number, literal in enumerate(template.special):
            if literal and literal in text:
                name = f"\ue000{key}{number}\ue001"
                hidden[name] = literal
                text = text.replace(literal, name)
        plain.append({**message, "content": text})
    return plain, hidden


def _ids(
    text: str, hidden: dict[str, str], template: ModelTemplate, tokenizer: Tokenizer
) -> list[int]:
    """Ids of a rendered text; what is hidden is encoded as text."""
    for name, literal in hidden.items():
        if name in text:
            parts = [_ids(part, hidden, template, tokenizer) for part in text.split(name)]
            between = tokenizer.encode(literal)
            return [i for n, part in enumerate(parts) for i in (between if n else []) + part]
    return template.encode(text) if text else []
