"""Log-probabilities of an answer's tokens in OpenAI's two forms."""

import math
from collections.abc import Sequence
from typing import Any

from ..data.chat_template import turn_end
from ..tokenizer import Tokenizer, gpt2_tokenizer
from .choice import ScoredToken

UNLIKELY = -9999.0  # OpenAI's; also for what is no number, which JSON cannot hold


def of_completion(
    scored: Sequence[ScoredToken], tokenizer: Tokenizer | None = None
) -> dict[str, list]:
    """`logprobs` of a completion: four lists with an entry for each token.

    The likeliest tokens of a position are a JSON object, to which the token itself is added.
    """
    found: dict[str, list] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
    }  # fmt: skip
    for begins, (token, logprob, top) in scored:
        name = token_name(token, "bytes:", tokenizer)
        value = None if logprob is None else _number(logprob)
        likeliest = {token_name(t, "bytes:", tokenizer): _number(number) for t, number in top}
        found["tokens"].append(name)
        found["token_logprobs"].append(value)
        found["top_logprobs"].append(None if value is None else likeliest | {name: value})
        found["text_offset"].append(begins)
    return found


def of_chat(scored: Sequence[ScoredToken], tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """`logprobs` of a chat: an entry for each token but those that end a text or an answer."""
    tokenizer = tokenizer or gpt2_tokenizer()
    ends = tokenizer.end_of_text, turn_end(tokenizer)
    content = [
        _entry(token, logprob or 0.0, tokenizer)
        | {"top_logprobs": [_entry(other, number, tokenizer) for other, number in top]}
        for _, (token, logprob, top) in scored
        if token not in ends
    ]
    return {"content": content, "refusal": None}


def token_name(token: int, prefix: str = "", tokenizer: Tokenizer | None = None) -> str:
    r"""The text of a token; for a part of a character its bytes, as `\xf0\x9f` behind `prefix`."""
    tokenizer = tokenizer or gpt2_tokenizer()
    if token == tokenizer.end_of_text:
        return tokenizer.end_of_text_name
    if token >= tokenizer.vocab_size:
        return f"token_id:{token}"
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in raw)


def _entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    has_text = token < tokenizer.vocab_size and token != tokenizer.end_of_text
    raw = list(tokenizer.decode_bytes([token])) if has_text else None
    name = token_name(token, tokenizer=tokenizer)
    return {"token": name, "bytes": raw, "logprob": _number(logprob)}


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else UNLIKELY
