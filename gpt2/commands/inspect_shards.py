"""Inspection of a folder of shards: integrity, document lengths, and the text of documents.

Memory stays below a few million tokens, or one document.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data.no_shards import why_no_shards
from ..data.shards import (
    REDO,
    SHARD_MANIFEST,
    SHARD_NAME,
    Shard,
    check_joined,
    open_shard,
    read_manifest,
    redo,
    shard_paths,
)
from ..data.vocabulary import TOKENIZER_FILE, Vocabulary, mending, named_in, of_shards
from ..errors import UserError
from ..files import sha256_of
from ..huggingface.shard_tokenizer import tokenizer_beside
from ..paths import for_shell
from ..report.console import log, warn
from ..tokenizer import Tokenizer, gpt2_tokenizer

PICTURE = "document_lengths.png"
COLUMNS = ("shard", "split", "tokens", "documents", "mean", "median", "MB")


def verify(folder: Path) -> int:
    """Checks all shards and the manifest; logs one line per problem; returns an exit code.

    Raises:
        UserError: there is nothing to check, or the manifest cannot be read.
    """
    paths, manifest = _open_folder(folder)
    entries = {entry["name"]: entry for entry in manifest["shards"]} if manifest else {}
    problems = list(_folder_problems(folder, paths, manifest)) if manifest else []
    vocabulary = of_shards(folder / SHARD_MANIFEST)
    total = sum(path.stat().st_size for path in paths)
    tokens = 0
    with _bar(total) as bar:
        for path in paths:
            entry = entries.get(path.name, {})
            try:
                shard = open_shard(path, vocabulary)
                tokens += shard.tokens
                problems += _shard_problems(shard, entry, bar.update)
            except UserError as error:
                problems.append(str(error).replace(REDO, redo(entry)))
            except OSError as error:
                problems.append(f"{path}: {error.strerror or error}; {redo(entry)}")
    for problem in problems:
        log(problem)
    if problems:
        log(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {folder}")
        return 1
    what = f"{folder}: {len(paths)} shards, {tokens:,} tokens"
    if not manifest:
        unknown = f"without a {SHARD_MANIFEST} no more can be checked"
        log(f"{what}: headers and token ids are right; {unknown}")
        return 0
    rest = "" if manifest.get("complete") else "; unfinished, `gpt2 prepare` goes on"
    log(
        f"{what}, {manifest['documents']:,} documents: headers, checksums, token ids and counts "
        f"are right{rest}"
    )
    return 0


def info(folder: Path) -> int:
    """Logs a table of the shards and plots the document lengths; returns an exit code.

    The length of a document is its tokens with the end-of-text token before it. It counts for the
    shard that it begins in.

    Raises:
        UserError: no shards there, or a damaged one.
    """
    paths, manifest = _open_folder(folder)
    known = of_shards(folder / SHARD_MANIFEST)
    splits = {s: [open_shard(p, known) for p in paths if _split(p) == s] for s in ("val", "train")}
    lengths: dict[str, Counter[int]] = {}
    rows = [list(COLUMNS)]
    with _bar(sum(path.stat().st_size for path in paths)) as bar:
        for split, shards in splits.items():
            lengths[split] = Counter()
            for index, shard in enumerate(shards):
                found = Counter(document_lengths(shards, index, bar.update).tolist())
                lengths[split] += found
                rows.append(_cells(shard.path.name, split, shard.tokens, found))
            rows.append(_cells("all", split, sum(s.tokens for s in shards), lengths[split]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        log("  ".join([f"{name:{widths[0]}}", *padded]))
    for line in _origin(manifest):
        log(line)
    from ..report.plot import plot_lengths

    medians = {split: median_length(counts) for split, counts in lengths.items()}
    try:
        target = plot_lengths(lengths, medians, folder.resolve().name, folder / PICTURE)
        log(f"document lengths: {target}")
    except UserError as error:
        warn(f"no picture of the lengths: {error}")
    return 0


def show(path: Path, number: int) -> int:
    """Logs the text of one document; returns an exit code.

    Args:
        path: a folder, whose training shards are read as one, or one shard.
        number: of the document, counted from 0.

    Raises:
        UserError: no such document.
    """
    is_shard = path.is_file() or path.suffix == ".bin"
    folder = path.parent if is_shard else path
    manifest = _manifest_of(folder)
    known = of_shards(folder / SHARD_MANIFEST)
    if is_shard:
        shards = [open_shard(path, known)]
    else:
        shards = [open_shard(p, known) for p in _open_folder(path)[0] if _split(p) == "train"]
    counts = {e["name"]: e["documents"] for e in manifest["shards"]} if manifest else {}
    before = 0
    for index, shard in enumerate(shards):
        count = counts.get(shard.path.name)
        if count is None:
            count = sum(_count(shard, chunk) for chunk in shard.chunks())
        if before <= number < before + count:
            tokens, ended = _document(shards[index:], number - before)
            log(_tokenizer(folder, known).decode(tokens.tolist()))
            if not ended and (why := _why_cut(shards[-1].path, manifest)):
                warn(why)
            return 0
        before += count
    numbers = f"use a number from 0 to {before - 1:,}" if before else "name another"
    raise UserError(f"--doc={number}: {path} holds {before:,} documents; {numbers}")


def _tokenizer(folder: Path, known: Vocabulary) -> Tokenizer:
    """The tokenizer of a folder of shards."""
    if not known.sha256:
        return gpt2_tokenizer()
    return tokenizer_beside(folder, known.sha256, known.end_of_text)


def _why_cut(path: Path, manifest: dict | None) -> str:
    """Why a document that reaches the end of a shard may not be whole; empty if it is."""
    paths = sorted(shard_paths(path.parent), key=lambda p: _split(p) == "train")  # as made
    if path in paths[:-1]:
        following = paths[paths.index(path) + 1]
        if _tokens_before_next([open_shard(following, named_in(manifest))]):
            return f"{path} ends inside this document; name the folder to see all of it"
    elif not (manifest and manifest.get("complete")):
        return f"{path} ends here, and the document perhaps does not"
    return ""


def document_lengths(
    shards: list[Shard], index: int, progress: Callable[[int], object] = lambda _: None
) -> np.ndarray:
    """Lengths (int64) of the documents that begin in a shard; the last may end in a later one.

    `progress` is told how many bytes of this shard have been read.
    """
    starts, offset = [], 0
    for chunk in shards[index].chunks():
        starts.append(offset + np.flatnonzero(chunk == shards[index].vocabulary.end_of_text))
        offset += len(chunk)
        progress(chunk.nbytes)
    places = np.concatenate([*starts, np.empty(0, np.int64)])
    if not len(places):
        return places
    return np.diff(np.append(places, offset + _tokens_before_next(shards[index + 1 :])))


def _tokens_before_next(shards: list[Shard]) -> int:
    """Tokens before the first document that begins in these shards."""
    before = 0
    for shard in shards:
        for chunk in shard.chunks():
            starts = np.flatnonzero(chunk == shard.vocabulary.end_of_text)
            if len(starts):
                return before + int(starts[0])
            before += len(chunk)
    return before


def _document(shards: list[Shard], number: int) -> tuple[np.ndarray, bool]:
    """Tokens of a document that begins in the first of these shards, without the end-of-text token.

    Returns:
        (tokens, whole): uint16; whole is whether an end-of-text token follows.
    """
    pieces: list[np.ndarray] = []
    begun, end = False, shards[0].vocabulary.end_of_text
    for chunk in (chunk for shard in shards for chunk in shard.chunks()):
        starts = np.flatnonzero(chunk == end)
        piece = chunk
        if not begun:
            if number >= len(starts):
                number -= len(starts)
                continue
            piece, begun = chunk[starts[number] + 1 :], True
            starts = np.flatnonzero(piece == end)
        if len(starts):
            return np.concatenate([*pieces, piece[: starts[0]]]), True
        pieces.append(piece)
    return np.concatenate([*pieces, np.empty(0, np.uint16)]), False


def _open_folder(folder: Path) -> tuple[list[Path], dict | None]:
    """(files named like shards, manifest).

    Raises:
        UserError: no such folder, or nothing in it.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of shards, such as {folder.parent}")
    make = f"gpt2 prepare --out_dir={for_shell(folder)}"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; make shards with `{make}`")
    paths, manifest = shard_paths(folder), _manifest_of(folder)
    if not paths:
        check_joined(folder)
    if not paths and not (manifest and manifest["shards"]):
        none = f"{folder} holds no shards; make them with `{make}`"
        raise UserError(why_no_shards(folder) or none)
    return paths, manifest


