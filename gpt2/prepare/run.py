"""Text to token shards: parallel, resumable, and byte-identical after any interruption.

Documents are concatenated into one stream of tokens, each after an end-of-text token. A source of
at least two shards is cut into shards of equal size, and the first shard is for validation. A
smaller source gives every 20th document to validation. After each shard, `manifest.json` records
the position at which the next shard begins.
"""

import math
from contextlib import closing

import numpy as np
from tqdm import tqdm

from ..config.commands import PrepareConfig
from ..errors import DamagedFile, UserError, install_command
from ..paths import for_shell
from ..report.console import log
from ..tokenizer import END_OF_TEXT_NAME, Tokenizer
from ..untrusted.display import shown
from ..untrusted.long_text import PIECE
from .estimate import forecast, limit_name, limit_text, rounded_text
from .fast_tokenizer import tokenizer_class
from .first_run import command, device_here
from .shard_job import ShardJob, open_job, started
from .tokenize_rows import WHY_UNUSABLE, Position, RowBatch, encode_rows

VAL_EVERY = 20  # in a small source every 20th document (5 %) is for validation
LEAST_TOKENS = 64


def run(config: PrepareConfig) -> int:
    """Makes the shards that the settings describe, or the missing ones; returns an exit code.

    Raises:
        UserError: unusable source or folder, damaged file, full disk, no network.
    """
    job = None
    try:
        job = open_job(config)
        if config.dry_run and not job.enough:
            log(forecast(config, job.source, job.out_dir, job.shards, job.tokenizer))
            return 0
        if job.enough:
            log(
                "already complete"
                if job.manifest["complete"]
                else f"{limit_name(config)} are finished"
            )
        else:
            with started(job):
                try:
                    make_shards(job)
                except DamagedFile as error:
                    job.note_damage(error.name)
                    raise
                finally:
                    job.source.close()
                if job.source.downloads and not config.keep_downloads:
                    job.source.downloads.clear(job.source.parts)
    except KeyboardInterrupt:
        finished = f": {len(job.shards)} shards are finished" if job else ""
        log(f"interrupted{finished}; run the same command to continue")
        return 130
    log(_summary(job))
    return 0


