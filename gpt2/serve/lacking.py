"""Fields of OpenAI's requests for features that this server lacks.

They are accepted with a value that turns the feature off: null, "none", an empty list, false, and
what OpenAI documents as the default if it changes nothing.
"""

from typing import Any

from pydantic import BaseModel, ValidationInfo, field_validator

WORD = "none"  # stands for null, except where it may be meant as a text
TEXTS = frozenset({"prompt", "messages", "stop"})
OFF: tuple = (None, WORD, [], False)
DEFAULTS: dict[str, tuple] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tool_choice": ("auto",),  # among no tools
    "function_call": ("auto",),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
USE_PENALTY = "use repetition_penalty (1 for none, 1.2 for few)"
WAYS_OUT = {"frequency_penalty": USE_PENALTY, "presence_penalty": USE_PENALTY}


def without_word(fields: Any) -> Any:
    """The fields of a request, with null instead of the word "none" in all but `TEXTS`.

    OpenAI documents the word for `tool_choice`, `function_call` and `reasoning_effort`. Some
    clients send it for every field that they leave out.
    """
    if not isinstance(fields, dict):
        return fields
    return {
        name: None if value == WORD and name not in TEXTS else value
        for name, value in fields.items()
    }


def only_off(value: Any, info: ValidationInfo) -> Any:
    """Accepts the values that turn a field's feature off; the type counts: 0 is not False.

    Raises:
        ValueError: any other value.
    """
    name = info.field_name or ""
    neutral = (*OFF, *DEFAULTS.get(name, ()))
    if not any(value == other and type(value) is type(other) for other in neutral):
        way_out = WAYS_OUT.get(name, "the model writes plain text; leave it out")
        raise ValueError(f"not supported; {way_out}")
    return value


class LackingFields(BaseModel):
    """Of completions and of chats."""

    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None

    _off = field_validator("frequency_penalty", "presence_penalty", "logit_bias")(only_off)


class LackingChatFields(BaseModel):
    """Of chats."""

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    _chat_off = field_validator(
        "audio",
        "function_call",
        "functions",
        "modalities",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "reasoning_effort",
        "response_format",
        "tool_choice",
        "tools",
        "verbosity",
        "web_search_options",
    )(only_off)
