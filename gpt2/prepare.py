"""Text to token shards: parallel, resumable, and the same bytes whatever happens on the way.

Documents become one long stream of tokens, each behind an end-of-text token. A source of at least
two shards is cut into equal pieces, the first of them for validation; a smaller one gives every
20th document to validation. `manifest.json` records after each shard where the next one begins.
"""

import copy
import errno
import math
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .config import PrepareConfig, UserError
from .lock import locked
from .merge import Worker, folder_for
from .plan import check_room, forecast, limit_name, limit_text, make_plan
from .report import say
from .shards import (
    MANIFEST,
    SHARD_NAME,
    open_shard,
    read_manifest,
    redo,
    write_manifest,
    write_shard,
)
from .sources import Source, default_folder, find_source, normal_name, prefix_of
from .tokenizer import END_OF_TEXT, Tokenizer, tokenizer_class
from .workers import Batch, Position, encode_rows

FORMAT = 1  # of the manifest
DOWNLOADS = "downloads"
VAL_EVERY = 20  # a small source gives every 20th document, 5 %, to validation
LEAST_TOKENS = 64


@dataclass
class Job:
    """A folder of shards in the making."""

    out_dir: Path
    source: Source
    manifest: dict
    found: dict | None  # the manifest in the folder when it was looked at
    config: PrepareConfig
    worker: Worker

    @property
    def validates(self) -> bool:
        """Whether shards for validation are made here: by the first of several machines."""
        return self.worker.number == 1

    @property
    def shards(self) -> list[dict]:
        """The manifest's entries of finished shards, in the order of their numbers."""
        return self.manifest["shards"]

    @property
    def enough(self) -> bool:
        """Whether nothing is left to do: the source is used up or the limit is reached."""
        return self.manifest["complete"] or 0 < self.config.shard_limit <= len(self.shards)

    def save(self, skipped: int):
        """Writes the manifest."""
        self.manifest["skipped_rows"] = skipped
        for total in ("documents", "tokens"):
            self.manifest[total] = sum(shard[total] for shard in self.shards)
        with _writing(self.out_dir / MANIFEST):
            write_manifest(self.out_dir, self.manifest)

    def add_shard(self, tokens: np.ndarray, following: Position | None):
        """Writes uint16 tokens as the next shard, and where the one after it begins."""
        number = len(self.shards) + (not self.validates)  # 0 is for validation
        split = "train" if number else "val"
        name = f"{self.manifest['prefix']}_{split}_{number:06d}.bin"
        documents = int(np.count_nonzero(tokens == END_OF_TEXT))
        with _writing(self.out_dir / name):
            sha256 = write_shard(self.out_dir / name, tokens)
        entry = {"name": name, "split": split, "tokens": len(tokens), "documents": documents}
        self.shards.append(entry | {"sha256": sha256, "next": following and asdict(following)})
        self.save(following.skipped if following else 0)
        _announce(f"{name}: {len(tokens):,} tokens, {documents:,} documents")


def run(config: PrepareConfig) -> int:
    """Makes the shards that the settings describe, or the rest of them; returns an exit code.

    Raises:
        UserError: unusable source or folder, damaged file, full disk, no network.
    """
    job = None
    try:
        job = open_job(config)
        if config.dry_run and not job.enough:
            say(forecast(config, job.source, job.out_dir, job.shards))
            return 0
        if job.enough:
            say(
                "already complete"
                if job.manifest["complete"]
                else f"{limit_name(config)} are finished"
            )
        else:
            with _started(job):
                try:
                    make_shards(job)
                finally:
                    job.source.close()
                if not config.keep_downloads:
                    shutil.rmtree(job.out_dir / DOWNLOADS, ignore_errors=True)
    except KeyboardInterrupt:
        finished = f": {len(job.shards)} shards are finished" if job else ""
        say(f"interrupted{finished}; run the same command to continue")
        return 130
    say(_summary(job))
    return 0


def open_job(config: PrepareConfig) -> Job:
    """Checks source and folder, and finds out what is left to do.

    Raises:
        UserError: unusable source or folder, or the folder holds other shards.
    """
    names = {"source": normal_name(config.source), "prefix": prefix_of(config.source)}
    worker = Worker.parse(config.worker)
    out_dir = folder_for(Path(config.out_dir or default_folder(config.source)), worker)
    found = read_manifest(out_dir)
    old = copy.deepcopy(found or {})
    if old:  # before the Hub is asked
        _check_same(old, names, out_dir)
    source = find_source(config.source, out_dir / DOWNLOADS, old, config.keep_downloads, _announce)
    manifest = {
        "format": FORMAT,
        **names,
        **source.identity(),
        "tokenizer": {key: getattr(Tokenizer, key) for key in ("name", "vocab_size", "sha256")},
        "shard_tokens": config.shard_tokens,
    }
    if old:
        _check_same(old, manifest, out_dir)
        old["files"] = manifest["files"]
    elif any(SHARD_NAME.fullmatch(path.name) for path in out_dir.glob("*.bin")):
        raise UserError(f"{out_dir} holds shards without a manifest.json; use another --out_dir=")
    manifest |= {"documents": 0, "tokens": 0, "skipped_rows": 0, "complete": False, "shards": []}
    if worker.count > 1:
        manifest["worker"] = str(worker)
    source = worker.share(source)  # the manifest names all files, for every worker the same
    job = Job(out_dir, source, old or manifest, found, config, worker)
    _keep_intact(job)
    return job


