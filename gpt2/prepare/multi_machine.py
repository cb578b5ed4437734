"""Many machines: the source files of each worker, and the merge of their shards.

The source's files are split into n contiguous runs of about equal bytes. Worker k reads run k and
writes an ordinary folder of shards below the shared folder. Worker 1 alone makes a validation
shard. A merge moves all shards into the shared folder and renumbers them. The merged text equals
the text that one machine would write, in order. The boundaries between shards differ.
"""

import re
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..data.shards import (
    SHARD_MANIFEST,
    SHARD_NAME,
    open_shard,
    read_manifest,
    shard_paths,
    write_manifest,
)
from ..data.vocabulary import named_in
from ..errors import UserError
from ..files import leftovers, move, sha256_of
from ..paths import below, check_unlinked
from ..report.console import log
from .chosen_tokenizer import copy_files
from .sources import Source

FOLDER = re.compile(r"worker-(\d+)-of-(\d+)")
TOTALS = (
    *("documents", "tokens", "skipped_rows", "repaired_rows", "literal_rows"),
    *("too_long_rows", "not_json_rows", "no_text_rows"),
)
FILES_SAMPLE = "files_sample_sha256"  # of the worker's own files
OWN = {*TOTALS, FILES_SAMPLE, "complete", "shards", "worker", "damaged"}  # all other keys agree


@dataclass(frozen=True)
class Worker:
    """One of `count` machines that share a source, counted from 1. Worker 1/1 works alone."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Worker":
        """Parses `--worker=`.

        Raises:
            UserError: not of the form 3/16, or a number outside 1 to the count.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not match:
            raise UserError(f"--worker={text}: write it as 3/16, the third of sixteen")
        worker = cls(int(match[1]), int(match[2]))
        if not 1 <= worker.number <= worker.count:
            last = max(1, worker.count)
            raise UserError(f"--worker={text}: workers count from 1; use 1/{last} to {last}/{last}")
        return worker

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def folder(self, out_dir: Path) -> Path:
        """The folder in which this worker makes its shards."""
        width = len(str(self.count))
        return out_dir / f"worker-{self.number:0{width}d}-of-{self.count}"

    def cuts(self, sizes: list[int]) -> list[int]:
        """Splits the files into contiguous runs of about equal bytes.

        Worker k has the files cuts[k - 1]:cuts[k].

        Args:
            sizes: bytes of each file.

        Raises:
            UserError: fewer files than workers.
        """
        if len(sizes) < self.count:
            raise UserError(
                f"--worker={self}: the source has only {len(sizes)} files, and each worker needs "
                f"at least one; use {len(sizes)} workers or fewer"
            )
        ends = [0, *accumulate(sizes)]
        cuts = [0]
        for number in range(1, self.count):
            fair = ends[-1] * number / self.count
            nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - fair))
            # Every worker gets at least one file.
            cuts.append(min(max(nearest, cuts[-1] + 1), len(sizes) - (self.count - number)))
        return [*cuts, len(sizes)]

    def span(self, cuts: list[int]) -> slice:
        """The slice of the source's files that this worker reads."""
        if len(cuts) != self.count + 1 or cuts != sorted(cuts):
            raise UserError(f"--worker={self}: the manifest's `cuts` are not those of its workers")
        return slice(*cuts[self.number - 1 : self.number + 1])

    def share(self, source: Source, cuts: list[int]) -> Source:
        """The source reduced to this worker's files.

        Raises:
            UserError: the source has another number of files than `cuts`.
        """
        if cuts[-1:] != [len(source.parts)]:
            raise UserError(
                f"--worker={self}: the source has {len(source.parts)} files, and {cuts[-1:]} where "
                "other workers began; use another --out_dir="
            )
        return replace(source, parts=source.parts[self.span(cuts)])


def begun_by_others(out_dir: Path, worker: Worker, source: str) -> dict:
    """The manifest of another worker that has begun on a source, or {}.

    Every worker takes its cuts from there. A source of the Hub is also pinned to its commit and
    files, so that a branch that moves between two workers changes nothing.
    """
    for number in range(1, worker.count + 1 if worker.count > 1 else 0):
        manifest = read_manifest(Worker(number, worker.count).folder(out_dir))
        if manifest and manifest.get("source") == source:
            return manifest
    return {}


