"""Sources of text: FineWeb-Edu, other datasets of the Hub, the standard library, local files.

A source is an ordered list of parts, which are files. A part consists of rows. A .txt file is one
row; a .jsonl or .ndjson file has a row per line.
"""

import glob
import importlib
import inspect
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote

from ..data.text_files import DOCUMENT_BYTES, TextRow, read_marked_rows
from ..errors import DamagedFile, UserError
from ..huggingface.downloads import Downloads
from ..huggingface.hub import File, HubDataset
from ..untrusted.display import shown
from .local_files import MOST_HASHED, files_below, is_hidden, sample_sha256

FINEWEB_EDU, STDLIB = "fineweb-edu", "stdlib"
FINEWEB_REPOSITORY, FINEWEB_FOLDER = "HuggingFaceFW/fineweb-edu", "sample/10BT"
FINEWEB_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
COMMIT = re.compile(r"[0-9a-f]{40}")
FINEWEB_FOLDERS = {
    FINEWEB_EDU: FINEWEB_FOLDER,
    f"{FINEWEB_EDU}/sample-100BT": "sample/100BT",
    f"{FINEWEB_EDU}/sample-350BT": "sample/350BT",
    f"{FINEWEB_EDU}/default": "data",
}
HUB_SPEC = re.compile(
    r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<path>[^@]+))?"
)
# .ndjson is another name of .jsonl.
ENDING = re.compile(
    r"\.(?:parquet|(?:txt|jsonl|ndjson)(?:\.(?:gz|xz|zst))?)$",
    re.IGNORECASE,
)
# In a folder, a .json file is rather a config than text.
NAMED_ENDING = re.compile(
    r"\.(?:parquet|(?:txt|jsonl?|ndjson)(?:\.(?:gz|xz|zst))?)$", re.IGNORECASE
)
INDENTATION = re.compile(r"^(?: {4})+", re.MULTILINE)
ACCEPTED = ".txt, .jsonl (both also .gz, .xz, .zst) and .parquet"
# Tests and tables are a third of the standard library and make poor training text.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests"} | {
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
}


@dataclass(frozen=True)
class Part(File):
    """One file of a source: a local `path`, a `text`, or with neither a file to download.

    The name is relative with forward slashes, and so equal on every machine.
    """

    path: Path | None = None
    text: str = ""

    def __post_init__(self) -> None:
        if self.path is None and not self.text:  # a local file may have any name
            super().__post_init__()


@dataclass(frozen=True)
class Source:
    """Parts in a fixed order, and the prefix of their shards' names."""

    prefix: str
    revision: str
    parts: tuple[Part, ...]
    downloads: Downloads | None = None
    needed_parts: int = sys.maxsize  # end of the parts to prefetch
    document_bytes: int = DOCUMENT_BYTES  # longer documents are left out

    def identity(self) -> dict:
        """Revision and files for the manifest. A continued folder must have equal ones."""
        hashes = {p.name: p.sha256 for p in self.parts if p.sha256}
        files = {"files": {p.name: p.size_bytes for p in self.parts}}
        return {"revision": self.revision} | files | ({"files_sha256": hashes} if hashes else {})

    def samples(self) -> dict[str, str]:
        """Name -> `sample_sha256` of each local file, for the manifest; {} of very many files."""
        local = [part for part in self.parts if part.path]
        if len(local) > MOST_HASHED:
            return {}
        return {part.name: sample_sha256(part.path) for part in local if part.path}

    def rows(self, index: int, start: int = 0) -> Iterator[TextRow]:
        """Rows of a part from number `start` on. A downloaded file is deleted after its last row.

        Raises:
            UserError: a damaged or unreadable file, a file without texts, or a failed download.
        """
        part = self.parts[index]
        if part.text:
            yield from [(part.text, part.size_bytes)][start:]
        elif part.path:
            try:
                yield from read_marked_rows(part.path, start, self.document_bytes)
            except DamagedFile as error:
                error.name = part.name
                raise
            _check_unchanged(part.path, part.size_bytes)
        else:
            assert self.downloads is not None
            ahead = self.parts[index + 1 : self.needed_parts][:1]
            with self.downloads.open(part, *ahead) as path:
                yield from read_marked_rows(path, start, self.document_bytes)

    def close(self) -> None:
        """Ends running downloads."""
        if self.downloads:
            self.downloads.close()


def _check_unchanged(path: Path, size: int) -> None:
    """Raises UserError for a file whose size is no longer the one that the manifest records.

    A file that was deleted meanwhile has been read whole.
    """
    try:
        now = path.stat().st_size
    except OSError:
        return
    if now != size:
        raise UserError(
            f"{shown(str(path))} was changed while it was read: {size:,} bytes at the start, "
            f"{now:,} now; prepare it again with another --out_dir=, when nothing writes to it any "
            "more"
        )


