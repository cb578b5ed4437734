"""One process at a time in a folder: a lock of the system, which ends with its process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .config import UserError

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and holds its lock; a file `.lock` lies there meanwhile.

    On file systems without locks it has no effect.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
        while not _is_still(file, path):  # its last holder has just deleted it
            file.close()
            file = _open_locked(path)
    except OSError as error:
        raise UserError(
            f"--out_dir={folder}: cannot write there ({error.strerror}); use another folder"
        ) from None
    try:
        yield
    finally:
        if os.name == "nt":  # an open file cannot be deleted there
            file.close()
        with suppress(OSError):
            path.unlink()
        file.close()


def _open_locked(path: Path) -> BinaryIO:
    file = open(path, "ab")  # noqa: SIM115 - stays open as long as the lock is held
    if not _lock(file):
        file.close()
        raise UserError(
            f"another process is making shards in {path.parent}; wait for it to end, or use "
            "another --out_dir="
        )
    return file


def _lock(file: BinaryIO) -> bool:
    """Locks a file without waiting; False if another process has locked it."""
    if os.name == "nt":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True


def _is_still(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
