"""Folders that are whole or not there: written beside their name, synced to disk, renamed.

The rename is the commit: a process killed at any moment leaves the old folder or the new one, and
perhaps something that ends in `.tmp`, which no reader takes for a result.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .config import UserError


@contextlib.contextmanager
def committed(
    final: Path, problems: tuple[type[Exception], ...] = (), needed: int = 0
) -> Iterator[Path]:
    """An empty folder to write into, which takes the name `final` at the end of the block.

    Args:
        final: replaced if it is there.
        problems: errors, beside OSError, by which writers say that they could not write.
        needed: bytes that will be written, as far as it is known; for the message.

    Raises:
        UserError: no space or no permission; what was there before is still there.
    """
    temporary = final.with_name(final.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        discard(final)
        os.replace(temporary, final)
        sync(final.parent)
    except (OSError, *problems) as error:
        raise UserError(why_not_written(final, error, needed)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fingerprint(path: Path) -> list[int | str]:
    """Size in bytes and sha256 of a file."""
    with open(path, "rb") as file:
        return [os.path.getsize(path), hashlib.file_digest(file, "sha256").hexdigest()]


def sync(path: Path):
    """Asks the disk to keep what was written; folders cannot be asked on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path):
    """Deletes a folder; renamed first, so that half of it never looks whole."""
    if folder.exists():
        doomed = folder.with_name(folder.name + ".old.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def why_not_written(path: Path, error: Exception, needed: int = 0) -> str:
    """One line about a failed write, with the bytes needed and the space that is left."""
    reason = first_line(error)
    free = shutil.disk_usage(path.parent if path.parent.exists() else Path.cwd()).free
    # torch says "unexpected pos" when a disk is full, and nothing of a disk
    if "unexpected pos" in reason or "PytorchStreamWriter" in reason or "space" in reason:
        reason = "the disk is full"
    needs = f"needs {needed / 2**30:.2f} GiB, " if needed else ""
    return f"checkpoint {path} not written: {reason} ({needs}{free / 2**30:.2f} GiB free)"


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
