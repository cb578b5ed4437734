"""A folder of shards in the making: its manifest, the remaining work, and adding a shard."""

import copy
import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..config.commands import PrepareConfig
from ..data.shards import (
    SHARD_MANIFEST,
    open_shard,
    read_manifest,
    redo,
    shard_paths,
    write_manifest,
    write_shard,
)
from ..data.vocabulary import named_in
from ..errors import UserError
from ..files import leftovers, locked
from ..huggingface.own_tokenizer import OwnTokenizer
from ..paths import below, check_unlinked
from ..report.console import log
from ..untrusted.display import shown
from .chosen_tokenizer import (
    check_same_tokenizer,
    chosen_tokenizer,
    copy_tokenizer,
    describe_tokenizer,
)
from .estimate import check_count, check_room, make_plan
from .multi_machine import FILES_SAMPLE, Worker, begun_by_others, folder_for
from .sources import Source, default_folder, find_source, normal_name, prefix_of
from .tokenize_rows import ODD, Position

FORMAT = 1  # version of the manifest
DOWNLOADS = "downloads"


@dataclass
class ShardJob:
    """A folder of shards in the making."""

    out_dir: Path
    source: Source
    manifest: dict
    found: dict | None  # manifest.json as `open_job` read it
    config: PrepareConfig
    worker: Worker
    tokenizer: str | OwnTokenizer  # a library for GPT-2's
    dropped: list[dict] = field(default_factory=list)  # manifest entries of shards to make again

    @property
    def validates(self) -> bool:
        """Whether this worker makes the validation shard: worker 1 does."""
        return self.worker.number == 1

    @property
    def shards(self) -> list[dict]:
        """Manifest entries of the finished shards, by number."""
        return self.manifest["shards"]

    @property
    def enough(self) -> bool:
        """Whether no work remains: at the end of the source, or at the limit of shards."""
        limit = self.config.shard_limit
        if self.shards and self.shards[-1].get("next", 0) is None:  # a source below two full shards
            limit = self.config.max_shards  # max_tokens means two full shards at least
        return self.manifest["complete"] or 0 < limit <= len(self.shards)

    @property
    def training_tokens(self) -> int:
        """Tokens of the training shards so far."""
        return sum(shard["tokens"] for shard in self.shards if shard["split"] == "train")

    def save(self, odd: list[int] | None = None) -> None:
        """Writes the manifest.

        Args:
            odd: number of rows of each kind in `ODD` so far; None: unchanged.
        """
        if odd is not None:
            self.manifest |= {f"{kind}_rows": n for kind, n in zip(ODD, odd, strict=True)}
        for total in ("documents", "tokens"):
            self.manifest[total] = sum(shard[total] for shard in self.shards)
        with _writing(self.out_dir / SHARD_MANIFEST):
            write_manifest(self.out_dir, self.manifest)

    def note_damage(self, name: str) -> None:
        """Records a damaged source file, so that the next run makes its shards again."""
        if name:
            self.manifest["damaged"] = name
            self.save()

    def add_shard(self, tokens: np.ndarray, following: Position | None) -> None:
        """Writes the next shard and its manifest entry.

        Args:
            tokens: uint16.
            following: the position at which the shard after it begins; None: a small source.
        """
        number = len(self.shards) + (not self.validates)  # 0 is for validation
        split = "train" if number else "val"
        name = f"{self.manifest['prefix']}_{split}_{number:06d}.bin"
        documents = int(np.count_nonzero(tokens == named_in(self.manifest).end_of_text))
        path = below(self.out_dir, name)
        with _writing(path):
            sha256 = write_shard(path, tokens)
        entry = {"name": name, "split": split, "tokens": len(tokens), "documents": documents}
        self.shards.append(entry | {"sha256": sha256, "next": following and asdict(following)})
        self.save(following.odd if following else None)
        _announce(f"{name}: {len(tokens):,} tokens, {documents:,} documents")