def _manifest_of(folder: Path) -> dict | None:
    """The manifest of a folder; a UserError about it says what helps whole shards."""
    return read_manifest(folder, mending(folder / SHARD_MANIFEST))


def _folder_problems(folder: Path, paths: list[Path], manifest: dict) -> Iterator[str]:
    entries = {entry["name"]: entry for entry in manifest["shards"]}
    names = {path.name for path in paths}
    for name in sorted(entries.keys() - names):
        yield f"{folder / name}: missing; {redo(entries[name], missing=True)}"
    for name in sorted(names - entries.keys()):
        yield f"{folder / name}: not in {SHARD_MANIFEST}, but training would read it; move it away"
    known = named_in(manifest)
    if known.sha256 and (problem := _tokenizer_problem(folder, known)):
        yield problem
    for key in ("tokens", "documents"):
        total = sum(entry[key] for entry in manifest["shards"])
        if manifest.get(key) != total:
            yield (
                f"{folder / SHARD_MANIFEST}: says {manifest.get(key)} {key} in all, its shards sum "
                f"to {total}; prepare into a new --out_dir="
            )


def _tokenizer_problem(folder: Path, known: Vocabulary) -> str:
    """What is wrong with the tokenizer beside the shards; "" for nothing."""
    path = folder / TOKENIZER_FILE
    if path.is_file() and sha256_of(path) == known.sha256:
        return ""
    return f"{path}: is not the tokenizer of these shards, or missing; copy it there again"


