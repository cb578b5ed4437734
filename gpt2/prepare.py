"""Text to token shards: parallel, resumable, and the same bytes whatever happens on the way.

Documents become one long stream of tokens, each behind an end-of-text token. A source of at least
two shards is cut into equal pieces, the first of them for validation; a smaller one gives every
20th document to validation. `manifest.json` records after each shard where the next one begins.
"""

import errno
import math
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .config import PrepareConfig, UserError
from .report import say
from .shards import SHARD_NAME, open_shard, read_manifest, write_manifest, write_shard
from .sources import FINEWEB_EDU, Source, find_source, prefix_of
from .tokenizer import END_OF_TEXT, Tokenizer, tokenizer_class
from .workers import Batch, Position, encode_rows

FORMAT = 1  # of the manifest
DOWNLOADS = ".download"
VAL_EVERY = 20  # a small source gives every 20th document, 5 %, to validation
LEAST_TOKENS = 64


@dataclass
class Job:
    """A folder of shards in the making."""

    out_dir: Path
    source: Source
    manifest: dict
    max_shards: int
    num_workers: int
    tokenizer: str

    @property
    def shards(self) -> list[dict]:
        """The manifest's entries of finished shards; an entry's index is the shard's number."""
        return self.manifest["shards"]

    @property
    def enough(self) -> bool:
        """Whether nothing is left to do: the source is used up or max_shards are finished."""
        return self.manifest["complete"] or 0 < self.max_shards <= len(self.shards)

    def save(self, skipped: int):
        """Writes the manifest."""
        self.manifest["skipped_rows"] = skipped
        for total in ("documents", "tokens"):
            self.manifest[total] = sum(shard[total] for shard in self.shards)
        with _writing(self.out_dir):
            write_manifest(self.out_dir, self.manifest)

    def add_shard(self, tokens: np.ndarray, following: Position | None):
        """Writes uint16 tokens as the next shard, and where the one after it begins."""
        number = len(self.shards)
        split = "train" if number else "val"
        name = f"{self.manifest['prefix']}_{split}_{number:06d}.bin"
        documents = int(np.count_nonzero(tokens == END_OF_TEXT))
        with _writing(self.out_dir / name):
            sha256 = write_shard(self.out_dir / name, tokens)
        entry = {"name": name, "split": split, "tokens": len(tokens), "documents": documents}
        self.shards.append(entry | {"sha256": sha256, "next": following and asdict(following)})
        self.save(following.skipped if following else 0)
        # nolock: Ctrl-C between taking and giving back the lock would be another error
        with tqdm.external_write_mode(nolock=True):
            say(f"{name}: {len(tokens):,} tokens, {documents:,} documents")


def run(config: PrepareConfig) -> int:
    """Makes the shards that the settings describe, or the rest of them; returns an exit code.

    Raises:
        UserError: unusable source or folder, damaged file, full disk, no network.
    """
    job = None
    try:
        job = open_job(config)
        if job.enough:
            say("already complete" if job.manifest["complete"] else "max_shards are finished")
        else:
            make_shards(job)
    except KeyboardInterrupt:
        finished = f": {len(job.shards)} shards are finished" if job else ""
        say(f"interrupted{finished}; run the same command to continue")
        return 130
    shutil.rmtree(job.out_dir / DOWNLOADS, ignore_errors=True)
    say(_summary(job))
    return 0


def open_job(config: PrepareConfig) -> Job:
    """Checks source and folder, and finds out what is left to do.

    Raises:
        UserError: unusable source or folder, or the folder holds other shards.
    """
    prefix = prefix_of(config.source)
    default = "fineweb" if config.source == FINEWEB_EDU else f"data/{prefix}"
    out_dir = Path(config.out_dir or default)
    old = read_manifest(out_dir) or {}
    source = find_source(config.source, out_dir / DOWNLOADS, old.get("files"))
    manifest = {
        "format": FORMAT,
        "source": Path(config.source).as_posix(),
        "prefix": prefix,
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
    limits = (config.max_shards, config.num_workers, config.tokenizer)
    job = Job(out_dir, source, old or manifest, *limits)
    _keep_intact(job)
    if not job.enough:
        _make_folder(job)
    return job


def make_shards(job: Job):
    """Reads, encodes and writes until the source is used up or max_shards are finished."""
    cutter = _Cutter(job)
    total_bytes = sum(part.size_bytes for part in job.source.parts)
    limit = job.max_shards * job.manifest["shard_tokens"] or math.inf
    done = job.manifest["tokens"]
    if job.tokenizer == "auto" and tokenizer_class("auto") is Tokenizer:
        say('tokenising with tiktoken; faster with gigatoken: pip install -e ".[fast]"')
    bar = tqdm(unit=" tokens", unit_scale=True, initial=done, disable=None, dynamic_ncols=True)
    rows = encode_rows(job.source, cutter.start, job.num_workers, job.tokenizer)
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
        if not job.shards:
            shards = self._small_shards()
            total = len(shards)
            for tokens in shards[: job.max_shards or None]:
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
        if self._job.shards or len(self._held) == 2:
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


def _make_folder(job: Job):
    try:
        job.out_dir.mkdir(parents=True, exist_ok=True)
        for leftover in job.out_dir.glob(f"{job.manifest['prefix']}_*.bin.tmp"):
            leftover.unlink()
    except OSError as error:
        raise UserError(
            f"--out_dir={job.out_dir}: cannot write there ({error.strerror}); use another folder"
        ) from None
    job.save(job.manifest["skipped_rows"])


def _keep_intact(job: Job):
    """Forgets finished shards from the first missing or damaged one on: they are made again."""
    for number, entry in enumerate(job.shards):
        intact = False
        with suppress(UserError):
            intact = open_shard(job.out_dir / entry["name"]).tokens == entry["tokens"]
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
    """How many of the source's files the finished shards hold text of; None: all."""
    if not manifest["shards"]:
        return 0
    following = manifest["shards"][-1]["next"]
    if manifest["complete"] or following is None:  # None: a small source, which is cut as a whole
        return None
    return following["part"] + (following["row"] > 0 or following["used"] > 0)


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
        note = f"stopped at max_shards={job.max_shards}; a larger one continues\n"
    elif job.shards[-1]["tokens"] < done["shard_tokens"]:
        note = "the last shard is partial by design: it holds what was left\n"
    return (
        f"{done['documents']:,} documents, {done['tokens']:,} tokens, {len(job.shards)} shards "
        f"in {job.out_dir}; {done['skipped_rows']:,} rows without a text were skipped\n"
        f"{note}train on it: python train_gpt2.py --data_dir={job.out_dir}"
    )
