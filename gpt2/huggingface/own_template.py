"""The chat template that a model brings: from `chat_template.jinja` or `tokenizer_config.json`.

A template that `gpt2 export` wrote is left out, because `data/chat_template.py` makes its ids.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..tokenizer import END_OF_TEXT, END_OF_TEXT_NAME, Tokenizer, gpt2_tokenizer
from ..untrusted.parsing import load_json
from ..untrusted.templates import OURS, ModelTemplate, template_source

SETTINGS_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class TemplatedTokenizer(Tokenizer):
    """GPT-2's tokenizer with a chat template that a model brings."""

    def __init__(self, files: dict[str, bytes], where: str):
        self._encoding = gpt2_tokenizer()._encoding
        self.files = files
        ids = {END_OF_TEXT_NAME: END_OF_TEXT}
        self.template = template_in(files, where, ids, END_OF_TEXT, self._encode_special)

    def _encode_special(self, text: str) -> list[int]:
        """Ids of a text in which a literal end-of-text token is the token."""
        first, *parts = text.split(END_OF_TEXT_NAME)
        return [*self.encode(first), *(i for p in parts for i in (END_OF_TEXT, *self.encode(p)))]


def template_in(
    files: dict[str, bytes],
    where: str,
    special: dict[str, int],
    end_of_text: int,
    encode: Callable[[str], list[int]],
) -> ModelTemplate | None:
    """The chat template in a model's files; None without one, and for ours.

    Args:
        files: content of `SETTINGS_FILE` and `TEMPLATE_FILE`, if there are any.
        where: folder or checkpoint, for messages.
        special: ids of the special tokens by their text.
        end_of_text: id of the token that ends a text.
        encode: ids of a text in which special tokens are tokens.
    """
    settings: dict[str, Any] = {}
    error = ""
    if SETTINGS_FILE in files:
        try:
            settings = load_json(files[SETTINGS_FILE], f"{where}: {SETTINGS_FILE}", dict)
        except UserError as reason:
            error = str(reason)
    source = template_source(settings, files.get(TEMPLATE_FILE))
    if not source.strip() or OURS.fullmatch(source):
        return None
    texts = {name: _text(settings.get(name)) for name in NAMES}
    ends = special.get(texts["eos_token"], end_of_text)
    names = {number: text for text, number in special.items()}
    texts["eos_token"] = texts["eos_token"] or names.get(end_of_text, "")
    variables = {name: text for name, text in texts.items() if text}
    return ModelTemplate(source, where, variables, tuple(special), ends, encode, error)


def _text(value: Any) -> str:
    """A token of tokenizer_config.json as text: a string, or an object with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def with_template(folder: Path, files: dict[str, bytes]) -> TemplatedTokenizer | None:
    """GPT-2's tokenizer with the chat template of a folder; None if it brings none."""
    if not any(b"chat_template" in content for content in files.values()) and (
        TEMPLATE_FILE not in files
    ):
        return None
    found = TemplatedTokenizer(files, str(folder))
    return found if found.template else None
