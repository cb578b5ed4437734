"""Shards: files of tokens, in the format of llm.c, and the manifest beside them. numpy only.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then that
many uint16 tokens; modded-nanogpt reads it too. A folder of a dataset holds
`<prefix>_val_000000.bin`, `<prefix>_train_000001.bin`, … and `manifest.json` with the sha256 of
each shard. A file is written under a temporary name and renamed when it is whole.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import write_atomically
from ..paths import is_below
from ..untrusted.parsing import to_json
from .manifest_kinds import has_right_kinds
from .no_shards import why_no_shards
from .vocabulary import GPT2_VOCABULARY, Vocabulary, manifest_value, of_shards

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
CHUNK_TOKENS = 2**22  # read at once by `Shard.chunks`: 8 MB
SHARD_MANIFEST = "manifest.json"
SAMPLE_TOKENS = 2**12  # hashed by `SequenceReader.fingerprint`, at each of three places
PREFIX = re.compile(r"[A-Za-z0-9.-]+")  # of the names that `gpt2 prepare` gives
SHARD_NAME = re.compile(r"(?P<prefix>.+)_(?P<split>train|val)(_(?P<number>\d+))?\.bin")


class SequenceReader:
    """A source of sequences for training and validation: a shard, or packed conversations."""

    path: Path  # of the file, for messages and checkpoints
    tokens: int  # how many there are
    vocabulary: Vocabulary = GPT2_VOCABULARY

    def read(self, start: int, count: int) -> np.ndarray:
        """uint16 tokens [start, start + count)."""
        raise NotImplementedError

    def sequence(self, start: int, count: int) -> tuple[np.ndarray, ...]:
        """(inputs, targets), each (count,) int64. The first input is the token at `start`."""
        tokens = self.read(start, count + 1).astype(np.int64)
        return tokens[:-1], tokens[1:]

    def chunks(self) -> Iterator[np.ndarray]:
        """All tokens in order, uint16, `CHUNK_TOKENS` at a time; raises UserError like `read`."""
        for start in range(0, self.tokens, CHUNK_TOKENS):
            yield self.read(start, min(CHUNK_TOKENS, self.tokens - start))

    def fingerprint(self) -> str:
        """sha256 over samples from the beginning, the middle and the end of the tokens."""
        count = min(SAMPLE_TOKENS, self.tokens)
        digest = hashlib.sha256()
        for first in (0, (self.tokens - count) // 2, self.tokens - count):
            digest.update(self.read(first, count).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Shard(SequenceReader):
    """A shard whose header has been checked; see `open_shard`."""

    path: Path
    tokens: int
    vocabulary: Vocabulary = GPT2_VOCABULARY

    def read(self, start: int, count: int) -> np.ndarray:
        """uint16 tokens [start, start + count).

        Reads instead of mapping into memory: if another program cuts a mapped file short, SIGBUS
        kills this process without a message.

        Raises:
            UserError: the file has become shorter than its header says, or a token is unknown.
        """
        assert 0 <= start <= start + count <= self.tokens, (start, count, self.tokens)
        tokens = np.empty(count, dtype="<u2")
        with open(self.path, "rb", buffering=0) as file:  # a buffer would read more than asked
            file.seek(HEADER_BYTES + TOKEN_BYTES * start)
            received = file.readinto(tokens.data)
        if received != tokens.nbytes:
            raise UserError(f"{self.path}: ends early (was it changed during the run?); {REDO}")
        self.check_ids(tokens, start)
        return tokens

    def header_bytes(self) -> bytes:
        """The bytes before the tokens, for the sha256 of the file."""
        with open(self.path, "rb") as file:
            return file.read(HEADER_BYTES)

    def check_ids(self, tokens: np.ndarray, start: int) -> None:
        """Raises UserError for a token outside the vocabulary, with its offset in the shard."""
        if len(tokens) and tokens.max() >= self.vocabulary.size:
            at = int(np.argmax(tokens >= self.vocabulary.size))
            raise UserError(
                f"{self.path}: token {tokens[at]} at offset {start + at} is outside "
                f"{self.vocabulary}; {REDO} (docs/troubleshooting.md#another-tokenizer)"
            )


REDO = "delete it and run `gpt2 prepare` again"


def redo(entry: dict[str, Any], missing: bool = False) -> str:
    """Advice on a damaged or missing shard, for error messages.

    Args:
        entry: the shard's entry in the manifest.
        missing: whether the file is not there at all.
    """
    if "worker" not in entry:
        return REDO.removeprefix("delete it and ") if missing else REDO
    it = "" if missing else "it and "
    return (
        f"delete {it}{SHARD_MANIFEST}, then run `gpt2 prepare --worker={entry['worker']}` and "
        "`gpt2 shards merge` again"
    )


def open_shard(path: Path, vocabulary: Vocabulary = GPT2_VOCABULARY) -> Shard:
    """The shard in a file, after its header has been checked against the file's size.

    Raises:
        UserError: not a shard, another version, or a token count that does not match the size.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=3)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if size < HEADER_BYTES or header[0] != MAGIC:
        raise UserError(
            f"{path}: not a token shard (its magic number is not {MAGIC}); "
            "make shards with `gpt2 prepare` (docs/troubleshooting.md#another-tokenizer)"
        )
    if header[1] != VERSION:
        raise UserError(
            f"{path}: version {header[1]} of the shard format; only version {VERSION} "
            "(GPT-2 tokens as uint16) can be read"
        )
    if size != HEADER_BYTES + TOKEN_BYTES * int(header[2]):
        held = (size - HEADER_BYTES) // TOKEN_BYTES
        raise UserError(
            f"{path}: header says {header[2]} tokens, file holds {held} "
            f"(truncated download?); {REDO}"
        )
    return Shard(path, int(header[2]), vocabulary)