def folder_for(out_dir: Path, worker: Worker) -> Path:
    """The folder that `gpt2 prepare` fills: `out_dir` itself, or the worker's below it.

    After `gpt2 shards merge` every worker gets `out_dir`, which is complete.

    Raises:
        UserError: `out_dir` was begun by one machine or by another number of workers.
    """
    manifest = read_manifest(out_dir)
    if manifest and worker.count > 1 and manifest.get("workers") != worker.count:
        raise UserError(
            f"{out_dir} holds shards that were not made by {worker.count} workers; "
            "use another --out_dir="
        )
    counts = {count for _, count in _worker_folders(out_dir)}
    if not manifest and counts - {worker.count}:
        n = max(counts)
        raise UserError(
            f"{out_dir} holds folders of {n} workers; go on with --worker=1/{n} and so on, join "
            f"them with `gpt2 shards merge {out_dir}`, or use another --out_dir="
        )
    return out_dir if manifest or worker.count == 1 else worker.folder(out_dir)


def merge(out_dir: Path) -> int:
    """Joins the folders of all workers into one set of shards; returns an exit code.

    Shards are renamed, not copied. The workers' manifests alone decide every new name, and they
    stay in place. After a crash, a second merge therefore finishes the first one.

    Raises:
        UserError: a worker is missing, unfinished or of another source; a file is in the way.
    """
    merged = read_manifest(out_dir)
    if merged is not None:
        if not merged.get("complete"):
            raise UserError(f"{out_dir} is unfinished: run `gpt2 prepare` again, without --worker=")
        how = f"joined from {merged['workers']} workers" if "workers" in merged else "one set"
        log(f"{out_dir}: nothing to do, its {len(merged['shards'])} shards are {how} already")
        return 0
    manifests = _finished_manifests(out_dir)
    moves = _plan(out_dir, manifests)
    _check(out_dir, moves)
    for source, target, _ in moves:
        if source.exists():
            try:
                move(source, target)
            except OSError as error:
                raise UserError(f"{source}: cannot become {target} ({error.strerror})") from None
    first = next(iter(manifests.values()))
    totals = {key: sum(m.get(key, 0) for m in manifests.values()) for key in TOTALS}
    merged = {key: value for key, value in first.items() if key not in {*OWN, "cuts"}} | totals
    merged |= {"complete": True, "workers": len(manifests)}
    merged["files"] = dict(
        item
        for worker, manifest in manifests.items()
        for item in [*manifest["files"].items()][worker.span(manifest["cuts"])]
    )
    if any(FILES_SAMPLE in manifest for manifest in manifests.values()):
        merged[FILES_SAMPLE] = {
            name: sha256
            for manifest in manifests.values()
            for name, sha256 in manifest.get(FILES_SAMPLE, {}).items()
        }
    try:
        for path in leftovers(out_dir, SHARD_MANIFEST):
            path.unlink()
        if named_in(first).sha256:
            copy_files(Worker(1, len(manifests)).folder(out_dir), out_dir)
        write_manifest(out_dir, merged | {"shards": [entry for _, _, entry in moves]})
    except OSError as error:
        raise UserError(
            f"{out_dir / SHARD_MANIFEST}: {error.strerror or error}; merge again to finish"
        ) from None
    log(
        f"{out_dir}: {len(moves)} shards of {len(manifests)} workers, {merged['tokens']:,} tokens, "
        f"{merged['documents']:,} documents\n"
        f"check them: gpt2 shards verify {out_dir}\n"
        f"train on them: python train_gpt2.py --data_dir={out_dir}"
    )
    return 0


def _worker_folders(out_dir: Path) -> list[tuple[int, int]]:
    """(number, count) of every worker folder, sorted."""
    matches = (FOLDER.fullmatch(path.name) for path in out_dir.glob("worker-*-of-*"))
    return sorted((int(match[1]), int(match[2])) for match in matches if match)