def open_job(config: PrepareConfig) -> ShardJob:
    """Checks source and folder, and works out which shards are missing.

    Raises:
        UserError: unusable source or folder, or the folder holds other shards.
    """
    names = {"source": normal_name(config.source), "prefix": prefix_of(config.source)}
    tokenizer = chosen_tokenizer(config.tokenizer)
    its = {"tokenizer": describe_tokenizer(tokenizer)}
    worker = Worker.parse(config.worker)
    shared = Path(config.out_dir or default_folder(config.source))
    out_dir = folder_for(shared, worker)
    found = read_manifest(out_dir)
    old = copy.deepcopy(found or {})
    if old:
        _check_whole(old, out_dir)
    dropped = _drop_damaged(old)
    if old:  # a mistake should not need the network to be found
        check_same_tokenizer(old, its, out_dir)
        _check_same(old, names, out_dir)
    known = old or begun_by_others(shared, worker, names["source"])
    downloads = out_dir / DOWNLOADS
    check_unlinked(shared, out_dir, downloads)
    source = find_source(config.source, downloads, known, config.keep_downloads, _announce)
    source = replace(source, document_bytes=config.max_document_mb * 10**6)
    manifest = {
        "format": FORMAT,
        **names,
        **source.identity(),
        **its,
        "shard_tokens": config.shard_tokens,
        "max_document_mb": config.max_document_mb,
    }
    if old:
        old.setdefault("max_document_mb", config.max_document_mb)  # earlier versions had no limit
        _check_same(old, manifest, out_dir)
        old["files"] = manifest["files"]
    elif shard_paths(out_dir):
        raise UserError(f"{out_dir} holds shards without a manifest.json; use another --out_dir=")
    manifest |= {"documents": 0, "tokens": 0} | {f"{kind}_rows": 0 for kind in ODD}
    manifest |= {"complete": False, "shards": []}
    if worker.count > 1 and "workers" not in old:  # `files` lists the files of all workers
        sizes = [part.size_bytes for part in source.parts]
        manifest |= {"worker": str(worker), "cuts": known.get("cuts") or worker.cuts(sizes)}
        source = worker.share(source, manifest["cuts"])
    samples = source.samples()
    if old:
        _check_contents(old, samples, out_dir)
    if samples:
        (old or manifest)[FILES_SAMPLE] = samples
    job = ShardJob(out_dir, source, old or manifest, found, config, worker, tokenizer, dropped)
    _keep_intact(job)
    return job


@contextmanager
def started(job: ShardJob) -> Iterator[None]:
    """Checks the free space, makes the folder and holds its lock."""
    plan = make_plan(job.config, job.source, job.out_dir, job.shards)
    check_room(plan, job.out_dir)
    check_count(plan, job.config, len(job.shards))
    job.source = replace(job.source, needed_parts=plan.first_part + plan.parts)
    with locked(job.out_dir):
        if read_manifest(job.out_dir) != job.found:
            raise UserError(f"another process has just made shards in {job.out_dir}; run it again")
        with _writing(job.out_dir):
            for name in (f"{job.manifest['prefix']}_*.bin", SHARD_MANIFEST):
                for path in leftovers(job.out_dir, name):
                    path.unlink()
            for entry in job.dropped:  # training would read them
                below(job.out_dir, entry["name"]).unlink(missing_ok=True)
            if isinstance(job.tokenizer, OwnTokenizer):
                copy_tokenizer(job.config.tokenizer, job.tokenizer, job.out_dir)
        job.save()
        yield


def _keep_intact(job: ShardJob) -> None:
    """Drops the manifest entries from the first missing or damaged shard on, to make them again.

    Raises:
        UserError: a shard that `gpt2 shards merge` has renamed cannot be made again in its place.
    """
    for number, entry in enumerate(job.shards):
        intact = False
        with suppress(UserError):
            path = below(job.out_dir, entry["name"])
            intact = open_shard(path).tokens == entry["tokens"]
        if not intact and "worker" in entry:
            raise UserError(f"{entry['name']} is missing or damaged: {redo(entry)}")
        if not intact:
            log(f"{entry['name']} is missing or damaged: making the shards from there again")
            job.dropped += job.shards[number:]
            del job.shards[number:]
            job.manifest["complete"] = False
            break
    if job.shards and job.shards[-1]["next"] is None and not job.enough:
        job.shards.clear()  # a small source is split as a whole


