"""One-line errors for failed writes of checkpoints: reason, bytes needed, free space."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ..errors import UserError, first_line

BESIDE_TENSORS = 16 * 2**20  # bytes, at most, of all else in a checkpoint
OF_THE_SYSTEM = re.compile(r"\(os error (\d+)\)")  # in the errors of safetensors
WINDOWS_FULL = "not enough space on the disk"  # whose number means another error elsewhere
LIMITS: dict[int | None, str] = {
    errno.EFBIG: "no file may be so large here (ulimit -f, or the file system)",
    errno.EDQUOT: "the disk quota is used up",
}


@contextmanager
def write_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Converts disk errors, also those raised by torch and safetensors, into a UserError.

    Args:
        path: the file or folder that the block writes.
        needed: bytes to write; 0: unknown.

    Raises:
        UserError: no space, a limit or quota, or no permission.
    """
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, IsADirectoryError):
            raise UserError(f"checkpoint {path} not written: it is a folder; name a file") from None
        free = shutil.disk_usage(path.parent if path.parent.exists() else Path.cwd()).free
        reason = _reason(error, fits=free >= needed + BESIDE_TENSORS)
        needs = f"needs {_size(needed)}, " if needed else ""
        raise UserError(
            f"checkpoint {path} not written: {reason} ({needs}{_size(free)} free)"
        ) from None


def _size(count: int) -> str:
    """Bytes in GiB, or in MiB where that would be 0.00."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 100 else f"{count / 2**20:.1f} MiB"


def _reason(error: BaseException, fits: bool) -> str:
    """Why a write failed; `fits`: the disk has room for what was to be written."""
    reason = first_line(error)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := OF_THE_SYSTEM.search(reason)):
        number = int(found[1])
    # torch says no more than that a file ended before it should
    cut_short = "unexpected pos" in reason or "PytorchStreamWriter" in reason
    if number == errno.ENOSPC or WINDOWS_FULL in reason or (cut_short and not fits):
        return "the disk is full, see docs/troubleshooting.md#disk-full"
    if number in LIMITS or cut_short:
        limit = LIMITS.get(number, "a limit on the size of a file (ulimit -f) or a quota ended it")
        return f"{limit}, see docs/troubleshooting.md#disk-full"
    return reason


def bytes_of(tree: Any) -> int:
    """Total bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        tree = list(tree.values())
    return sum(map(bytes_of, tree)) if isinstance(tree, list | tuple) else 0
