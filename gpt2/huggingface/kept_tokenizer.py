"""A tokenizer in a checkpoint: the bytes of its tokenizer.json, and of the files that belong to it.

They are tensors, because pickles of strangers must be small.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.model import GPT2_VOCAB_SIZE
from ..errors import UserError
from ..tokenizer import Tokenizer
from ..untrusted.display import shown
from ..untrusted.parsing import MAX_FILE_BYTES
from .own_template import TemplatedTokenizer, with_template
from .own_tokenizer import USAGE_FILES, NoTokenizer, OwnTokenizer


def stored_tokenizer(value: Any, path: Path, rows: int) -> Tokenizer | None:
    """The tokenizer in a checkpoint, as `to_store` made it; None if there is none.

    Args:
        value: the entry of the checkpoint.
        path: the checkpoint.
        rows: of the network's token embedding.

    Raises:
        UserError: it is damaged, too large for the network, or `tokenizers` is not installed.
    """
    if value is None:
        return None
    value = value if isinstance(value, dict) else {}
    content, end, reason = (value.get(name) for name in ("content", "end_of_text", "reason"))
    files = value.get("files") if isinstance(value.get("files"), dict) else {}
    kept = {name: _bytes_in(files[name], path) for name in USAGE_FILES if name in files}
    if isinstance(reason, str):
        return NoTokenizer(shown(reason, limit=500))
    if content is None and kept and rows >= GPT2_VOCAB_SIZE:
        return with_template(path, kept)
    if not isinstance(end, int):
        raise UserError(f"{path}: its `tokenizer` is damaged")
    return OwnTokenizer(_bytes_in(content, path), end, str(path), rows=rows, files=kept)


def to_store(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer for a checkpoint. A tensor, because pickles of strangers must be small."""
    if not isinstance(tokenizer, OwnTokenizer | TemplatedTokenizer):
        return {"reason": getattr(tokenizer, "reason", "")}
    files = {name: _as_tensor(content) for name, content in tokenizer.files.items() if content}
    if isinstance(tokenizer, TemplatedTokenizer):
        return {"files": files}
    stored = {"content": _as_tensor(tokenizer.content), "end_of_text": tokenizer.end_of_text}
    return stored | ({"files": files} if files else {})


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _bytes_in(value: Any, path: Path) -> bytes:
    """The bytes of a tensor in a checkpoint; raises UserError for anything else."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or len(value) > MAX_FILE_BYTES:
        raise UserError(f"{path}: its `tokenizer` is damaged")
    return value.numpy().tobytes()