def normal_name(spec: str) -> str:
    """The spelling of a source in the manifest: one for all that mean it."""
    return FINEWEB_EDU if spec == f"{FINEWEB_EDU}/sample-10BT" else Path(spec).as_posix()


def prefix_of(spec: str) -> str:
    """The prefix of the shards' names: letters, digits, dots and dashes."""
    if normal_name(spec) in FINEWEB_FOLDERS:
        return "edufineweb"
    if spec.startswith("hf:"):
        name = _hub_spec(spec)[0].partition("/")[2]
    else:
        name = (_folder_of_glob(spec) if _is_glob(spec) else Path(spec)).resolve().name
    return _plain(NAMED_ENDING.sub("", name)) or "text"


def default_folder(spec: str) -> str:
    """The default of `--out_dir=`: fineweb, or data/NAME."""
    if normal_name(spec) == FINEWEB_EDU:
        return "fineweb"
    if normal_name(spec) in FINEWEB_FOLDERS:
        return f"data/{_plain(spec)}"
    if spec.startswith("hf:"):
        path = _plain(_hub_spec(spec)[2])
        return f"data/{prefix_of(spec)}{path and '-'}{path}"
    return f"data/{prefix_of(spec)}"


def find_source(
    spec: str,
    download_dir: Path,
    known: dict | None = None,
    keep_downloads: bool = False,
    log: Callable[[str], None] = lambda text: None,
) -> Source:
    """The source that `--source=` names.

    Args:
        spec: fineweb-edu, another dataset of the Hub, stdlib, or a file, folder or glob.
        download_dir: folder for files of the Hub while they are read.
        known: the `identity` in an earlier run's manifest, which spares a listing of the Hub.
        keep_downloads: leave downloaded files in `download_dir`.
        log: receives a line about each download and each wait.

    Raises:
        UserError: no readable files, or the Hub cannot be reached.
    """
    if spec.startswith("hf:") or normal_name(spec) in FINEWEB_FOLDERS:
        dataset, files = _hub_files(spec, known, log)
        parts = tuple(Part(file.name, file.size_bytes, file.sha256) for file in files)
        downloads = Downloads(dataset, download_dir, keep_downloads, log)
        return Source(prefix_of(spec), dataset.revision, parts, downloads)
    if spec == STDLIB:
        parts = tuple(_standard_library())
        return Source(STDLIB, f"Python {platform.python_version()}", parts)
    try:
        return Source(prefix_of(spec), "", tuple(_local_parts(spec, log)))
    except OSError as error:
        raise UserError(f"--source={spec}: {error.strerror or error}") from None


def _plain(name: str) -> str:
    """A name with every other character than letters, digits, dots and dashes replaced."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")


def _is_glob(spec: str) -> bool:
    return glob.has_magic(spec) and not Path(spec).exists()


def _folder_of_glob(pattern: str) -> Path:
    """The part of a glob pattern before the first folder or file with a wildcard."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _local_parts(spec: str, log: Callable[[str], None]) -> Iterator[Part]:
    path, ending = Path(spec), NAMED_ENDING
    if _is_glob(spec):
        path = _folder_of_glob(spec)
        found = [Path(name) for name in glob.glob(spec, recursive=True)]
    elif spec and path.is_dir():
        found, ending = files_below(path, log), ENDING
    elif spec and path.is_file():
        found, path = [path], path.parent
    else:
        if spec.startswith(f"{FINEWEB_EDU}/"):
            raise UserError(f"--source={spec}: use one of {', '.join(FINEWEB_FOLDERS)}")
        raise UserError(
            f"--source={spec}: no such file, folder or glob; or use {FINEWEB_EDU}, {STDLIB}, or "
            "hf:OWNER/NAME for a dataset of the Hugging Face Hub"
        )
    readable = [file for file in found if file.is_file()]
    found = [file for file in readable if ending.search(file.name)]
    hidden = [file for file in readable if is_hidden(file.relative_to(path))]
    others = {*readable} - {*found} - {*hidden}
    hidden = [file for file in hidden if ending.search(file.name)]
    if hidden and found != [Path(spec)]:
        log(
            f"{len(hidden):,} hidden files are left out, such as {shown(hidden[0])}; name a file "
            "itself to read it"
        )
        found = [file for file in found if file not in set(hidden)]
    if not found:
        raise UserError(f"--source={spec}: nothing to read; give {ACCEPTED} files")
    if others:
        log(
            f"{len(others):,} files of other kinds are left out, such as {shown(min(others))}; "
            f"`gpt2 prepare` reads {ACCEPTED}"
        )
    for name, file in sorted((file.relative_to(path).as_posix(), file) for file in found):
        yield Part(name, file.stat().st_size, path=file)


