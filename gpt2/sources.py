"""Where text comes from: FineWeb-Edu, the standard library, or files of one's own.

A source is an ordered list of parts (files). A part has rows: the one document of a .txt file, the
lines of a .jsonl file, the rows of a .parquet file.
"""

import errno
import glob
import importlib
import inspect
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .config import UserError
from .readers import Row, read_rows

FINEWEB_EDU, STDLIB = "fineweb-edu", "stdlib"
FINEWEB_REPOSITORY, FINEWEB_FOLDER = "HuggingFaceFW/fineweb-edu", "sample/10BT"
FINEWEB_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
ENDING = re.compile(r"\.(?:parquet|(?:txt|jsonl)(?:\.(?:gz|xz|zst))?)$", re.IGNORECASE)
INDENTATION = re.compile(r"^(?: {4})+", re.MULTILINE)
ACCEPTED = ".txt, .jsonl (both also .gz, .xz, .zst) and .parquet"
# Tests and tables would be a third of the standard library, and poor reading.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests"} | {
    "idlelib", "lib2to3", "turtledemo", "encodings"
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One file of a source: a path, or a text, or (with neither) something to download."""

    name: str  # relative, with forward slashes: the same on every machine
    size_bytes: int
    path: Path | None = None
    text: str = ""


@dataclass(frozen=True)
class Source:
    """Parts in a fixed order, and the name that their shards will have."""

    prefix: str
    revision: str
    parts: tuple[Part, ...]
    download: Callable[[Part], Path] | None = None

    def identity(self) -> dict:
        """What must be the same for a half-finished folder of shards to be continued."""
        return {"revision": self.revision, "files": {p.name: p.size_bytes for p in self.parts}}

    def rows(self, index: int, start: int = 0) -> Iterator[Row]:
        """Rows of a part from number `start` on; a downloaded file is deleted after its last one.

        Raises:
            UserError: a damaged or unreadable file, one without texts, or no way to download it.
        """
        part = self.parts[index]
        if part.text:
            yield from [(part.text, part.size_bytes)][start:]
        elif part.path:
            yield from read_rows(part.path, start)
        else:
            assert self.download is not None
            path = self.download(part)
            try:
                yield from read_rows(path, start)
            except UserError:  # damaged: the next run must not find it again
                path.unlink()
                raise
            path.unlink()


def prefix_of(spec: str) -> str:
    """The first part of the shards' names: letters, digits, dots and dashes."""
    if spec == FINEWEB_EDU:
        return "edufineweb"
    name = (_folder_of_glob(spec) if _is_glob(spec) else Path(spec)).resolve().name
    return re.sub(r"[^A-Za-z0-9.-]+", "-", ENDING.sub("", name)).strip("-.") or "text"


def find_source(spec: str, download_dir: Path, known_files: dict[str, int] | None) -> Source:
    """The source that `--source=` names.

    Args:
        spec: fineweb-edu, stdlib, or a file, folder or glob.
        download_dir: folder for files of the Hub while they are read.
        known_files: name -> bytes of the Hub's files where an earlier run has listed them.

    Raises:
        UserError: nothing usable there, or the Hub cannot be reached.
    """
    if spec == FINEWEB_EDU:
        return _fineweb_edu(download_dir, known_files)
    if spec == STDLIB:
        parts = tuple(_standard_library())
        return Source(STDLIB, f"Python {platform.python_version()}", parts)
    try:
        return Source(prefix_of(spec), "", tuple(_local_parts(spec)))
    except OSError as error:
        raise UserError(f"--source={spec}: {error.strerror or error}") from None


def _is_glob(spec: str) -> bool:
    return glob.has_magic(spec) and not Path(spec).exists()


def _folder_of_glob(pattern: str) -> Path:
    """The folders before the first wildcard."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _local_parts(spec: str) -> Iterator[Part]:
    path = Path(spec)
    if _is_glob(spec):
        path = _folder_of_glob(spec)
        found = [Path(name) for name in glob.glob(spec, recursive=True)]
    elif spec and path.is_dir():
        found = list(path.rglob("*"))
    elif spec and path.is_file():
        found, path = [path], path.parent
    else:
        raise UserError(
            f"--source={spec}: no such file, folder or glob; or use {FINEWEB_EDU} or {STDLIB}"
        )
    found = [file for file in found if ENDING.search(file.name) and file.is_file()]
    if not found:
        raise UserError(f"--source={spec}: nothing to read; give {ACCEPTED} files")
    for name, file in sorted((file.relative_to(path).as_posix(), file) for file in found):
        yield Part(name, file.stat().st_size, file)


def _standard_library() -> Iterator[Part]:
    """Python's own sources, then the documentation of the modules that are written in C.

    Each level of indentation becomes a tab. GPT-2 has no token for several spaces, so that 43 % of
    the tokens would be single ones.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if STDLIB_LEFT_OUT.isdisjoint(name.parts) and path.is_file():
            try:
                text = path.read_bytes().decode()
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                text = INDENTATION.sub(lambda m: "\t" * (len(m[0]) // 4), text)
                yield Part(name.as_posix(), len(text.encode()), text=text)
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        documented = inspect.getmembers(
            module, lambda m: inspect.isbuiltin(m) or inspect.isclass(m)
        )
        entries = [f"{name}.{key}\n\n{inspect.getdoc(member)}" for key, member in documented
                   if not key.startswith("_") and inspect.getdoc(member)]  # fmt: skip
        text = "\n\n".join([f"{name}\n\n{inspect.getdoc(module) or ''}", *entries])
        yield Part(f"builtin/{name}", len(text.encode()), text=text)


def _fineweb_edu(download_dir: Path, known_files: dict[str, int] | None) -> Source:
    where = {"repo_id": FINEWEB_REPOSITORY, "repo_type": "dataset", "revision": FINEWEB_REVISION}

    def listing() -> dict[str, int]:
        from huggingface_hub import HfApi

        tree = HfApi().list_repo_tree(path_in_repo=FINEWEB_FOLDER, **where)
        return {file.path: file.size for file in tree if file.path.endswith(".parquet")}

    def download(part: Part) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(_ask_hub(lambda: hf_hub_download(filename=part.name, local_dir=download_dir,
                                                     **where)))  # fmt: skip

    files = known_files or _ask_hub(listing)
    if not files:
        raise UserError(f"{FINEWEB_REPOSITORY} has no parquet files in {FINEWEB_FOLDER}")
    parts = tuple(Part(name, files[name]) for name in sorted(files))
    return Source(prefix_of(FINEWEB_EDU), FINEWEB_REVISION, parts, download)


def _ask_hub(call: Callable):
    """Runs a call of huggingface_hub; its many errors become one line."""
    from huggingface_hub.errors import HfHubHTTPError

    # The base is httpx's HTTPError in huggingface_hub 1, and httpx2's in 2.
    network_error = HfHubHTTPError.__bases__[0]
    try:
        return call()
    except (OSError, ValueError, RuntimeError, network_error) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise UserError("disk full while downloading; finished shards are kept") from None
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"cannot reach the Hugging Face Hub: {why}; run the same command again to continue, "
            "or use --source=PATH"
        ) from None
