"""The description of the API in the form of OpenAPI 3.1, made from the models that parse requests.

A field's type and limits come from its model. What the model checks by a function, such as
`prompt`, has its schema here (`CHECKED`), and so has the text about each field (`ABOUT`).
"""

from typing import Any

from .lacking import DEFAULTS, OFF, TEXTS, WORD, LackingChatFields, LackingFields
from .requests import (
    MAX_MESSAGES,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    StreamOptions,
)
from .served_model import ServedModel

NULL = {"type": "null"}
LACKING = {*LackingFields.model_fields, *LackingChatFields.model_fields}
BOOKKEEPING = {name for name, f in SamplingRequest.model_fields.items() if f.annotation is Any} - {
    *LACKING,
    "stop",
}
ABOUT = {
    "prompt": "A text, token ids, or a list of either. Without it a text begins from nothing.",
    "messages": "The conversation. A message of role tool or function is shown as a user's.",
    "model": "The served model's name; it may be left out.",
    "max_tokens": "New tokens at most. A completion has 16 by default, a chat what fits; 0 with "
    "echo scores a prompt.",
    "max_completion_tokens": "Another name of max_tokens.",
    "temperature": "0 always takes the likeliest token; 1 by default.",
    "top_p": "Chooses among the likeliest tokens that have this probability together.",
    "top_k": "Chooses among this many likeliest tokens; 0 for all. Not OpenAI's.",
    "min_p": "Leaves out tokens below this share of the likeliest one's probability. Not OpenAI's.",
    "repetition_penalty": "Makes tokens that the text has less likely; 1 for none. Not OpenAI's.",
    "seed": "The same text for the same request.",
    "stop": "Texts before which the answer ends.",
    "n": "Number of answers.",
    "best_of": "The value of n, or left out.",
    "stream": "Sends the answer in pieces, as server-sent events.",
    "stream_options": "Needs stream.",
    "include_usage": "Ends the stream with the token counts.",
    "include_obfuscation": "Accepted; nothing is padded.",
    "echo": "The text begins with the prompt.",
    "logprobs": "Log-probabilities: in a completion the number of likeliest tokens, in a chat "
    "true or false.",
    "top_logprobs": "Number of likeliest tokens at each place; needs logprobs.",
    "suffix": "Not supported.",
    "fit_context": "Leaves out the oldest messages of a chat that is too long. Not OpenAI's.",
}
IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
PART = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}}
MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": PART}, NULL]},
    },
    "description": "content is null only beside tool_calls or refusal of an assistant.",
}


def openapi(served: ServedModel) -> dict[str, Any]:
    """The document that /openapi.json has."""
    paths = {
        "/v1/chat/completions": {"post": _written("Answers a conversation", "ChatRequest")},
        "/v1/completions": {"post": _written("Continues a text", "CompletionRequest")},
        "/v1/models": {"get": _read("Names the model", "Models")},
        "/v1/models/{model}": {
            "get": _read("Describes the model", "Model")
            | {"parameters": [{"name": "model", "in": "path", "required": True,
                               "schema": {"enum": [served.name]}}]}
        },
        "/health": {"get": _read("What runs and waits", "Health") | {"security": []}},
    }  # fmt: skip
    options = StreamOptions.model_json_schema()
    described = _described({name: _or_none(f) for name, f in options["properties"].items()})
    schemas = {
        "ChatRequest": _fields(ChatRequest, served),
        "CompletionRequest": _fields(CompletionRequest, served),
        "StreamOptions": {**options, "properties": described},
        **{name: {"type": "object"} for name in ("Answer", "Models", "Model", "Health")},
        "Error": {
            "type": "object",
            "properties": {
                "error": {
                    "type": "object",
                    "required": ["message", "type", "param", "code"],
                    "properties": {
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        **{name: {"type": ["string", "null"]} for name in ("param", "code")},
                    },
                }
            },
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"gpt2 serve: {served.name}",
            "version": "v1",
            "description": "OpenAI's API for one model. A key is needed only if the server was "
            "started with one.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _fields(kind: type[SamplingRequest], served: ServedModel) -> dict[str, Any]:
    """The schema of a request's body; fields are in the order of `ABOUT`, lacking ones last."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    chat = kind is ChatRequest
    several = {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, IDS]}}
    number_of_texts = {"type": "integer", "minimum": 1, "maximum": served.max_texts}
    checked: dict[str, Any] = {
        "model": {"enum": [served.name, None]},
        "stop": {"anyOf": [STOP, {"type": "array", "maxItems": MAX_STOPS, "items": STOP}, NULL]},
        **{name: {"anyOf": [number_of_texts, NULL]} for name in ("n", "best_of")},
        "prompt": {
            "anyOf": [
                {"type": "string"},
                IDS,
                several | {"maxItems": served.max_texts},
                NULL,
            ]
        },
        "messages": {
            "type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": MESSAGE
        },
        "suffix": {"enum": [None, ""]},
        **{name: {"enum": [*OFF, *DEFAULTS.get(name, ())]} for name in LACKING},
        **{name: {} for name in BOOKKEEPING},
    }  # fmt: skip
    most = served.max_new_tokens or served.block_size
    for name, least in (("max_tokens", int(chat)), ("max_completion_tokens", 1)):
        number = {"type": "integer", "minimum": least, "maximum": most}
        checked[name] = {"anyOf": [number, NULL]}
    fields = {name: checked.get(name, field) for name, field in schema["properties"].items()}
    switch = "top_logprobs" if chat else "logprobs"
    fields[switch] = {"anyOf": [*fields[switch]["anyOf"], {"enum": [False]}]}
    fields = {name: field if name in TEXTS else _or_none(field) for name, field in fields.items()}
    order = [*ABOUT, *sorted(BOOKKEEPING), *sorted(LACKING)]
    schema["properties"] = _described(dict(sorted(fields.items(), key=lambda f: order.index(f[0]))))
    if chat:
        schema["required"] = ["messages"]
    return {name: schema[name] for name in ("type", "required", "properties",
                                            "additionalProperties") if name in schema}  # fmt: skip


def _or_none(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that also takes the word "none"."""
    if not field or WORD in field.get("enum", ()):
        return field
    return {"anyOf": [*field.get("anyOf", [field]), {"const": WORD}]}


def _described(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields with their description, without pydantic's title."""
    found = {}
    for name, field in fields.items():
        about = ABOUT.get(name) or (
            "Accepted with a value that means no." if name in LACKING else "Accepted; no effect."
        )
        rest = {k: v for k, v in field.items() if k not in ("title", "default", "description")}
        found[name] = {**rest, "description": about}
    return found


def _response(about: str, name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def _read(summary: str, answer: str) -> dict[str, Any]:
    responses = {"200": _response(summary, answer), "default": _response("Refused", "Error")}
    return {"summary": summary, "responses": responses}


def _written(summary: str, body: str) -> dict[str, Any]:
    made = _read(summary, "Answer")
    made["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    schema = {"$ref": f"#/components/schemas/{body}"}
    content = {"application/json": {"schema": schema}}
    return {**made, "requestBody": {"required": True, "content": content}}
