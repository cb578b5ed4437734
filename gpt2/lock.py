"""One process at a time in a folder: a lock of the system, which ends with its process.

The system gives the lock back when its process ends, however it ends, so a `.lock` that lies about
locks nothing. Over NFS (version 4, Linux) the lock holds for all machines, and the server takes it
from a machine that is gone when its lease is over, after a minute or two. Where a file system has
no locks, only another process of the same machine is noticed, by its number in the file.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .config import UserError

LOCK = ".lock"


@contextmanager
def locked(
    folder: Path, busy: str = "another process ({holder}) is making shards in {folder}"
) -> Iterator[None]:
    """Makes a folder and holds its lock; a file `.lock` with our number lies there meanwhile.

    Args:
        folder: made if it is missing.
        busy: what to say when another process holds it; {holder} becomes "pid 123 on HOST".

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path, busy)
        while not _is_still(file, path):  # its last holder has just deleted it
            file.close()
            file = _open_locked(path, busy)
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}".encode())
        file.flush()
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


def _open_locked(path: Path, busy: str) -> BinaryIO:
    file = open(path, "a+b")  # noqa: SIM115 - stays open as long as the lock is held
    free = _lock(file)
    pid, host = _holder(file)
    if free is None:  # no locks here
        free = host != socket.gethostname() or not _lives(pid)
    if not free:
        file.close()
        holder = f"pid {pid} on {host}" if pid else "which has just begun"
        raise UserError(
            f"{busy.format(holder=holder, folder=path.parent)}; wait for it to end, or use "
            "another --out_dir="
        )
    return file


def _lock(file: BinaryIO) -> bool | None:
    """Locks a file without waiting; False if another process has, None where there are no locks."""
    if os.name == "nt":
        import msvcrt

        try:
            file.seek(1 << 20)  # locked bytes cannot be read there, so one far behind the text
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


def _holder(file: BinaryIO) -> tuple[int, str]:
    """(process, host) that wrote its number last; 0 if there is none."""
    file.seek(0)
    pid, _, host = file.read(300).decode(errors="replace").partition(" ")
    return (int(pid), host) if pid.isdecimal() and pid.isascii() else (0, host)


def _lives(pid: int) -> bool:
    """Whether a process of this machine is there and not this one."""
    if pid in (0, os.getpid()) or os.name == "nt":  # there, locks always work
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_still(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
