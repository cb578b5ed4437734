"""The vocabulary of shards: how many ids there are, which ends a text, and whose they are.

GPT-2's is assumed where no manifest says otherwise. `gpt2 prepare --tokenizer=` writes another one
into `manifest.json`, with the files of its tokenizer beside the shards.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ..config.model import GPT2_VOCAB_SIZE
from ..errors import UserError
from ..tokenizer import END_OF_TEXT, Tokenizer
from ..untrusted.parsing import read_json

MAX_SIZE = 2**16  # of ids in a shard, which has 16 bits for each
OWN = "own"  # name of a tokenizer that is not GPT-2's, in a manifest
TOKENIZER_FILE = "tokenizer.json"  # beside the shards, if it is not GPT-2's


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
        UserError: a tokenizer lies beside the shards, and no manifest says how it is used.
    """
    has_tokenizer = (manifest.parent / TOKENIZER_FILE).exists()
    if has_tokenizer and not manifest.exists():
        raise UserError(
            f"{manifest.parent} holds a {TOKENIZER_FILE} without the {manifest.name} that says how "
            "it is used; run `gpt2 prepare` again"
        )
    try:
        content = read_json(manifest, object) if manifest.exists() else None
    except UserError:
        if has_tokenizer:
            raise
        return GPT2_VOCABULARY
    told = content.get("tokenizer") if isinstance(content, dict) else None
    if isinstance(told, dict) and told.get("name") == OWN and not is_described(told):
        raise UserError(f"{manifest} does not describe its tokenizer; run `gpt2 prepare` again")
    return named_in(content) if isinstance(told, dict) else GPT2_VOCABULARY