def find_shards(folder: str | Path, split: str) -> list[Shard]:
    """Opens the shards of a split, "train" or "val", in the order of their names.

    Raises:
        UserError: no such folder, no shard of that split, or a damaged header in any of them.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(
            f"{folder} is a file; --data_dir= names a folder of shards, which "
            "`gpt2 prepare --source=TEXT --out_dir=data/mine` makes of text"
        )
    if not folder.is_dir():
        raise UserError(
            f"no data folder {folder}; make one with `python fineweb.py` (FineWeb-Edu) or "
            f"`gpt2 prepare --source=stdlib --out_dir={folder}`, or name another with --data_dir= "
            "(docs/troubleshooting.md#no-data)"
        )
    paths = [path for path in shard_paths(folder) if _split_of(path) == split]
    if not paths:
        check_joined(folder)
        none = f"{folder} holds no *_{split}_*.bin shards; run `gpt2 prepare --out_dir={folder}`"
        raise UserError(why_no_shards(folder, split) or none)
    vocabulary = of_shards(folder / SHARD_MANIFEST)
    return [open_shard(path, vocabulary) for path in paths]


def _split_of(path: Path) -> str:
    """The split in the name of a shard, "train" or "val"; "" for a file of another name."""
    match = SHARD_NAME.fullmatch(path.name)
    return match["split"] if match else ""


def check_joined(folder: Path) -> None:
    """Raises UserError if the shards are still in the folders of workers, not yet merged."""
    if any(folder.glob("worker-*-of-*")):
        raise UserError(f"{folder} holds folders of workers; join them: gpt2 shards merge {folder}")


def shard_paths(folder: Path) -> list[Path]:
    """The files of a folder that are named like shards, in the order of their names."""
    return sorted(path for path in folder.glob("*.bin") if _split_of(path))


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Writes a shard of uint16 tokens atomically; returns the sha256 of the file."""
    assert tokens.dtype == np.uint16
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    body = np.ascontiguousarray(tokens, dtype="<u2").data  # no copy: 200 MB in a usual shard
    write_atomically(path, header.data, body)
    digest = hashlib.sha256(header.data)
    digest.update(body)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replaces `manifest.json` atomically."""
    write_atomically(folder / SHARD_MANIFEST, to_json(manifest, indent=1), b"\n")


def read_manifest(folder: Path, advice: str = "") -> dict[str, Any] | None:
    """The manifest of a folder, or None where there is none; `advice` ends an error's line.

    Raises:
        UserError: the file is damaged, or lists a file that cannot be a shard of this folder.
    """
    path = folder / SHARD_MANIFEST
    if not path.exists():
        return None
    manifest = manifest_value(path, advice or "delete its folder and start over")
    entries = manifest.get("shards") if isinstance(manifest, dict) else None
    if (
        not (isinstance(entries, list) and all(map(_is_entry, entries)))
        or len({entry["name"] for entry in entries}) < len(entries)
        or not PREFIX.fullmatch(str(manifest.get("prefix", "x")))
        or not has_right_kinds(manifest)
    ):
        raise UserError(f"{path} is not a manifest of shards; {advice or 'use another --out_dir='}")
    return manifest


def _is_entry(entry: Any) -> bool:
    """Whether an entry of a manifest describes a shard in the manifest's own folder."""
    name = entry.get("name") if isinstance(entry, dict) else None
    match = SHARD_NAME.fullmatch(name) if is_below(name) and "/" not in name else None
    return (
        match is not None
        and entry.get("split") == match["split"]
        and all(key in entry for key in ("sha256", "tokens", "documents"))
    )
