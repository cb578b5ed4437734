"""Faster libraries with equal ids: gigatoken beside tiktoken, and both beside `tokenizers`.

gigatoken is about eight times as fast as tiktoken.

For GPT-2's tokenizer, tiktoken defines the right ids. Both libraries split a text into words by the
Unicode class of each character, but their Unicode versions may differ. tiktoken therefore encodes
every document with a character whose class could differ. `prepare/tokenize_rows.py` also compares a
sample of every run.

For a tokenizer of one's own `tokenizers` defines the right ids. If it cuts words and merges as
GPT-2's does, gigatoken encodes it, or tiktoken where gigatoken is missing; `_ranks` says when.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import tiktoken

from ..errors import UserError, install_command
from ..huggingface.own_tokenizer import MAX_VALUES, OwnTokenizer, byte_of_letter
from ..huggingface.tokenizer_files import tokenizer_json
from ..tokenizer import PATTERN, Tokenizer
from ..untrusted.long_text import PIECE, pieces
from ..untrusted.parsing import load_json
from .word_count import Tables, WordCount, tables_of

# Characters whose Unicode class may differ between the libraries: additions of Unicode 17, widened
# to whole blocks to be safe (gigatoken 0.10 has version 17, tiktoken 0.14 has version 16).
UNSETTLED = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce-\ua7f1\U00010000-\U0001efff\U0001fb00-\U0003ffff]"
)
UNSETTLED_LEADS = (b"\xe0", b"\xea", b"\xf0")  # their first UTF-8 bytes: a quick pre-check
FRESH_AFTER = 2_000_000  # words in gigatoken's cache, which only grows, by some 96 bytes a word


class FastTokenizer(Tokenizer):
    """Encodes documents by gigatoken. An instance belongs to one thread."""

    libraries = "gigatoken and tiktoken"
    way_out = "use --tokenizer=tiktoken with a new --out_dir="

    _tables: Tables | None = None  # for WordCount; None: GPT-2's

    def __init__(self) -> None:
        super().__init__()
        self._fast: Any = None  # a gigatoken.Tokenizer, made at the first text
        self._words = WordCount(self._tables)  # since gigatoken was made

    def encode_documents(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Like `Tokenizer.encode_documents`, but faster."""
        found = [self._exact([])]
        for settled, group in groupby(texts, _is_settled):
            encode = self._encode_settled if settled else self._exact
            found.append(encode(list(group)))
        tokens, lengths = zip(*found, strict=True)
        return np.concatenate(tokens), np.concatenate(lengths)

    def differs(self, text: str, tokens: np.ndarray) -> bool:
        """Whether the slower library's tokens of a document differ from the given ones."""
        return not np.array_equal(tokens, self._exact([text])[0])

    def _exact(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of the library that defines them."""
        return super().encode_documents(texts)

    def _make(self) -> Any:
        """A gigatoken.Tokenizer without special tokens."""
        return _gigatoken()

    def _encode_settled(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes documents; pieces of a long one are encoded one by one."""
        tokens, lengths = [], []
        for is_long, group in groupby(texts, lambda text: len(text) > PIECE):
            for batch in ([text] for text in group) if is_long else (list(group),):
                parts = (
                    [self._ids([p]) for p in pieces(batch[0])] if is_long else [self._ids(batch)]
                )
                counts = np.concatenate([counts for _, counts in parts])
                counts = counts.sum(keepdims=True) if is_long else counts
                ids = np.concatenate([ids for ids, _ in parts])
                tokens.append(np.insert(ids, np.cumsum(counts) - counts, self.end_of_text))
                lengths.append(counts + 1)
        return np.concatenate(tokens), np.concatenate(lengths)

    def _ids(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(uint16 ids of all texts, int64 number of ids of each)."""
        import awkward as ak

        if self._fast is None or self._words.different > FRESH_AFTER:
            self._fast, self._words = self._make(), WordCount(self._tables)
        encoded = self._fast.encode_batch(texts, parallel=False)  # the caller has its own threads
        counts = ak.to_numpy(ak.num(encoded)).astype(np.int64)
        ids = ak.to_numpy(ak.flatten(encoded)).astype(np.uint16)
        self._words.add(ids)
        return ids, counts


class OwnByGigatoken(FastTokenizer):
    """A tokenizer of one's own, whose documents gigatoken encodes. It belongs to one thread.

    Args:
        own: the tokenizer.
        ranks: its `_ranks`.
    """

    libraries = "gigatoken and tokenizers"
    way_out = "uninstall gigatoken and use a new --out_dir="

    def __init__(self, own: OwnTokenizer, ranks: dict[bytes, int]):
        self.name, self.vocab_size, self.sha256 = own.name, own.vocab_size, own.sha256
        self.end_of_text, self.end_of_text_name = own.end_of_text, own.end_of_text_name
        self._own, self._fast = own, None
        self._tables = tables_of(ranks, own.vocab_size)
        self._words = WordCount(self._tables)

    def _exact(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._own.encode_documents(texts)

    def _make(self) -> Any:
        return _gigatoken_of(self._json())

    def _json(self) -> str:
        values = load_json(self._own.content, self._own.origin, dict, max_values=MAX_VALUES)
        return json.dumps(values | {"added_tokens": [], "post_processor": None})


class OwnByTiktoken(Tokenizer):
    """A tokenizer of one's own, whose documents tiktoken encodes. Threads may share it."""

    libraries = "tiktoken and tokenizers"
    way_out = "please report the tokenizer and the row"

    def __init__(self, own: OwnTokenizer, ranks: dict[bytes, int]):
        self._own = own
        self.name, self.vocab_size, self.sha256 = own.name, own.vocab_size, own.sha256
        self.end_of_text, self.end_of_text_name = own.end_of_text, own.end_of_text_name
        self._encoding = tiktoken.Encoding(
            name=own.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode_documents(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Like `OwnTokenizer.encode_documents`, but faster."""
        found = [super().encode_documents([])]
        for settled, group in groupby(texts, _is_settled):
            encode = super().encode_documents if settled else self._own.encode_documents
            found.append(encode(list(group)))
        tokens, lengths = zip(*found, strict=True)
        return np.concatenate(tokens), np.concatenate(lengths)

    def differs(self, text: str, tokens: np.ndarray) -> bool:
        """Whether `tokenizers` makes other tokens of a document than the given ones."""
        return not np.array_equal(tokens, self._own.encode_documents([text])[0])


def faster(own: Tokenizer) -> Callable[[], Tokenizer]:
    """Makes the tokenizer for a thread: by the fastest library whose ids are certainly equal."""
    ranks = _ranks(own) if isinstance(own, OwnTokenizer) else None
    if not ranks or not isinstance(own, OwnTokenizer):
        return lambda: own
    if tokenizer_class("auto") is FastTokenizer:
        return lambda: OwnByGigatoken(own, ranks)
    shared = OwnByTiktoken(own, ranks)
    return lambda: shared


def _ranks(own: OwnTokenizer) -> dict[bytes, int] | None:
    """Bytes of each token -> its id, if tiktoken makes equal ids with them; else None.

    It does if words are cut by GPT-2's pattern and nothing else is done to the text, every merge
    makes a token with a higher id than the one before, and every token is a byte, a special token,
    or what the merges make of its own bytes: tiktoken takes a whole word that is a token at once.
    """
    values = load_json(own.content, own.origin, dict, max_values=MAX_VALUES)
    model, added = values["model"], values.get("added_tokens") or []
    cut = values.get("pre_tokenizer")
    plain = (
        isinstance(cut, dict)
        and cut.get("type") == "ByteLevel"
        and cut.get("add_prefix_space") is False
        and cut.get("use_regex", True) is True
        and not values.get("normalizer")
        and not any(
            model.get(name)
            for name in ("dropout", "byte_fallback", "continuing_subword_prefix",
                         "end_of_word_suffix", "ignore_merges")
        )
        and all(token.get("special") or token["id"] == own.end_of_text for token in added)
    )  # fmt: skip
    if not plain or own.vocab_size > 2**16:
        return None
    letters, special = byte_of_letter(), {token["content"] for token in added}
    vocab = {text: i for text, i in model["vocab"].items() if text not in special}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    merged = [vocab.get("".join(pair), -1) for pair in pairs]
    if not set(letters) <= set(vocab) or any(b <= a for a, b in pairwise([-1, *merged])):
        return None
    if len(vocab) != len(letters) + len(merged):
        return None
    if any([t.id for t in own.merge(text)] != [i] for text, i in vocab.items()):
        return None
    return {b"".join(letters[c] for c in text): i for text, i in vocab.items()}


def tokenizer_class(choice: str) -> type[Tokenizer]:
    """The tokenizer class that `--tokenizer=` names; auto is gigatoken if installed.

    Raises:
        UserError: --tokenizer=gigatoken without the package gigatoken.
    """
    if choice == "tiktoken":
        return Tokenizer
    try:
        import gigatoken  # noqa: F401
    except ImportError as error:
        if choice == "gigatoken":
            raise UserError(
                f"--tokenizer=gigatoken: cannot be loaded ({error}); run: "
                f"{install_command('fast')}, or use --tokenizer=tiktoken"
            ) from None
        return Tokenizer
    return FastTokenizer


def _is_settled(text: str) -> bool:
    """Whether both libraries certainly split a text into equal words and accept its characters."""
    if text.isascii():
        return True
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate: only `Tokenizer.encode` repairs it
        return False
    return not (any(lead in data for lead in UNSETTLED_LEADS) and UNSETTLED.search(text))


def _gigatoken() -> Any:
    """GPT-2's gigatoken.Tokenizer, without special tokens: a literal `<|endoftext|>` stays text."""
    return _gigatoken_of(_tokenizer_json())


def _gigatoken_of(content: str) -> Any:
    """The gigatoken.Tokenizer of a tokenizer.json."""
    import gigatoken

    return gigatoken.Tokenizer.from_json(content)


@functools.cache
def _tokenizer_json() -> str:
    return tokenizer_json()
