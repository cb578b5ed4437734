"""GPT-2's encoding by gigatoken, about eight times as fast as tiktoken, with equal ids.

tiktoken defines the right ids. Both libraries split a text into words by the Unicode class of each
character, but their Unicode versions may differ. tiktoken therefore encodes every document with a
character whose class could differ. `prepare/tokenize_rows.py` also compares a sample of every run.
"""

import functools
import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np

from ..errors import UserError, install_command
from ..huggingface.tokenizer_files import tokenizer_json
from ..tokenizer import END_OF_TEXT, Tokenizer
from ..untrusted.long_text import PIECE, pieces
from .word_count import WordCount

# Characters whose Unicode class may differ between the libraries: additions of Unicode 17, widened
# to whole blocks to be safe (gigatoken 0.10 has version 17, tiktoken 0.14 has version 16).
UNSETTLED = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce-\ua7f1\U00010000-\U0001efff\U0001fb00-\U0003ffff]"
)
UNSETTLED_LEADS = (b"\xe0", b"\xea", b"\xf0")  # their first UTF-8 bytes: a quick pre-check
FRESH_AFTER = 2_000_000  # words in gigatoken's cache, which only grows, by some 60 bytes a word


class FastTokenizer(Tokenizer):
    """Encodes documents by gigatoken. An instance belongs to one thread."""

    def __init__(self) -> None:
        super().__init__()
        self._fast: Any = None  # a gigatoken.Tokenizer, made at the first text
        self._words = WordCount()  # since gigatoken was made

    def encode_documents(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Like `Tokenizer.encode_documents`, but faster."""
        found = [super().encode_documents([])]
        for settled, group in groupby(texts, _is_settled):
            encode = self._encode_settled if settled else super().encode_documents
            found.append(encode(list(group)))
        tokens, lengths = zip(*found, strict=True)
        return np.concatenate(tokens), np.concatenate(lengths)

    def differs(self, text: str, tokens: np.ndarray) -> bool:
        """Whether tiktoken's tokens of a document differ from the given ones."""
        return not np.array_equal(tokens, super().encode_documents([text])[0])

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
                tokens.append(np.insert(ids, np.cumsum(counts) - counts, END_OF_TEXT))
                lengths.append(counts + 1)
        return np.concatenate(tokens), np.concatenate(lengths)

    def _ids(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(uint16 ids of all texts, int64 number of ids of each)."""
        import awkward as ak

        if self._fast is None or self._words.different > FRESH_AFTER:
            self._fast, self._words = _gigatoken(), WordCount()
        encoded = self._fast.encode_batch(texts, parallel=False)  # the caller has its own threads
        counts = ak.to_numpy(ak.num(encoded)).astype(np.int64)
        ids = ak.to_numpy(ak.flatten(encoded)).astype(np.uint16)
        self._words.add(ids)
        return ids, counts


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
    """A gigatoken.Tokenizer without special tokens: a literal `<|endoftext|>` stays text."""
    import gigatoken

    return gigatoken.Tokenizer.from_json(_tokenizer_json())


@functools.cache
def _tokenizer_json() -> str:
    return tokenizer_json()