def make_shards(job: Job):
    """Reads, encodes and writes until the source is used up or the limit is reached."""
    cutter = _Cutter(job)
    total_bytes = sum(part.size_bytes for part in job.source.parts)
    limit = job.config.shard_limit * job.manifest["shard_tokens"] or math.inf
    done = job.manifest["tokens"]
    if job.config.tokenizer == "auto" and tokenizer_class("auto") is Tokenizer:
        say('tokenising with tiktoken; faster with gigatoken: pip install -e ".[fast]"')
    bar = tqdm(unit=" tokens", unit_scale=True, initial=done, disable=None, dynamic_ncols=True)
    rows = encode_rows(
        job.source, cutter.start, job.config.num_workers, job.config.tokenizer
    )
    with bar, closing(rows) as stream:
        for batch, tokens, lengths in stream:
            cutter.add(batch, tokens, lengths)
            done += len(tokens)
            bar.total = max(done, min(limit, done * total_bytes // max(1, batch.read_bytes)))
            bar.update(len(tokens))
            if job.enough:
                return
        cutter.finish()


class _Cutter:
    """Cuts the stream into shards.

    The first shard is held back until there is a second: only then is the source a large one,
    whose first shard is for validation.
    """

    def __init__(self, job: Job):
        self.start = Position(**job.shards[-1]["next"]) if job.shards else Position()
        self._job = job
        self._shard_tokens = job.manifest["shard_tokens"]
        self._pieces: list[np.ndarray] = []  # of the next shard
        self._filled = 0  # tokens in them
        self._held: list[tuple[np.ndarray, Position]] = []
        self._lengths: list[np.ndarray] = []  # of all documents, while the source may be small
        self._used, self._skipped = self.start.used, self.start.skipped

    def add(self, batch: Batch, tokens: np.ndarray, lengths: np.ndarray):
        """Takes the next rows; (tokens, lengths) as in `Encoded`."""
        ends = np.cumsum(lengths)
        cut, self._used = self._used, 0
        if not self._job.shards:
            self._lengths.append(lengths)
        while cut < len(tokens) and not self._job.enough:
            piece = tokens[cut : cut + self._shard_tokens - self._filled]
            self._pieces.append(piece)
            self._filled += len(piece)
            cut += len(piece)
            if self._filled == self._shard_tokens:
                # The row that ends at the cut or goes on behind it: rows without a text that
                # follow belong to the next shard, so that the place depends on no batch.
                row = int(np.searchsorted(ends, cut))
                skipped = self._skipped + int(np.count_nonzero(lengths[:row] == 0))
                part, number = batch.places[row]
                used = cut - int(ends[row] - lengths[row])
                self._close_shard(Position(part, number, used, skipped))
        self._skipped += int(np.count_nonzero(lengths == 0))

    def finish(self):
        """Writes what is left when the source is used up."""
        job, total = self._job, len(self._job.shards)
        if not job.shards and job.validates:
            shards = self._small_shards()
            total = len(shards)
            for tokens in shards[: job.config.shard_limit or None]:
                job.add_shard(tokens, None)
        elif self._filled:
            total += 1
            job.add_shard(self._take(), Position(len(job.source.parts), skipped=self._skipped))
        job.manifest["complete"] = len(job.shards) == total
        job.save(self._skipped)

    def _take(self) -> np.ndarray:
        tokens = np.concatenate(self._pieces)
        self._pieces.clear()
        self._filled = 0
        return tokens

    def _close_shard(self, following: Position):
        self._held.append((self._take(), following))
        if self._job.shards or len(self._held) == 2 or not self._job.validates:
            for tokens, position in self._held:
                self._job.add_shard(tokens, position)
            self._held.clear()
            self._lengths.clear()

    def _small_shards(self) -> list[np.ndarray]:
        """The shards of a source that is smaller than two of them."""
        pieces = [*(tokens for tokens, _ in self._held), *self._pieces]
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.uint16)
        if len(tokens) < LEAST_TOKENS:
            raise UserError(
                f"the source has only {len(tokens)} tokens ({self._skipped:,} rows without a text "
                f"were skipped); give at least {LEAST_TOKENS}"
            )
        lengths = np.concatenate(self._lengths)
        val, train = split_small(tokens, lengths[lengths > 0])
        size = self._shard_tokens
        return [val, *(train[i : i + size] for i in range(0, len(train), size))]


def split_small(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(val, train): every 20th document (of `lengths` tokens), or the last 5 % of fewer ones."""
    if len(lengths) < VAL_EVERY:
        cut = len(tokens) - max(2, len(tokens) // VAL_EVERY)
        return tokens[cut:], tokens[:cut]
    in_val = np.repeat(np.arange(len(lengths)) % VAL_EVERY == VAL_EVERY - 1, lengths)
    return tokens[in_val], tokens[~in_val]


@contextmanager
def _started(job: Job) -> Iterator[None]:
    """Checks that there is room, makes the folder and keeps other processes out of it."""
    plan = make_plan(job.config, job.source, job.out_dir, job.shards)
    check_room(plan, job.out_dir)
    job.source = replace(job.source, needed_parts=plan.first_part + plan.parts)
    with locked(job.out_dir):
        if read_manifest(job.out_dir) != job.found:
            raise UserError(f"another process has just made shards in {job.out_dir}; run it again")
        with _writing(job.out_dir):
            for leftover in job.out_dir.glob(f"{job.manifest['prefix']}_*.bin.tmp"):
                leftover.unlink()
        job.save(job.manifest["skipped_rows"])
        yield


def _keep_intact(job: Job):
    """Forgets finished shards from the first missing or damaged one on: they are made again."""
    for number, entry in enumerate(job.shards):
        intact = False
        with suppress(UserError):
            intact = open_shard(job.out_dir / entry["name"]).tokens == entry["tokens"]
        if not intact and "worker" in entry:
            raise UserError(f"{job.out_dir / entry['name']} is missing or damaged: {redo(entry)}")
        if not intact:
            say(f"{entry['name']} is missing or damaged: making the shards from there again")
            del job.shards[number:]
            job.manifest["complete"] = False
            break
    if job.shards and job.shards[-1]["next"] is None and not job.enough:
        job.shards.clear()  # a small source starts over


def _check_same(old: dict, new: dict, out_dir: Path):
    """Raises UserError when the folder's shards are not the ones that would be made now.

    Files of which no shard holds anything yet may change: a whole copy replaces a damaged one.
    """
    for key, value in new.items():
        before, now = old.get(key), value
        if key == "files" and isinstance(before, dict):
            used = _files_used(old)
            before, now = (dict([*files.items()][:used]) for files in (before, now))
        if before != now:
            differs = f"{key}={before!r}, not {now!r}"
            if key == "files":
                names = sorted(dict(before.items() ^ now.items()))
                differs = f"another {names[0]} (and {len(names) - 1} more changed files)"
            raise UserError(f"{out_dir} holds shards made with {differs}; use another --out_dir=")


def _files_used(manifest: dict) -> int | None:
    """How many of the source's files the finished shards hold text of; None: all.

    Of several workers' files none may change, since their shares follow from the sizes.
    """
    if "worker" in manifest:
        return None
    if not manifest["shards"]:
        return 0
    following = manifest["shards"][-1]["next"]
    if manifest["complete"] or following is None:  # None: a small source, which is cut as a whole
        return None
    return following["part"] + (following["row"] > 0 or following["used"] > 0)


def _announce(text: str):
    """Says something beside the progress bar, from any thread."""
    # nolock: Ctrl-C between taking and giving back the lock would be another error
    with tqdm.external_write_mode(nolock=True):
        say(text)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        path.with_name(path.name + ".tmp").unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"{'disk full' if full else error.strerror} while writing {path}; finished shards are "
            "kept: run the same command again to continue"
        ) from None


def _summary(job: Job) -> str:
    done, note = job.manifest, ""
    if not done["complete"]:
        note = f"stopped at {limit_text(job.config)}; a larger one continues\n"
    elif job.shards and job.shards[-1]["tokens"] < done["shard_tokens"]:
        note = "the last shard is partial by design: it holds what was left\n"
    then = f"train on it: python train_gpt2.py --data_dir={job.out_dir}"
    if "worker" in done:
        then = f"when all workers are done: gpt2 shards merge {job.out_dir.parent}"
    return (
        f"{done['documents']:,} documents, {done['tokens']:,} tokens, {len(job.shards)} shards "
        f"in {job.out_dir}; {done['skipped_rows']:,} rows without a text were skipped\n"
        f"{note}{then}"
    )
