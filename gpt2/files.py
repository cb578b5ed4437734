"""Atomic writes, sha256, and the lock of a folder. No other module renames or syncs files.

A result is written under a temporary name, synced to disk and renamed. A process that is killed at
any moment therefore leaves the old file or the new one. It may also leave something whose name ends
in `.tmp`, which no reader takes for a result. Temporary names are random, and an existing file or
link of such a name is never opened. A rename replaces a link itself, never the file behind it.

The lock of a folder is a lock of the operating system on the file `.lock` in it. The system
releases it when the process ends, however it ends: a `.lock` file that a crash left locks nothing.
Over NFS (version 4, Linux) the lock holds for all machines. When a machine vanishes, the server
releases its locks after the lease time, a minute or two. On a file system without locks only
another process of this machine is noticed, by the process number in the file.
"""

import errno
import hashlib
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError
from .paths import check_unlinked, no_follow

LOCK = ".lock"
TEMPORARY_DIGITS = 8  # of the random number in a temporary name, in hexadecimal
# filelock locks byte 0, which no other handle can then read on Windows.
HOLDER_AT = 1 if os.name == "nt" else 0


# ---- atomic writes ------------------------------------------------------------------------------


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write a file to; renames it to `path` when the block ends.

    If the block raises, the temporary file is deleted and `path` stays as it was.

    Raises:
        OSError: the file could not be written, synced or renamed.
    """
    temporary = _temporary(path)
    # Not by tempfile, which gives its files to their owner alone.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except (Exception, KeyboardInterrupt):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, *chunks: bytes | memoryview) -> None:
    """Writes a whole file: after a crash `path` is the old file, or absent, or complete.

    Raises:
        OSError: the file could not be written; `path` stays as it was.
    """
    with replacing_file(path) as temporary, open(temporary, "wb") as file:
        for chunk in chunks:
            file.write(chunk)


@contextmanager
def replacing_folder(final: Path) -> Iterator[Path]:
    """Gives an empty folder to write into; renames it to `final` when the block ends.

    An old `final` is deleted just before. If the block raises, the new folder is deleted and the
    old one stays as it was.

    Args:
        final: the folder's name; its parents are made.

    Raises:
        OSError: the folder could not be written, synced or renamed.
    """
    temporary = _temporary(final)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        discard(final)
        os.replace(temporary, final)
        sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move(source: Path, target: Path) -> None:
    """Renames a file or folder on one file system; replaces a file of that name.

    Raises:
        OSError: the system refused.
    """
    os.replace(source, target)


def discard(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that a half-deleted folder never looks whole.

    Of a symbolic link, the link is deleted and the folder behind it stays.
    """
    if os.path.lexists(folder):
        doomed = _temporary(folder)
        os.replace(folder, doomed)
        with suppress(OSError):
            delete(doomed)