def make_shards(job: ShardJob) -> None:
    """Reads, encodes and writes until the end of the source or the limit of shards."""
    cutter = _Cutter(job)
    total_bytes = sum(part.size_bytes for part in job.source.parts)
    limit = job.config.shard_limit * job.manifest["shard_tokens"] or math.inf
    done = job.manifest["tokens"]
    if job.tokenizer == "auto" and tokenizer_class("auto") is Tokenizer:
        log(f"tokenising with tiktoken; faster with gigatoken: {install_command('fast')}")
    bar = tqdm(unit=" tokens", unit_scale=True, initial=done, disable=None, dynamic_ncols=True)
    rows = encode_rows(job.source, cutter.start, job.config.num_workers, job.tokenizer)
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
    """Cuts the stream of tokens into shards.

    The first shard is held in memory until the second is full. A second shard makes the source a
    large one, whose first shard is for validation.
    """

    def __init__(self, job: ShardJob):
        self.start = Position(**job.shards[-1]["next"]) if job.shards else Position()
        self._job = job
        self._shard_tokens = job.manifest["shard_tokens"]
        self._pieces: list[np.ndarray] = []  # tokens of the next shard
        self._filled = 0  # number of tokens in `_pieces`
        self._held: list[tuple[np.ndarray, Position]] = []
        self._lengths: list[np.ndarray] = []  # tokens per document, while the source may be small
        self._used = self.start.used
        self._odd = np.array(self.start.odd)  # number of rows of each kind in `ODD`

    def add(self, batch: RowBatch, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends the next rows. Arguments as in `Encoded`."""
        ends = np.cumsum(lengths)
        cut, self._used = self._used, 0
        odd = batch.odd()
        if not self._job.shards:
            self._lengths.append(lengths)
        while cut < len(tokens) and not self._job.enough:
            piece = tokens[cut : cut + self._shard_tokens - self._filled]
            self._pieces.append(piece)
            self._filled += len(piece)
            cut += len(piece)
            if self._filled == self._shard_tokens:
                # The row that contains the last token before the cut. Rows without text after it
                # count for the next shard, so that the position does not depend on batches.
                row = int(np.searchsorted(ends, cut))
                counts = (self._odd + odd[:row].sum(0)).tolist()
                part, number = batch.places[row]
                used = cut - int(ends[row] - lengths[row])
                self._close_shard(Position(part, number, used, *counts))
        self._odd += odd.sum(0)

    def finish(self) -> None:
        """Writes the last shard at the end of the source, or all shards of a small source."""
        job, total = self._job, len(self._job.shards)
        if not job.shards and job.validates:
            shards = self._small_shards()
            total = len(shards)
            for tokens in shards[: job.config.max_shards or None]:  # see `ShardJob.enough`
                job.add_shard(tokens, None)
        elif self._filled:
            total += 1
            job.add_shard(self._take(), Position(len(job.source.parts), 0, 0, *self._odd.tolist()))
        job.manifest["complete"] = len(job.shards) == total
        job.save(self._odd.tolist())

    def _take(self) -> np.ndarray:
        tokens = np.concatenate(self._pieces)
        self._pieces.clear()
        self._filled = 0
        return tokens

    def _close_shard(self, following: Position) -> None:
        self._held.append((self._take(), following))
        if self._job.shards or len(self._held) == 2 or not self._job.validates:
            for tokens, position in self._held:
                self._job.add_shard(tokens, position)
            self._held.clear()
            self._lengths.clear()

    def _small_shards(self) -> list[np.ndarray]:
        """All shards of a source with fewer tokens than two full shards.

        Raises:
            UserError: fewer tokens than `LEAST_TOKENS`.
        """
        pieces = [*(tokens for tokens, _ in self._held), *self._pieces]
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.uint16)
        if len(tokens) < LEAST_TOKENS:
            raise UserError(
                f"the source has only {len(tokens)} tokens ({_skipped(*self._odd[[0, 4, 5]])}"
                f"{_left_out(self._odd[3], self._job.config)}); "
                f"give at least {LEAST_TOKENS}"
            )
        lengths = np.concatenate(self._lengths)
        val, train = split_small(tokens, lengths[lengths > 0])
        size = self._shard_tokens
        return [val, *(train[i : i + size] for i in range(0, len(train), size))]


def split_small(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits tokens into (val, train): every 20th document, or the last 5 % of under 20 documents.

    Args:
        tokens: (sum(lengths),) of all documents.
        lengths: tokens of each document.
    """
    if len(lengths) < VAL_EVERY:
        cut = len(tokens) - max(2, len(tokens) // VAL_EVERY)
        return tokens[cut:], tokens[:cut]
    in_val = np.repeat(np.arange(len(lengths)) % VAL_EVERY == VAL_EVERY - 1, lengths)
    return tokens[in_val], tokens[~in_val]


def _summary(job: ShardJob) -> str:
    done, note, odd = job.manifest, "", ""
    if done.get("repaired_rows"):
        odd += f", {done['repaired_rows']:,} with invalid UTF-8 were repaired"
    if done.get("literal_rows"):
        name = END_OF_TEXT_NAME
        if isinstance(job.tokenizer, Tokenizer):
            name = job.tokenizer.end_of_text_name
        odd += f", {done['literal_rows']:,} hold a literal {shown(name)}, which stays text"
    skipped = [done.get(f"{kind}_rows", 0) for kind in ("skipped", "not_json", "no_text")]
    odd += _left_out(done.get("too_long_rows", 0), job.config)
    if not done["complete"]:
        note = f"stopped at {limit_text(job.config)}; a larger one continues\n"
    elif 0 < job.config.max_tokens < done["tokens"]:
        note = f"{rounded_text(job.config)}; the source ended before\n"
    elif job.shards and job.shards[-1]["tokens"] < done["shard_tokens"]:
        note = "the last shard is partial by design: it holds what was left\n"
    then = ""
    if "worker" in done:
        then = f"when all workers are done: gpt2 shards merge {for_shell(job.out_dir.parent)}"
        if not done["complete"]:
            then = "`gpt2 shards merge` needs the whole share: run it again without a limit"
    else:
        device = device_here()
        then = f"train on it ({device}): {command(job.training_tokens, device, job.out_dir)}"
    return (
        f"{done['documents']:,} documents, {done['tokens']:,} tokens, {len(job.shards)} shards "
        f"in {job.out_dir}; {_skipped(*skipped)}{odd}\n"
        f"{note}{then}"
    )


def _skipped(rows: int, not_json: int, no_text: int) -> str:
    """What is said of rows without a text, among them those of a broken or another format."""
    kinds = zip(WHY_UNUSABLE.values(), (not_json, no_text), strict=True)
    among = ", ".join(f"{count:,} of them {why}" for why, count in kinds if count)
    return f"{rows:,} rows without a text were skipped{among and f' ({among})'}"


def _left_out(rows: int, config: PrepareConfig) -> str:
    """What is said of rows that were too long; nothing if there are none."""
    if not rows:
        return ""
    return (
        f", {rows:,} of over {config.max_document_mb} MB (--max_document_mb), or with a word of "
        f"over {PIECE:,} characters, were left out"
    )
