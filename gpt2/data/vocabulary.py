"""The vocabulary of shards: how many ids there are, which ends a text, and whose they are.

GPT-2's is assumed where no manifest says otherwise. `gpt2 prepare --tokenizer=` writes another one
into `manifest.json`, with the files of its tokenizer beside the shards.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ..config.model import GPT2_VOCAB_SIZE
from ..errors import UserError
from ..tokenizer import END_OF_TEXT, Tokenizer
from ..untrusted.parsing import load_json, read_bytes

MAX_SIZE = 2**16  # of ids in a shard, which has 16 bits for each
OWN = "own"  # name of a tokenizer that is not GPT-2's, in a manifest
TOKENIZER_FILE = "tokenizer.json"  # beside the shards, if it is not GPT-2's
# `gpt2 prepare` takes a folder of a million small files and must read the list again.
MANIFEST_BYTES, MANIFEST_VALUES = 2**26, 2**21


class Vocabulary(NamedTuple):
    """Which ids there are, and what they mean."""

    size: int = GPT2_VOCAB_SIZE
    end_of_text: int = END_OF_TEXT
    sha256: str = ""  # of the tokenizer.json; empty: GPT-2's

    def __str__(self) -> str:
        if not self.sha256:
            return f"GPT-2's vocabulary of {self.size}"
        return f"the vocabulary of {self.size} tokens (sha256 {self.sha256[:8]})"


GPT2_VOCABULARY = Vocabulary()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer."""
    if tokenizer.name != OWN:
        return GPT2_VOCABULARY
    return Vocabulary(tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.sha256)


def named_in(manifest: dict[str, Any] | None) -> Vocabulary:
    """The vocabulary that a manifest of shards names; GPT-2's without one."""
    told = (manifest or {}).get("tokenizer") or {}
    if told.get("name") != OWN:
        return GPT2_VOCABULARY
    return Vocabulary(told["vocab_size"], told["end_of_text"], told["sha256"])


def is_described(told: Any) -> bool:
    """Whether the value of `tokenizer` in a manifest has all that `named_in` needs."""
    if not isinstance(told, dict):
        return False
    if told.get("name") != OWN:
        return True
    size, end, digest = (told.get(name) for name in ("vocab_size", "end_of_text", "sha256"))
    return (
        type(size) is int
        and type(end) is int
        and 0 <= end < size <= MAX_SIZE
        and isinstance(digest, str)
        and len(digest) == 64
    )


def of_shards(manifest: Path) -> Vocabulary:
    """The vocabulary of a folder of shards.

    Args:
        manifest: path of its manifest. Folders of other programs have none, or one of their own.

    Raises:
        UserError: a tokenizer lies beside the shards, and no manifest says how it is used: ids of
            that tokenizer would be taken for GPT-2's.
    """
    has_tokenizer = (manifest.parent / TOKENIZER_FILE).exists()
    if has_tokenizer and not manifest.exists():
        raise UserError(
            f"{manifest.parent} holds a {TOKENIZER_FILE} without the {manifest.name} that says how "
            "it is used; run `gpt2 prepare` again"
        )
    advice = mending(manifest)
    try:
        content = manifest_value(manifest, advice) if manifest.exists() else None
    except UserError:
        if has_tokenizer:
            raise
        return GPT2_VOCABULARY
    values = content if isinstance(content, dict) else {}
    told = values.get("tokenizer")
    # Every version of `gpt2 prepare` has written both, also before the first shard.
    whole = isinstance(told, dict) and isinstance(values.get("shards"), list)
    if has_tokenizer and not whole:
        raise UserError(f"{manifest} is not a manifest of shards; {advice}")
    name = told.get("name") if isinstance(told, dict) else None
    if has_tokenizer and name not in (Tokenizer.name, OWN):
        raise UserError(f"{manifest} does not name the tokenizer of its shards; {advice}")
    if name == OWN and not is_described(told):
        raise UserError(f"{manifest} does not describe its tokenizer; run `gpt2 prepare` again")
    return named_in(values) if isinstance(told, dict) else GPT2_VOCABULARY


def manifest_value(path: Path, advice: str) -> Any:
    """The JSON value of a manifest, which names every file of its source.

    Args:
        path: of the manifest.
        advice: how to go on, for the error message.

    Raises:
        UserError: the file is missing, too large, or not JSON.
    """
    data = read_bytes(path, advice, MANIFEST_BYTES)
    return load_json(data, path, object, advice, MANIFEST_VALUES)


def mending(manifest: Path) -> str:
    """Advice on a broken manifest beside whole shards, for error messages."""
    if (manifest.parent / TOKENIZER_FILE).exists():
        return "put a whole copy in its place, or make the shards again in a new folder"
    return "put a whole copy in its place, or delete it if the shards have GPT-2's vocabulary"