def delete(path: Path) -> None:
    """Deletes a file, a folder, or a symbolic link without what is behind it.

    Raises:
        OSError: the system refused.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def leftovers(folder: Path, name: str) -> list[Path]:
    """Temporary files and folders that a killed process left in the place of a result.

    Args:
        folder: of the result.
        name: of the result, or a pattern of `glob`.
    """
    ends = (".tmp", f".{'[0-9a-f]' * TEMPORARY_DIGITS}.tmp")  # the first is of older versions
    # A set: `step_*.tmp` also finds names that have digits before the end.
    return sorted({path for end in ends for path in folder.glob(name + end)})


def _temporary(path: Path) -> Path:
    """A name beside a path that nothing has: 2**32 of them leave no room for chance."""
    if not path.name:  # "." or "/"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path.with_name(f"{path.name}.{secrets.token_hex(TEMPORARY_DIGITS // 2)}.tmp")


def sync(path: Path) -> None:
    """Flushes a file or folder to disk (fsync). Windows cannot flush folders."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable_file(path: Path, option: str = "") -> None:
    """Raises UserError, before long work, where its result could not be written to `path`.

    Makes a file beside `path` and deletes it: permissions do not tell of a read-only file system.

    Args:
        path: of the result that will be written.
        option: begins the message, such as "--out=".
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        probe = _temporary(path)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        probe.unlink()
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{option}{path}: cannot write there ({why}); name another file") from None


def check_replaceable(path: Path, begin: bytes, what: str) -> None:
    """Raises UserError where a result would replace something else than an earlier result.

    Args:
        path: of the result that will be written.
        begin: bytes with which every result of the command begins.
        what: such a result in words, for the message.
    """
    found = None
    try:
        if not path.exists():
            return
        if path.is_file():  # reading a pipe or a device could wait for ever
            with open(path, "rb") as file:
                found = file.read(len(begin))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if found not in (begin, b""):
        raise UserError(f"{path} is there and no {what}; move it away, or name another file")


# ---- sha256 -------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> list[int | str]:
    """[size in bytes, sha256] of a file."""
    return [os.path.getsize(path), sha256_of(path)]


# ---- the lock of a folder -----------------------------------------------------------------------


class InUse(UserError):
    """Another process holds the lock of a folder."""


class FolderLock:
    """The lock of a folder, held by this process; made by `locked`."""

    def __init__(self, folder: Path, busy: str):
        self.folder, self._busy = folder, busy
        self.alone = threading.RLock()  # for threads that look and renew
        self._path = folder / LOCK
        self._lock, self._is, self._folder_is = self._take()

    def _take(self) -> tuple[Any, os.stat_result, os.stat_result]:
        """Makes the folder; (its lock, what is its file, what is it); raises as `locked` says."""
        import filelock  # here, since its import takes 0.1 s and most commands lock nothing

        folder, path = self.folder, self._path
        # No soft lock, which a killed process leaves. 0o644: others may take its file over.
        lock = filelock.FileLock(
            path, mode=0o644, blocking=False, thread_local=False, fallback_to_soft=False
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_unlinked(folder, path)  # filelock would empty the file behind a link
            while not _acquire(lock, path):
                if holder := _holder(path):
                    raise InUse(
                        f"{self._busy.format(holder=holder, folder=folder)}; wait for it to end, "
                        "or use another --out_dir= (docs/troubleshooting.md#folder-in-use)"
                    )
            with open(path, "r+b", opener=no_follow) as file:
                file.seek(HOLDER_AT)
                file.write(f"{os.getpid()} {socket.gethostname()}".encode())
                file.truncate()
                return lock, os.fstat(file.fileno()), folder.stat()
        except OSError as error:
            lock.release()
            raise UserError(
                f"--out_dir={folder}: cannot write there ({error.strerror}); use another folder"
            ) from None

    def held(self) -> bool:
        """Whether the file in the folder of this name is still ours."""
        return _is_still(self._path, self._is)

    def moved(self) -> bool:
        """Whether the folder of this name is another one by now, or none."""
        return not _is_still(self.folder, self._folder_is)

    def renew(self) -> None:
        """Takes the lock anew, of a folder that was moved or deleted meanwhile.

        Raises:
            InUse: another process has taken the folder.
            UserError: the folder cannot be written to.
        """
        before = self._lock
        self._lock, self._is, self._folder_is = self._take()
        before.release()

    def release(self) -> None:
        """Gives the folder back; its file is deleted."""
        if os.name == "nt":  # an open file cannot be deleted there
            self._lock.release()
        if self.held():
            with suppress(OSError):
                self._path.unlink()
        self._lock.release()


@contextmanager
def locked(
    folder: Path, busy: str = "another process ({holder}) is making shards in {folder}"
) -> Iterator[FolderLock]:
    """Makes a folder and holds its lock; the file `.lock` names this process meanwhile.

    Args:
        folder: made if it is missing.
        busy: the message when another process holds the lock; {holder} becomes "pid 123 on HOST".

    Raises:
        InUse: another process holds the lock.
        UserError: the folder cannot be written to.
    """
    lock = FolderLock(folder, busy)
    try:
        yield lock
    finally:
        lock.release()


def _is_still(path: Path, before: os.stat_result) -> bool:
    """Whether a file or folder of this name is there, and no other one than before."""
    try:
        return os.path.samestat(path.stat(), before)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a disk that does not answer has not been moved
        return True


def _acquire(lock: Any, path: Path) -> bool:
    """Whether this process now holds the folder.

    Raises:
        OSError: `path` cannot be made or written to.
    """
    import filelock

    try:
        lock.acquire()
    except filelock.Timeout:
        return False
    except (OSError, NotImplementedError) as error:  # flock fails on some network file systems
        if isinstance(error, PermissionError) and _is_of_another_user(path):
            _discard_if_free(path)  # in a folder for both
            return False
        # Fails here, and not above, if it is the folder that cannot be written to.
        os.close(no_follow(str(path), os.O_CREAT | os.O_WRONLY))
        pid, host = _read_holder(path)
        return host != socket.gethostname() or not _lives(pid)
    return True


def _is_of_another_user(path: Path) -> bool:
    """Whether a file is there that somebody else has made; False on Windows."""
    return os.name != "nt" and os.path.lexists(path) and path.lstat().st_uid != os.geteuid()


def _discard_if_free(path: Path) -> None:
    """Deletes a file that a killed process of another user left; one that is held stays.

    Raises:
        UserError: that is not allowed.
    """
    import fcntl

    try:
        with open(path, "rb", opener=no_follow) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, os.fstat(file.fileno())):
                path.unlink()
    except (BlockingIOError, FileNotFoundError):
        pass  # it is held, or its holder has just deleted it
    except OSError as error:
        raise UserError(
            f"{path} is another user's, and cannot be taken over ({error.strerror}): if that "
            "user's run is over, let them delete it; or use another --out_dir="
        ) from None


def _holder(path: Path) -> str:
    """Who holds the lock, for a message; "" if the holder has just deleted the file."""
    try:
        pid, host = _read_holder(path)
    except FileNotFoundError:
        return ""
    return f"pid {pid} on {host}" if pid else "which has just begun"


def _read_holder(path: Path) -> tuple[int, str]:
    """(process number, host) that the file names; the number is 0 if there is none."""
    with open(path, "rb") as file:
        file.seek(HOLDER_AT)
        pid, _, host = file.read(300).decode(errors="replace").partition(" ")
    return (int(pid), host) if pid.isdecimal() and pid.isascii() else (0, host)


def _lives(pid: int) -> bool:
    """Whether another process of this machine has this number."""
    if pid in (0, os.getpid()) or os.name == "nt":  # on Windows, locks always work
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