def _check_same(old: dict, new: dict, out_dir: Path) -> None:
    """Raises UserError when the settings or source files of the folder's shards have changed.

    A file that no finished shard has text of may change, because a whole copy may replace a damaged
    one. The list of names may not change for workers, whose cuts are positions in it.
    """
    for key, value in new.items():
        before: Any = old.get(key)
        now = value
        if key == "files" and isinstance(before, dict):
            if "cuts" in old and list(before) != list(now):
                raise UserError(
                    f"{out_dir}: the source has other files now; use another --out_dir="
                )
            used, listed = _files_used(old), now
            before, now = (dict([*files.items()][used]) for files in (before, now))
        if before != now:
            differs = f"{key}={shown(repr(before))}, not {shown(repr(now))}"
            if key == "files":
                differs = _other_files(before, now, listed)
            raise UserError(f"{out_dir} holds shards made with {differs}; use another --out_dir=")


def _other_files(before: dict, now: dict, listed: dict) -> str:
    """What is different of the files that shards were made of and those in their place now.

    Args:
        before: their names and sizes.
        now: names and sizes at the same places of the list.
        listed: all names and sizes of today.
    """
    gone = sorted(before.keys() - listed.keys())
    new = sorted(now.keys() - before.keys())
    changed = sorted(n for n, size in before.items() if n in listed and listed[n] != size)
    told = [f"another {shown(n)} (it has another size)" for n in changed]
    told += [f"{shown(n)}, which is gone" for n in gone]
    told = told or [f"another {shown(n)} (it is new)" for n in new]
    return told[0] + (f" and {len(told) - 1} more changed files" if len(told) > 1 else "")


def _check_contents(old: dict, samples: dict[str, str], out_dir: Path) -> None:
    """Raises UserError when a file has other content of equal size, and shards have its text.

    Earlier versions recorded sizes only.
    """
    recorded = old.get(FILES_SAMPLE, {})
    for name in [*old["files"]][_files_used(old)]:
        before, now = recorded.get(name), samples.get(name)
        if before and now and before != now:
            raise UserError(
                f"{out_dir} holds shards made with another {shown(name)}: its size is the same, "
                "its content is not; use another --out_dir="
            )


def _check_whole(manifest: dict, out_dir: Path) -> None:
    """Raises UserError for a manifest that lacks something which `gpt2 prepare` writes."""
    keys = ("complete", "documents", "tokens", "shard_tokens", "files", "skipped_rows")
    # `gpt2 shards merge` names the worker of each entry and keeps no place to go on from.
    entries = [entry for entry in manifest["shards"] if "worker" not in entry]
    whole = all(key in manifest for key in keys) and all("next" in entry for entry in entries)
    if not whole or ("cuts" in manifest and "worker" not in manifest):
        raise UserError(f"{out_dir / SHARD_MANIFEST} is not whole; use another --out_dir=")


def _drop_damaged(manifest: dict) -> list[dict]:
    """Removes and returns the manifest entries of shards with text of the damaged source file.

    All text of that file goes, because damage is often detected after the first wrong row.
    """
    name = manifest.pop("damaged", None)
    if name is None:
        return []
    if name not in manifest["files"]:
        raise UserError(f"the manifest calls {shown(name)} damaged, and does not list it")
    damaged = [*manifest["files"]].index(name) - _share(manifest).start
    shards, kept = manifest["shards"], 0
    while kept < len(shards) and (following := shards[kept]["next"]):
        if (following["part"], following["row"], following["used"]) > (damaged, 0, 0):
            break
        kept += 1
    manifest["shards"], manifest["complete"] = shards[:kept], False
    return shards[kept:]


def _share(manifest: dict) -> slice:
    """The slice of the source's files that the shards of a folder are made of."""
    if "cuts" not in manifest:
        return slice(0, None)
    return Worker.parse(manifest["worker"]).span(manifest["cuts"])


def _files_used(manifest: dict) -> slice:
    """The slice of the source's files that the finished shards have text of."""
    share = _share(manifest)
    first = share.start
    if not manifest["shards"]:
        return slice(first, first)
    following = manifest["shards"][-1]["next"]
    if manifest["complete"] or following is None:  # None: a small source is split as a whole
        return share
    begun = following["row"] > 0 or following["used"] > 0
    return slice(first, first + following["part"] + begun)


def _announce(text: str) -> None:
    """Logs a line above the progress bar. Safe from any thread."""
    # nolock: Ctrl-C between acquiring and releasing tqdm's lock would raise a second error
    with tqdm.external_write_mode(nolock=True):
        log(text)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise UserError(
            f"{'disk full' if full else error.strerror} while writing {path}; finished shards are "
            "kept: run the same command again to continue"
        ) from None
