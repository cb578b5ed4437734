"""Files and folders that are whole or not there, and one process at a time in a folder.

A result is written beside its name, synced to disk and renamed. The rename is the commit: a process
killed at any moment leaves the old file or the new one, and perhaps something that ends in `.tmp`,
which no reader takes for a result.

The lock of a folder is one of the system, which ends with its process, however that ends: a `.lock`
that lies about locks nothing. Over NFS (version 4, Linux) the lock holds for all machines, and the
server takes it from a machine that is gone when its lease is over, after a minute or two. Where a
file system has no locks, only another process of the same machine is noticed, by its number in the
file.
"""

import contextlib
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UserError, first_line


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


def write_atomically(path: Path, *chunks: bytes | memoryview):
    """Writes a file that is either absent (or the old one) or whole, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
