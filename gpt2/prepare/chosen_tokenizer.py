"""The tokenizer that `gpt2 prepare --tokenizer=` names: GPT-2's, or one in a file of its own.

The files of another tokenizer are copied beside the shards. Training finds them there.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from ..data.shards import read_manifest
from ..data.vocabulary import MAX_SIZE, named_in, vocabulary_of
from ..errors import UserError
from ..files import write_atomically
from ..huggingface.own_tokenizer import SETTINGS_FILE, OwnTokenizer, files_of, make_tokenizer
from ..huggingface.tokenizer_json import JSON_FILE, content_of, origin_of
from ..paths import below
from ..tokenizer import Tokenizer
from ..untrusted.parsing import read_bytes, read_json

CONFIG_FILE = "config.json"
GPT2_CHOICES = ("auto", "gigatoken", "tiktoken")


def chosen_tokenizer(choice: str) -> str | OwnTokenizer:
    """The tokenizer of a file or folder; for GPT-2's, which of its libraries encodes.

    Args:
        choice: auto, gigatoken or tiktoken; a tokenizer.json; or a folder with one, or with
            vocab.json and merges.txt.

    Raises:
        UserError: no such file, no byte-level BPE, ids that shards cannot hold, or nothing says
            which token ends a text.
    """
    if choice in GPT2_CHOICES:
        return choice
    folder, path = _place(choice)
    content = content_of(path) if path.is_dir() else read_bytes(path)
    if content is None:
        raise UserError(f"--tokenizer={choice}: the folder has no {JSON_FILE}")
    origin = str(origin_of(path) if path.is_dir() else path)
    found = make_tokenizer(folder, content, origin, _settings(folder))
    if not isinstance(found, OwnTokenizer):  # GPT-2's
        return "auto"
    if found.vocab_size > MAX_SIZE:
        raise UserError(
            f"{origin} has {found.vocab_size:,} tokens, and shards hold ids below {MAX_SIZE:,} "
            "(16 bits); train a tokenizer of fewer tokens"
        )
    return found


def _place(choice: str) -> tuple[Path, Path]:
    """(folder of the files beside the tokenizer.json, path to read)."""
    path = Path(choice)
    if not path.exists():
        close = difflib.get_close_matches(choice, GPT2_CHOICES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"--tokenizer={choice}: none of {', '.join(GPT2_CHOICES)}, and no such folder or "
            f"{JSON_FILE}{hint}"
        )
    if path.is_dir() or path.name == JSON_FILE:
        return (path if path.is_dir() else path.parent), path
    return path / "none", path  # files beside one of another name may be of another tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    """The special ids of a folder: of shards, or of a model."""
    known = named_in(read_manifest(folder)) if (folder / JSON_FILE).exists() else None
    if known and known.sha256:
        return {"eos_token_id": known.end_of_text}
    path = folder / CONFIG_FILE
    return read_json(path) if path.exists() else {}


def describe_tokenizer(tokenizer: str | OwnTokenizer) -> dict[str, Any]:
    """A tokenizer's identity for the manifest."""
    if isinstance(tokenizer, str):
        return {key: getattr(Tokenizer, key) for key in ("name", "vocab_size", "sha256")}
    size, end, sha256 = vocabulary_of(tokenizer)
    return {"name": tokenizer.name, "vocab_size": size, "sha256": sha256, "end_of_text": end}


def check_same_tokenizer(old: dict, new: dict, out_dir: Path) -> None:
    """Raises UserError if the shards of a folder are not of the tokenizer that is asked for."""
    has, asked = named_in(old), named_in(new)
    if has == asked:
        return
    way_out = f"give --tokenizer={out_dir}, or" if has.sha256 else "leave --tokenizer= out, or"
    raise UserError(
        f"{out_dir} holds shards of {has}, not of {asked}; {way_out} use another --out_dir="
    )


def copy_tokenizer(choice: str, tokenizer: OwnTokenizer, out_dir: Path) -> None:
    """Writes the files of a tokenizer beside the shards, with one that names its end of text."""
    folder, _ = _place(choice)
    end = tokenizer.end_of_text_name
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end}
    made = {SETTINGS_FILE: json.dumps(settings, indent=1).encode()}
    for name, content in {**made, **files_of(folder), JSON_FILE: tokenizer.content}.items():
        path = below(out_dir, name)
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)


def copy_files(source: Path, target: Path) -> None:
    """Copies the tokenizer's files from one folder of shards to another."""
    for name, content in files_of(source).items():
        write_atomically(below(target, name), content)