def _standard_library() -> Iterator[Part]:
    """Python's own sources, then the documentation of the modules that are written in C.

    Each level of indentation becomes a tab. GPT-2 has no token for several spaces; without tabs,
    43 % of the tokens would be single spaces.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        inside = path.relative_to(root)
        if STDLIB_LEFT_OUT.isdisjoint(inside.parts) and path.is_file():
            try:
                text = path.read_bytes().decode()
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                text = INDENTATION.sub(lambda m: "\t" * (len(m[0]) // 4), text)
                yield Part(inside.as_posix(), len(text.encode()), text=text)
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        documented = inspect.getmembers(
            module, lambda m: inspect.isbuiltin(m) or inspect.isclass(m)
        )
        entries = [
            f"{name}.{key}\n\n{inspect.getdoc(member)}"
            for key, member in documented
            if not key.startswith("_") and inspect.getdoc(member)
        ]
        text = "\n\n".join([f"{name}\n\n{inspect.getdoc(module) or ''}", *entries])
        yield Part(f"builtin/{name}", len(text.encode()), text=text)


def _hub_spec(spec: str) -> tuple[str, str, str]:
    """(repository, revision, path) of hf:OWNER/NAME[@REVISION][/PATH].

    Raises:
        UserError: not of this form.
    """
    match = HUB_SPEC.fullmatch(spec.rstrip("/"))
    if not match:
        raise UserError(
            f"--source={spec}: write hf:OWNER/NAME, hf:OWNER/NAME/FOLDER or "
            "hf:OWNER/NAME@REVISION/FOLDER, such as hf:HuggingFaceFW/fineweb-edu/sample/10BT"
        )
    # %2F stands for a slash in a branch name: refs%2Fconvert%2Fparquet.
    return match["repository"], unquote(match["revision"] or "main"), match["path"] or ""


def _hub_files(
    spec: str, known: dict | None, log: Callable[[str], None]
) -> tuple[HubDataset, list[File]]:
    """The dataset at one commit, and its parquet or .jsonl files that the spec selects.

    Raises:
        UserError: no such dataset, revision or file, or no connection.
    """
    if normal_name(spec) in FINEWEB_FOLDERS:
        repository, revision = FINEWEB_REPOSITORY, FINEWEB_REVISION
        path = FINEWEB_FOLDERS[normal_name(spec)]
    else:
        repository, revision, path = _hub_spec(spec)
    if known and known.get("files"):
        return HubDataset(repository, _known_commit(known), log), _known_files(known)
    dataset = HubDataset(repository, revision, log)
    folder, pattern = path, "*"
    if glob.has_magic(path) or ENDING.search(path):
        folder, _, pattern = path.rpartition("/")
    below = f"{folder}/" if folder else ""
    files = [f for f in dataset.find(folder) if fnmatch(f.name.removeprefix(below), pattern)]
    for kind in ("parquet", "jsonl", "ndjson"):  # a dataset in both formats holds each text twice
        chosen = [f for f in files if ENDING.search(f.name) and f".{kind}" in f.name.lower()]
        if chosen:
            return dataset, sorted(chosen, key=lambda file: file.name)
    raise UserError(
        f"--source={spec}: no parquet files and no .jsonl files in {path or repository}; see "
        f"{dataset.page}"
    )


def _known_commit(known: dict) -> str:
    """The commit in a manifest; raises UserError for anything else than 40 hexadecimal digits."""
    commit = known.get("revision")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise UserError(
            f"the manifest.json in --out_dir= has the revision {str(commit)[:200]!r}, which is no "
            "commit of 40 hexadecimal digits; use a new --out_dir="
        )
    return commit


def _known_files(known: dict) -> list[File]:
    """The files in a manifest, with their sizes and hashes.

    Raises:
        UserError: values of other types, or a file outside of its folder.
    """
    sizes, hashes = known["files"], known.get("files_sha256", {})
    if (
        not isinstance(sizes, dict)
        or not isinstance(hashes, dict)
        or not all(type(size) is int and size >= 0 for size in sizes.values())
        or not all(isinstance(value, str) for value in hashes.values())
    ):
        raise UserError(
            "the manifest.json in --out_dir= has no sizes of files and their sha256; "
            "use a new --out_dir="
        )
    return [File(name, size, hashes.get(name, "")) for name, size in sizes.items()]
