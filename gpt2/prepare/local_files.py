"""Local files of a source: those below a folder, and a hash that notices a change of a file."""

import hashlib
import heapq
import os
from collections.abc import Callable
from pathlib import Path

from ..untrusted.display import shown

SAMPLES, SAMPLE_BYTES = 16, 2**16  # that are read of a large file, evenly spread
DIGITS = 16  # of a hash, for the manifest's size; a change is no attack
MOST_HASHED = 10_000  # files; of more, hashing takes a minute each time, and sizes must do


def files_below(folder: Path, log: Callable[[str], None]) -> list[Path]:
    """All files below a folder, also behind links to folders.

    Each real folder is read once, so that a loop of links ends. Its own name comes before that of a
    link to it, and a hidden name comes last.
    """
    found: list[Path] = []
    unread: list[Path] = []
    seen: set[str] = set()
    waiting = [(False, 0, str(folder))]  # (whether the name is hidden, links in it, name)
    while waiting:
        hidden, links, name = heapq.heappop(waiting)
        if (real := os.path.realpath(name)) in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(name))
        except OSError:
            unread.append(Path(name))
            continue
        for entry in entries:
            # DirEntry.is_dir raises for a link to itself.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                below = (hidden or is_hidden(Path(entry.name)), links + entry.is_symlink())
                heapq.heappush(waiting, (*below, entry.path))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                unread.append(Path(entry.path))
            else:
                found.append(Path(entry.path))
    if unread:
        log(
            f"{len(unread):,} folders or links cannot be read and are left out, such as "
            f"{shown(min(unread))}"
        )
    return found


def is_hidden(path: Path) -> bool:
    """Whether a program left a file there: a copy of a notebook's, or of macOS."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def sample_sha256(path: Path) -> str:
    """The first digits of the sha256 of a file of up to 1 MiB, or of 16 samples of a larger one.

    "" for a file that cannot be read.

    Hashing a large corpus whole would take minutes each time that a preparation goes on.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(file.read(size))
            else:
                for number in range(SAMPLES):
                    file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    except OSError:
        return ""  # reading its rows says why
    return digest.hexdigest()[:DIGITS]