def _finished_manifests(out_dir: Path) -> dict[Worker, dict]:
    """The manifest of each worker, in order.

    Raises:
        UserError: a worker is missing, unfinished or of another source; names the first one.
    """
    found = _worker_folders(out_dir)
    if not found:
        raise UserError(
            f"{out_dir}: no folders of workers to join; make them with "
            f"`gpt2 prepare --out_dir={out_dir} --worker=1/4` and so on"
        )
    counts = sorted({count for _, count in found})
    if len(counts) > 1:
        raise UserError(
            f"{out_dir} holds folders of {counts[0]} and of {counts[1]} workers; "
            "delete those that do not belong"
        )
    manifests: dict[Worker, dict] = {}
    for number in range(1, counts[0] + 1):
        worker = Worker(number, counts[0])
        folder = worker.folder(out_dir)
        check_unlinked(out_dir, folder)  # its shards are moved out of it
        manifest = read_manifest(folder)
        if manifest is None or not manifest.get("complete"):
            state = "missing" if manifest is None else "unfinished"
            raise UserError(
                f"{folder} is {state}; run `gpt2 prepare --worker={worker}` with the options of "
                "the other workers, without --max_tokens= and --max_shards=, and merge again"
            )
        if not _is_of(worker, manifest):
            raise UserError(
                f"{folder / SHARD_MANIFEST} is not the manifest of a worker; delete the folder "
                f"and run `gpt2 prepare --worker={worker}` again"
            )
        manifests[worker] = manifest
        first = manifests[Worker(1, counts[0])]
        for key in sorted((first.keys() | manifest.keys()) - OWN):
            mine: Any = manifest.get(key)
            theirs: Any = first.get(key)
            if key == "files":  # names only: a whole copy may have replaced a damaged file
                mine, theirs = list(mine), list(theirs)
            if mine != theirs:
                raise UserError(
                    f"{folder} was made with another {key} than {Worker(1, counts[0])}; "
                    "delete it and run that worker again"
                )
    return manifests


def _is_of(worker: Worker, manifest: dict) -> bool:
    """Whether a manifest has all that a merge needs of a worker's."""
    files, cuts = manifest.get("files"), manifest.get("cuts")
    return (
        isinstance(manifest.get("prefix"), str)
        and isinstance(files, dict)
        and isinstance(cuts, list)
        and len(cuts) == worker.count + 1
        and all(type(number) is int for number in [*cuts, *(manifest.get(t, 0) for t in TOTALS)])
    )


def _plan(out_dir: Path, manifests: dict[Worker, dict]) -> list[tuple[Path, Path, dict]]:
    """(current path, merged path, new manifest entry) of every shard.

    Raises:
        UserError: two shards would get one name.
    """
    moves: list[tuple[Path, Path, dict]] = []
    taken: set[Path] = set()
    trained = 0  # shard 0 is for validation
    for worker, manifest in manifests.items():
        for entry in manifest["shards"]:
            trained += entry["split"] == "train"
            name = f"{manifest['prefix']}_{entry['split']}_{trained:06d}.bin"
            assert SHARD_NAME.fullmatch(name), name  # `read_manifest` checks prefix and split
            new = entry | {"name": name, "next": None, "worker": str(worker)}
            source, target = below(worker.folder(out_dir), entry["name"]), below(out_dir, name)
            if target in taken:
                raise UserError(
                    f"{source.parent} lists a second shard for validation, {source.name}; delete "
                    f"the folder and run `gpt2 prepare --worker={worker}` again"
                )
            taken.add(target)
            moves.append((source, target, new))
    return moves


def _check(out_dir: Path, moves: list[tuple[Path, Path, dict]]) -> None:
    """Raises UserError for a shard that is damaged or in the way. Called before any move."""
    for source, target, entry in moves:
        if target.is_symlink() or (target.exists() and not target.is_file()):
            raise UserError(f"{target} is no shard; move it away and merge again")
        if not source.exists() and not target.exists():
            raise UserError(
                f"{source} is missing; run `gpt2 prepare --worker={entry['worker']}` again"
            )
        if open_shard(source if source.exists() else target).tokens != entry["tokens"]:
            raise UserError(
                f"{source} is not the shard of its {SHARD_MANIFEST}; delete it and run "
                f"`gpt2 prepare --worker={entry['worker']}` again"
            )
    targets = {target: entry for source, target, entry in moves}
    both = {target for source, target, _ in moves if source.exists() and target.exists()}
    for path in shard_paths(out_dir):
        if path not in targets or (path in both and sha256_of(path) != targets[path]["sha256"]):
            raise UserError(f"{path} belongs to no worker; move it away and merge again")
