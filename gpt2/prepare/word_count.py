"""How many different words a text has, estimated from its tokens at little cost.

A tokenizer that keeps every word fills the memory with a text whose words all differ. One part in
32 of the tokens is looked at, at random places, so that no text can hide its words.
"""

import functools
import random

import numpy as np

from ..config.model import GPT2_VOCAB_SIZE
from ..tokenizer import merge_ranks, merges_folder

SHARE = 32  # one part in so many is looked at
EVERY = 4  # tokens; a longer word counts again after so many
TABLE_BITS = 18  # of a table of words, which 80,000 words of a share fill to a third
SPACE, LETTER, DIGIT, SIGN = range(4)  # kinds of a token's first and last byte
# kind of the first byte, kind of the last byte, random number of each token
Tables = tuple[np.ndarray, np.ndarray, np.ndarray]


class WordCount:
    """Counts different words of several tokens; those of one token are few.

    A word ends where the pattern of `tokenizer.py` ends it: in front of a space, and where letters,
    digits and signs meet. Bytes beyond ASCII count as letters.

    Args:
        tables: of the tokenizer, by `tables_of`; None: GPT-2's.
    """

    def __init__(self, tables: Tables | None = None) -> None:
        self._tables = tables or _tables_of_gpt2()
        self._seen = np.zeros(2**TABLE_BITS, bool)

    @property
    def different(self) -> int:
        """Estimate of the number of different words."""
        return SHARE * int(np.count_nonzero(self._seen))

    def add(self, ids: np.ndarray) -> None:
        """Counts the words of a text.

        Args:
            ids: (T,) uint16 tokens.
        """
        size = len(ids) // SHARE + 1
        begin = random.randrange(max(1, len(ids) - size))
        part = ids[begin : begin + size]
        first, last, salt = self._tables
        is_inner = first[part[1:]] == last[part[:-1]]
        at = np.arange(len(part), dtype=np.uint32)
        starts = np.flatnonzero(np.concatenate([[True], ~is_inner])[: len(part)])
        start = np.repeat(starts.astype(np.uint32), np.diff(starts, append=len(part)))
        place = at - start
        # Random numbers multiplied by the place in the word, so that order matters. A sum from the
        # beginning of a word stands for all of it, also where a long word is counted again.
        sums = np.cumsum(salt[part] * (2 * place + 1), dtype=np.uint32)
        ends = np.flatnonzero(is_inner & ((place[1:] % EVERY == EVERY - 1) | ~_next(is_inner))) + 1
        hashes = sums[ends] - sums[start[ends]] + salt[part[start[ends]]]
        self._seen[(hashes * np.uint32(2654435769)) >> np.uint32(32 - TABLE_BITS)] = True


def _next(is_inner: np.ndarray) -> np.ndarray:
    return np.concatenate([is_inner[1:], [False]])


@functools.cache
def _tables_of_gpt2() -> Tables:
    return tables_of(merge_ranks(merges_folder()), GPT2_VOCAB_SIZE)


def tables_of(ranks: dict[bytes, int], vocab_size: int) -> Tables:
    """What `WordCount` has to know of each token.

    Args:
        ranks: bytes of each token -> its id; ids that are missing count as spaces.
        vocab_size: ids are below it.
    """
    first, last = np.zeros((2, vocab_size), np.uint8)
    for token, i in ranks.items():
        first[i], last[i] = (_kind(token[at]) for at in (0, -1))
        first[i] += 4 * token.startswith(b" ")  # a space in front begins a word in any case
    salt = np.random.default_rng(0).integers(2**32, size=vocab_size, dtype=np.uint32)
    return first, last, salt


def _kind(byte: int) -> int:
    if byte >= 0x80 or chr(byte).isalpha():
        return LETTER
    if chr(byte).isspace():
        return SPACE
    return DIGIT if chr(byte).isdigit() else SIGN
