"""The tokenizer that lies beside shards: `gpt2 prepare --tokenizer=` has copied it there."""

from pathlib import Path

from ..errors import UserError
from ..untrusted.parsing import read_bytes
from .own_tokenizer import USAGE_FILES, OwnTokenizer, files_of
from .tokenizer_json import JSON_FILE


def tokenizer_beside(folder: Path, sha256: str, end_of_text: int) -> OwnTokenizer:
    """The tokenizer of a folder of shards.

    Args:
        folder: shards, manifest and tokenizer.json.
        sha256: of the tokenizer.json, as the manifest says.
        end_of_text: id of the token that separates documents, as the manifest says.

    Raises:
        UserError: the file is missing, or another one than the manifest's.
    """
    path = folder / JSON_FILE
    advice = "copy the tokenizer that the shards were made with there"
    content = read_bytes(path, advice)
    files = files_of(folder, USAGE_FILES)
    found = OwnTokenizer(content, end_of_text, str(path), files=files)
    if found.sha256 != sha256:
        raise UserError(f"{path} is not the tokenizer of the manifest's shards; {advice}")
    return found
