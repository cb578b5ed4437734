"""The tokenizer of a model that does not speak GPT-2's: byte-level BPE from its own folder.

Many models with GPT-2's network have another tokenizer: of another language, of code, or GPT-2's
with added tokens. Their ids mean other text. GPT-2's vocabulary is assumed only where a folder does
not say otherwise: by its tokenizer.json, its vocab.json, or the special ids of its config.json.

The library `tokenizers` encodes. Ids become bytes by the table of GPT-2's release, which every
byte-level BPE uses (Radford et al. 2019), so that a stream never shows half a character.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.model import GPT2_VOCAB_SIZE
from ..errors import UserError, install_command
from ..tokenizer import END_OF_TEXT, END_OF_TEXT_NAME, Tokenizer, merges_folder
from ..untrusted.display import shown
from ..untrusted.long_text import pieces
from ..untrusted.parsing import load_json, read_bytes, read_json
from .own_template import template_in, with_template
from .tokenizer_json import ADDED_FILE, JSON_FILE, MERGES_FILE, VOCAB_FILE, content_of, origin_of

SETTINGS_FILE, SPECIAL_FILE = "tokenizer_config.json", "special_tokens_map.json"
# What belongs to a tokenizer; export and push keep these files as they are.
FILES = (
    *(JSON_FILE, SETTINGS_FILE, VOCAB_FILE, MERGES_FILE, ADDED_FILE, SPECIAL_FILE),
    *("chat_template.jinja", "chat_template.json", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
DOWNLOADED = (*FILES[:6], "chat_template.jinja")  # of these there may be any
# Small files that say how a tokenizer is used; a checkpoint keeps them beside its tokenizer.json.
USAGE_FILES = (SETTINGS_FILE, SPECIAL_FILE, "chat_template.jinja")
# Names of the token that ends a text, where no file says which it is.
END_NAMES = (END_OF_TEXT_NAME, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
MAX_VALUES = 800_000  # of a tokenizer.json; 150,000 tokens and their merges have as many


class OwnTokenizer(Tokenizer):
    """Text to ids and back by a tokenizer.json. A literal special token in a text is text.

    Args:
        content: the bytes of a tokenizer.json.
        end_of_text: id of the token that separates documents.
        origin: folder or file, for messages.
        rows: of the network's token embedding; more tokens are refused.
        parsed: the value of the JSON, if it is there already.
        files: content of those of `USAGE_FILES` that there are, by name.

    Raises:
        UserError: it is damaged, no byte-level BPE, too large for the network, or `tokenizers` is
            not installed.
    """

    name = "own"

    def __init__(
        self,
        content: bytes,
        end_of_text: int,
        origin: str,
        *,
        rows: int = 2**24,
        parsed: dict[str, Any] | None = None,
        files: dict[str, bytes] | None = None,
    ):
        values = parsed or load_json(content, origin, dict, max_values=MAX_VALUES)
        if problem := _not_byte_level(values):
            raise UserError(f"{origin}: {problem}; its model can be exported, and continue token "
                            "ids in Python")  # fmt: skip
        self._bytes = _bytes_of_tokens(values, origin, rows)
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{origin}: a tokenizer of its own needs the package tokenizers; run: "
                f"{install_command('tokenizers')}"
            ) from None
        read = content
        for token in _added(values, origin):  # no text is to become the end of a text
            if token["id"] == end_of_text and not token.get("special"):
                token["special"] = True
                read = json.dumps(values).encode()
        try:
            self._encoder = tokenizers.Tokenizer.from_str(read.decode("utf-8"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - Exception itself, and panics of Rust
            raise UserError(f"{origin}: not read by tokenizers ({shown(error)})") from None
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._encoder.encode_special_tokens = True
        self._encode_batch = self._encoder.encode_batch_fast
        self._special_encoder: Any = None  # made for the first conversation by a template
        self.content, self.origin, self.files = content, origin, files or {}
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._special = {t["id"] for t in _added(values, origin) if t.get("special")}
        self.vocab_size = len(self._bytes)
        self.end_of_text = end_of_text
        if not 0 <= end_of_text < self.vocab_size or not self._bytes[end_of_text]:
            raise UserError(f"{origin}: token {end_of_text}, which ends a text, is not in it")
        self.end_of_text_name = self._bytes[end_of_text].decode("utf-8", errors="replace")
        special = {t["content"]: t["id"] for t in _added(values, origin) if t.get("special")}
        encode = self._encode_special
        self.template = template_in(self.files, origin, special, end_of_text, encode)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD.

        Raises:
            UserError: a word of over 200,000 characters.
        """
        # Batches of one release the GIL, so that threads of `gpt2 prepare` run at a time.
        found = (self._encode_batch([p], add_special_tokens=False) for p in pieces(_whole(text)))
        return [i for (encoding,) in found for i in encoding.ids]

    def merge(self, word: str) -> list[Any]:
        """The tokens that the merges make of one word, which is written in GPT-2's letters."""
        return self._encoder.model.tokenize(word)

    def _encode_special(self, text: str) -> list[int]:
        """Ids of a text in which a literal special token is the token."""
        if self._special_encoder is None:
            self._special_encoder = self._encoder.from_str(self._encoder.to_str())
        return list(self._special_encoder.encode(_whole(text), add_special_tokens=False).ids)

    def encode_documents(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of documents one after the other, an end-of-text token in front of each.

        Returns:
            (tokens, lengths): tokens of all documents, uint16, or uint32 where ids need it; int64
            number of tokens of each document, its end-of-text token included.
        """
        kind = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        found = [np.array([self.end_of_text, *self.encode(text)], dtype=kind) for text in texts]
        tokens = np.concatenate(found) if found else np.empty(0, kind)
        return tokens, np.array([len(part) for part in found], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids. Invalid UTF-8, such as half a character, becomes U+FFFD.

        Raises:
            UserError: for an id outside the vocabulary.
        """
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise UserError(f"token {bad[0]} is not in the vocabulary of {self.origin}")
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ids; an id outside the vocabulary has none."""
        return b"".join(self._bytes[i] for i in ids if i < self.vocab_size)

    def bytes_per_token(self) -> np.ndarray:
        """int64 (V,): number of UTF-8 bytes of each token; 0 for special tokens."""
        lengths = [0 if i in self._special else len(b) for i, b in enumerate(self._bytes)]
        lengths[self.end_of_text] = 0
        return np.array(lengths, dtype=np.int64)


class NoTokenizer(Tokenizer):
    """In the place of a tokenizer that is not known: to use it is an error, with the reason."""

    name, sha256 = "none", ""
    end_of_text = -1  # no token
    end_of_text_name = ""

    def __init__(self, reason: str):
        self.reason = reason

    def check(self) -> None:
        """Raises UserError with the reason."""
        raise UserError(self.reason)

    def __getattr__(self, name: str) -> Any:
        # `_encoding`, which every method of a tokenizer needs
        raise UserError(self.reason) if name == "_encoding" else AttributeError(name)


def tokenizer_of(folder: Path, values: dict[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a model's folder; None for GPT-2's, and for a vocabulary too small for it.

    Args:
        folder: config.json and what lies beside it.
        values: the content of config.json.
        vocab_size: rows of the token embedding.
    """
    try:
        return _tokenizer_of(folder, values, vocab_size)
    except UserError as error:  # the model can be used without text
        return NoTokenizer(str(error))


def _tokenizer_of(folder: Path, values: dict[str, Any], vocab_size: int) -> Tokenizer | None:
    content, origin = content_of(folder), str(origin_of(folder))
    if content is None:
        odd = [f"{n}={values[n]!r}" for n in SPECIAL_IDS[:2]
               if values.get(n) not in (None, END_OF_TEXT)]  # fmt: skip
        if not odd or vocab_size < GPT2_VOCAB_SIZE:
            files = files_of(folder, USAGE_FILES)
            return with_template(folder, files) if vocab_size >= GPT2_VOCAB_SIZE else None
        return NoTokenizer(
            f"{folder}: its config.json says {shown(', '.join(odd))}, and GPT-2's is "
            f"{END_OF_TEXT}: it has another tokenizer, and no {JSON_FILE} beside it; it can be "
            "exported, and continue token ids in Python"
        )
    return make_tokenizer(folder, content, origin, values, rows=vocab_size)


def make_tokenizer(
    folder: Path, content: bytes, origin: str, values: dict[str, Any], *, rows: int = 2**24
) -> Tokenizer | None:
    """The tokenizer of a tokenizer.json; None for GPT-2's, if no chat template comes with it.

    Args:
        folder: the files beside it.
        content: the bytes of the tokenizer.json.
        origin: of it, for messages.
        values: the content of config.json.
        rows: of the network's token embedding.

    Raises:
        UserError: as in `OwnTokenizer`, or nothing says which token ends a text.
    """
    parsed = load_json(content, origin, dict, max_values=MAX_VALUES)
    end = _end_of_text(folder, values, parsed, origin)
    files = files_of(folder, USAGE_FILES)
    if end in (None, END_OF_TEXT) and _is_gpt2(parsed, origin):
        return with_template(folder, files) if rows >= GPT2_VOCAB_SIZE else None
    if end is None and not _not_byte_level(parsed):
        raise UserError(
            f"{origin}: nothing says which token ends a text; name it as eos_token in a "
            f"{SETTINGS_FILE} beside it"
        )
    number = -1 if end is None else end
    return OwnTokenizer(content, number, origin, rows=rows, parsed=parsed, files=files)


def files_of(folder: Path, names: tuple[str, ...] = FILES) -> dict[str, bytes]:
    """The tokenizer's files in a folder, by name: what `export` copies.

    Args:
        folder: a model, or shards.
        names: those that are looked for.

    Raises:
        UserError: a file that cannot be read, or is larger than any tokenizer.
    """
    return {name: read_bytes(folder / name) for name in names if (folder / name).exists()}


def _added(values: dict[str, Any], origin: str) -> list[dict[str, Any]]:
    """The `added_tokens` of a tokenizer.json; raises UserError for another kind of value."""
    found = values.get("added_tokens") or []
    if not isinstance(found, list) or not all(
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and isinstance(token.get("id"), int)
        for token in found
    ):
        raise UserError(f"{origin}: its added_tokens are no list of texts and ids")
    return found


def _end_of_text(
    folder: Path, values: dict[str, Any], parsed: dict[str, Any], origin: str
) -> int | None:
    """The token that ends a text: by config.json, by tokenizer_config.json, or by its name."""
    for key in ("eos_token_id", "bos_token_id"):
        value = values.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    added = {token["content"]: token["id"] for token in _added(parsed, origin)}
    path = folder / SETTINGS_FILE
    settings = read_json(path) if path.exists() else {}
    ends = settings.get("eos_token") or settings.get("bos_token")
    name = ends.get("content") if isinstance(ends, dict) else ends
    if not name:
        return next((added[name] for name in END_NAMES if name in added), None)
    model = parsed.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    found = {**(vocab if isinstance(vocab, dict) else {}), **added}.get(str(name))
    return found if isinstance(found, int) else None


def _is_gpt2(values: dict[str, Any], origin: str) -> bool:
    """Whether a tokenizer.json has GPT-2's ids and merges, and no added token but its own."""
    added = {token["id"]: token["content"] for token in _added(values, origin)}
    try:
        model = values["model"]
        vocab, merges = _gpt2_model()
        found = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        return (
            model["vocab"] == vocab
            and found == merges
            and set(added.items()) <= {(END_OF_TEXT, END_OF_TEXT_NAME)}
        )
    except (KeyError, TypeError):
        return False


@functools.cache
def _gpt2_model() -> tuple[dict[str, int], list[str]]:
    folder = merges_folder()
    merges = (folder / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
    return read_json(folder / "encoder.json"), merges


def _not_byte_level(values: dict[str, Any]) -> str:
    """Why a tokenizer.json is not byte-level BPE; empty: it is."""
    model, decoder = values.get("model"), values.get("decoder")
    kind = model.get("type") if isinstance(model, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if kind != "BPE" or not isinstance(vocab, dict):
        return f"its model is {shown(repr(kind))}, and only byte-level BPE is read"
    listed = decoder.get("decoders") if isinstance(decoder, dict) else None
    parts = listed if isinstance(listed, list) else [decoder]
    if not any(isinstance(part, dict) and part.get("type") == "ByteLevel" for part in parts):
        return "its decoder is not ByteLevel, and only byte-level BPE is read"
    return ""


def _bytes_of_tokens(values: dict[str, Any], origin: str, rows: int) -> list[bytes]:
    """Bytes of each id; empty for an id that no token has."""
    vocab: dict[str, Any] = values["model"]["vocab"]
    added = _added(values, origin)
    named = {token["content"]: token["id"] for token in added}
    numbers = [*vocab.values(), *(token["id"] for token in added)]
    if not all(isinstance(i, int) and 0 <= i < 2**24 for i in numbers):
        raise UserError(f"{origin}: its tokens are not numbered")
    size = 1 + max(numbers, default=-1)
    if size > rows:
        raise UserError(
            f"{origin}: its tokenizer has {size:,} tokens and its network {rows:,}; it can be "
            "exported, and continue token ids in Python"
        )
    table, letters = [b""] * size, byte_of_letter()
    for text, number in vocab.items():
        if text not in named:
            table[number] = b"".join(letters.get(c, c.encode("utf-8", "replace")) for c in text)
    for token in added:
        table[token["id"]] = token["content"].encode("utf-8", "replace")
    return table


@functools.cache
def byte_of_letter() -> dict[str, bytes]:
    """GPT-2's letter for each byte, backwards.

    Printable characters of Latin-1 stand for themselves, the other 68 bytes for the letters from
    U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}


def _whole(text: str) -> str:
    """The text with U+FFFD in the place of lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