def _shard_problems(shard: Shard, entry: dict, progress: Callable) -> Iterator[str]:
    """The fault of a shard, compared with its entry in the manifest; empty: none."""
    digest, documents = hashlib.sha256(shard.header_bytes()), 0
    for chunk in shard.chunks():
        digest.update(chunk.data)
        documents += _count(shard, chunk)
        progress(chunk.nbytes)
    if not entry:
        return
    if digest.hexdigest() != entry["sha256"]:
        yield f"{shard.path}: its sha256 is not that of {SHARD_MANIFEST}; {redo(entry)}"
    for key, held in (("tokens", shard.tokens), ("documents", documents)):
        if held != entry[key]:
            said = f"{SHARD_MANIFEST} says {entry[key]:,}"
            yield f"{shard.path}: {held:,} {key}, {said}; {redo(entry)}"


def _split(path: Path) -> str:
    """ "train" or "val", from the name of a shard."""
    match = SHARD_NAME.fullmatch(path.name)
    assert match is not None  # every Shard has such a name
    return match["split"]


def _count(shard: Shard, chunk: np.ndarray) -> int:
    """Documents that begin in these tokens of a shard."""
    return int(np.count_nonzero(chunk == shard.vocabulary.end_of_text))


def median_length(lengths: Counter[int]) -> int:
    """The least length that at least half of the documents do not exceed; 0 without documents."""
    passed = 0
    for length in sorted(lengths):
        passed += lengths[length]
        if 2 * passed >= lengths.total():
            return length
    return 0


def _cells(name: str, split: str, tokens: int, lengths: Counter[int]) -> list[str]:
    """The cells of one line in the table of `info`."""
    documents = lengths.total()
    mean = sum(length * count for length, count in lengths.items()) / max(1, documents)
    numbers = [f"{n:,}" for n in (tokens, documents, round(mean), median_length(lengths))]
    return [name, split, *numbers, f"{2 * tokens / 1e6:,.1f}"]


def _origin(manifest: dict | None) -> Iterator[str]:
    if not manifest:
        yield f"no {SHARD_MANIFEST}: where these shards come from is not known"
        return
    tokenizer = manifest.get("tokenizer", {})
    yield f"source: {manifest.get('source')}, {len(manifest.get('files', {})):,} files"
    yield f"revision: {manifest.get('revision') or 'none (local files)'}"
    size = f" of {named_in(manifest).size:,} tokens" if named_in(manifest).sha256 else ""
    yield f"tokenizer: {tokenizer.get('name')}{size}, sha256 {tokenizer.get('sha256')}"
    if "workers" in manifest or "worker" in manifest:
        made_by = manifest.get("worker") or f"{manifest['workers']}, joined"
        yield f"worker: {made_by}"
    yield f"complete: {'yes' if manifest.get('complete') else 'no, `gpt2 prepare` goes on'}"


def _bar(total_bytes: int) -> tqdm:
    return tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)
