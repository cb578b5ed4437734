"""One-line errors for failed writes of checkpoints: reason, bytes needed, free space."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ..errors import UserError, first_line


@contextmanager
def write_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Converts disk errors, also those raised by torch and safetensors, into a UserError.

    Args:
        path: the file or folder that the block writes.
        needed: bytes to write; 0: unknown.

    Raises:
        UserError: no space or no permission.
    """
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, IsADirectoryError):
            raise UserError(f"checkpoint {path} not written: it is a folder; name a file") from None
        reason = first_line(error)
        # torch reports a full disk as "unexpected pos"
        if "unexpected pos" in reason or "PytorchStreamWriter" in reason or "space" in reason:
            reason = "the disk is full, see docs/troubleshooting.md#disk-full"
        free = shutil.disk_usage(path.parent if path.parent.exists() else Path.cwd()).free
        needs = f"needs {needed / 2**30:.2f} GiB, " if needed else ""
        raise UserError(
            f"checkpoint {path} not written: {reason} ({needs}{free / 2**30:.2f} GiB free)"
        ) from None


def bytes_of(tree: Any) -> int:
    """Total bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        tree = list(tree.values())
    return sum(map(bytes_of, tree)) if isinstance(tree, list | tuple) else 0
