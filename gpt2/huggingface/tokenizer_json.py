"""The tokenizer.json of a folder: its own, or one made of its vocab.json and merges.txt."""

import json
from pathlib import Path

from ..tokenizer import END_OF_TEXT_NAME
from ..untrusted.parsing import read_bytes, read_json

JSON_FILE, VOCAB_FILE, MERGES_FILE = "tokenizer.json", "vocab.json", "merges.txt"
ADDED_FILE = "added_tokens.json"


def origin_of(folder: Path) -> Path:
    """The file that `content_of` reads, for messages."""
    both = (folder / VOCAB_FILE).exists() and (folder / MERGES_FILE).exists()
    return folder / (MERGES_FILE if both and not (folder / JSON_FILE).exists() else JSON_FILE)


def content_of(folder: Path) -> bytes | None:
    """A tokenizer.json: the folder's, or one made of its vocab.json and merges.txt."""
    if (folder / JSON_FILE).exists():
        return read_bytes(folder / JSON_FILE)
    if not (folder / VOCAB_FILE).exists() or not (folder / MERGES_FILE).exists():
        return None
    vocab = read_json(folder / VOCAB_FILE)
    text = read_bytes(folder / MERGES_FILE).decode("utf-8", errors="replace")
    lines = (line.removesuffix("\r") for line in text.split("\n"))  # git may write \r\n
    merges = [line for line in lines if line and not line.startswith("#version")]
    added = read_json(folder / ADDED_FILE) if (folder / ADDED_FILE).exists() else {}
    named = {END_OF_TEXT_NAME: vocab[END_OF_TEXT_NAME]} if END_OF_TEXT_NAME in vocab else {}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    made = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": text, **flags, "special": True}
            for text, number in sorted({**named, **added}.items(), key=lambda item: str(item[1]))
        ],
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": cut,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return json.dumps(made).encode()
