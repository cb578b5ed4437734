"""Conversations as tokens: a chat template that needs no token beyond GPT-2's vocabulary.

A message is the token `<|endoftext|>`, the role, a line break and the text. One more
`<|endoftext|>` ends the conversation. DialoGPT also ends its messages with `<|endoftext|>`, GPT-2's
only special token (Zhang et al. 2020, arXiv:1911.00536).

The tokenizer encodes a literal `<|endoftext|>` as text, so a text cannot forge a message of another
role. Role and text are encoded separately, so a prompt at inference has exactly the tokens of the
training data.

A model that brings another template is asked and taught by that (`model_template.py`).
"""

from collections.abc import Sequence

from ..errors import UserError
from ..tokenizer import Tokenizer, gpt2_tokenizer
from ..untrusted.long_text import beginning
from .model_template import conversation_ids, is_learned, prompt_ids

LONGEST_TOKEN = 128  # bytes

Message = dict[str, str]  # role, content; "weight": "0" for an answer that is not learned


def encode_conversation(
    messages: Sequence[Message], most: int = 0, tokenizer: Tokenizer | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and a mask of the learned tokens.

    The assistant's texts are learned, each with its end-of-text token, but for those of weight 0.

    Args:
        messages: as returned by `check_messages`.
        most: tokens after which encoding may stop, with at least one token more; 0: never.
        tokenizer: the model's; by default GPT-2's.

    Returns:
        (token ids, True for each learned token).
    """
    tokenizer = tokenizer or gpt2_tokenizer()
    if tokenizer.template:
        return conversation_ids(messages, tokenizer.template, tokenizer)
    ids: list[int] = []
    learned: list[bool] = []
    own = False  # the next head begins with the end-of-text token of this assistant's message
    for message in messages:
        if most and len(ids) > most:
            break
        content = message["content"]
        if most:  # the text of `most` tokens and some more; the rest would be cut off
            content = beginning(content, (most + 2) * LONGEST_TOKEN)
        head, text = _head(message["role"], tokenizer), tokenizer.encode(content)
        ids += head + text
        learned += [own] + [False] * (len(head) - 1)
        own = is_learned(message)
        learned += [own] * len(text)
    return [*ids, tokenizer.end_of_text], [*learned, own]


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer | None = None) -> list[int]:
    """Token ids of a conversation, ending with the head of the assistant's next message."""
    tokenizer = tokenizer or gpt2_tokenizer()
    if tokenizer.template:
        return prompt_ids(messages, tokenizer.template, tokenizer)
    ids, _ = encode_conversation(messages, tokenizer=tokenizer)
    return ids[:-1] + _head("assistant", tokenizer)


def turn_end(tokenizer: Tokenizer) -> int:
    """The token that ends an answer: end of text, or what the model's template says."""
    return tokenizer.template.turn_end if tokenizer.template else tokenizer.end_of_text


def jinja_template(tokenizer: Tokenizer) -> str:
    """The template in the language of transformers' `apply_chat_template`.

    Its ids are those of `encode_prompt`, but for texts that begin with white space, which
    transformers encodes together with the line break, and for literal end-of-text tokens.
    """
    end = tokenizer.end_of_text_name
    assert "'" not in end, end
    return (
        "{% for message in messages %}"
        f"{{{{ '{end}' + message['role'] + '\\n' + message['content'] }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{end}assistant\\n' }}}}"
        f"{{% else %}}{{{{ '{end}' }}}}{{% endif %}}"
    )


def fit(
    messages: Sequence[Message], room: int, tokenizer: Tokenizer | None = None
) -> list[Message]:
    """Drops the oldest messages until the prompt fits.

    System messages and the last message are never dropped.

    Args:
        messages: at least one.
        room: maximum number of prompt tokens.
        tokenizer: the model's; by default GPT-2's.

    Raises:
        UserError: system messages and the last message alone are too long.
    """
    tokenizer = tokenizer or gpt2_tokenizer()
    if tokenizer.template:
        return _fit_by_template(messages, room, tokenizer)
    kept, answer = list(messages), len(_head("assistant", tokenizer))
    lengths = [len(encode_prompt([m], tokenizer)) - answer for m in kept]  # of each message
    while (length := sum(lengths) + answer) > room:
        oldest = next((i for i, m in enumerate(kept[:-1]) if m["role"] != "system"), None)
        if oldest is None:
            raise _too_long(length, room)
        del kept[oldest], lengths[oldest]
    return kept


def _fit_by_template(messages: Sequence[Message], room: int, tokenizer: Tokenizer) -> list[Message]:
    """`fit` by the model's template, which may refuse a conversation that an answer begins."""
    kept = list(messages)
    while (length := len(encode_prompt(kept, tokenizer))) > room:
        oldest = next((i for i, m in enumerate(kept[:-1]) if m["role"] != "system"), None)
        if oldest is None:
            raise _too_long(length, room)
        del kept[oldest]
        while oldest < len(kept) - 1 and kept[oldest]["role"] == "assistant":
            del kept[oldest]
    return kept


def _too_long(length: int, room: int) -> UserError:
    return UserError(
        f"the message takes {length:,} tokens with what belongs to it, and there is room "
        f"for {max(0, room):,}; shorten it, or ask for a shorter answer"
    )


def _head(role: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a message before its text: end of text, role, line break."""
    return [tokenizer.end_of_text, *tokenizer.encode(f"{role}\n")]
