"""Names from outside, and symbolic links: what may be read or written below a folder.

A manifest, an index of weights and a listing of the Hub name files. Every such name goes through
`below`, because `../x` or an absolute path would lead out of the folder.

A folder that a stranger has made may hold symbolic links in the place of files that a command
writes. A file that is replaced is renamed over such a link (`files.py`). A file that is opened in
place is opened by `no_follow`, and a folder that is written into is checked by `check_unlinked`.
The folder that a person names, and its parents, may be links.

A path in a command that is printed for pasting goes through `for_shell`.
"""

import errno
import os
import shlex
from pathlib import Path, PureWindowsPath
from typing import Any, TypeGuard

from .errors import UserError

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows lacks it; `no_follow` also looks by itself


def is_below(name: Any) -> TypeGuard[str]:
    """Whether a name is a relative path that stays below its folder, on every system.

    A name may have folders, separated by forward slashes. Backslashes, drive letters and control
    characters are refused. So are parts of dots and spaces only, which Windows shortens to `..`.
    """
    return (
        isinstance(name, str)
        and "\\" not in name
        and not PureWindowsPath(name).drive
        and all(character.isprintable() or character > "\x9f" for character in name)
        and all(part.strip(". ") for part in name.split("/"))
    )


def below(folder: Path, name: Any) -> Path:
    """The path of a file that a manifest, an index or a listing names.

    Raises:
        UserError: the name leads out of the folder, or is none.
    """
    if not is_below(name):
        raise UserError(
            f"{str(name)[:200]!r} is listed as a file of {folder}, but lies outside its folder; "
            "do not use this copy"
        )
    return folder / name


def check_unlinked(folder: Path, *paths: Path) -> None:
    """Raises UserError for a symbolic link in the place of a path or of a folder above it.

    Args:
        folder: where the check begins; it may itself be a link.
        paths: below `folder`.
    """
    for path in paths:
        for part in (path, *path.parents):
            if part == folder:
                break
            if part.is_symlink():
                raise UserError(
                    f"{part} is a symbolic link and may lead out of {folder}; move it away, or "
                    "use another folder"
                )


def check_utf8(path: Path) -> None:
    """Raises UserError for a name that is not UTF-8: safetensors opens no such file."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path}: the name is not UTF-8, as names of weights must be; use another"
        ) from None


def for_shell(text: object) -> str:
    """A path or an argument as one word of a command that is printed for pasting into a shell.

    What needs no quotes stays as it is.
    """
    if os.name == "nt":  # cmd.exe knows no single quotes, and a backslash needs none
        import subprocess  # here, since only Windows needs it

        return subprocess.list2cmdline([str(text)])
    return shlex.quote(str(text))


def no_follow(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses a symbolic link.

    Raises:
        OSError: a link, or any other error of `os.open`.
    """
    if os.path.islink(path):
        raise OSError(errno.ELOOP, "a symbolic link, which is not followed", str(path))
    return os.open(path, flags | NO_FOLLOW, 0o666)
