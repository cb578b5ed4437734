"""Estimates before a preparation begins: tokens, bytes, minutes, and free space on the disk.

Every figure says "about", because the bytes per token depend on language and compression.
"""

import math
import shutil
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.commands import PrepareConfig
from ..data.shards import HEADER_BYTES, TOKEN_BYTES
from ..errors import UserError
from ..tokenizer import Tokenizer
from .sources import STDLIB, Part, Source, find_source
from .tokenize_rows import Position, encode_rows

# File bytes per GPT-2 token. Parquet: FineWeb-Edu's sample has 28.5 GB for 10 billion tokens.
# Other formats assume English: 4.5 bytes of text per token, divided by the compression ratio.
BYTES_PER_TOKEN = {".parquet": 2.85, ".gz": 1.7, ".xz": 1.4, ".zst": 1.7}
PLAIN_BYTES_PER_TOKEN = 4.5
SAMPLE_SECONDS = 1.5
MOST_SHARDS = 20_000  # the manifest is written anew after each
UNDER_WAY = 40  # batches; earlier ones were encoded in parallel and arrive in one burst


@dataclass(frozen=True)
class Plan:
    """The remaining work: files, tokens and bytes."""

    first_part: int  # index of the file in which the next shard begins
    parts: int  # files to read
    tokens: int
    shards: int
    shard_bytes: int
    download_bytes: int  # of all files to download
    room_bytes: int  # most disk space that downloads take at any moment
    free_bytes: int  # on the disk of the shards

    @property
    def need_bytes(self) -> int:
        """Disk space for shards and downloads."""
        return self.shard_bytes + self.room_bytes


def make_plan(
    config: PrepareConfig, source: Source, out_dir: Path, shards: list[dict], per_token: float = 0.0
) -> Plan:
    """Estimates the remaining work.

    Args:
        config: shard size and limits.
        source: the files to read.
        out_dir: folder of the shards, which need not exist yet.
        shards: manifest entries of the finished shards.
        per_token: measured file bytes per token; 0: typical for the file's format.
    """
    first_part = shards[-1]["next"]["part"] if shards else 0
    most_tokens = (config.shard_limit or math.inf) * config.shard_tokens
    most_tokens -= sum(shard["tokens"] for shard in shards)
    parts, tokens = [], 0.0
    for part in source.parts[first_part:]:
        if tokens >= most_tokens:
            break
        parts.append(part)
        tokens += part.size_bytes / (per_token or _usual(part))
    count = int(min(tokens, most_tokens))
    number = -(-count // config.shard_tokens)
    downloads: list[int] = []
    keep = False
    if source.downloads:
        keep = source.downloads.keep
        downloads = [p.size_bytes for p in parts if not source.downloads.local(p)]
    return Plan(
        first_part=first_part,
        parts=len(parts),
        tokens=count,
        shards=number,
        shard_bytes=count * TOKEN_BYTES + number * HEADER_BYTES,
        download_bytes=sum(downloads),
        room_bytes=sum(downloads if keep else sorted(downloads)[-2:]),  # one in use, one prefetched
        free_bytes=shutil.disk_usage(_existing(out_dir)).free,
    )


def check_room(plan: Plan, out_dir: Path) -> None:
    """Raises UserError when the disk has too little free space."""
    if plan.need_bytes > plan.free_bytes:
        raise UserError(
            f"{out_dir} needs about {_gb(plan.need_bytes)} ({_gb(plan.shard_bytes)} of shards, "
            f"{_gb(plan.room_bytes)} of downloads) and its disk has {_gb(plan.free_bytes)} free; "
            "use another --out_dir=, or stop earlier with --max_tokens="
        )


def check_count(plan: Plan, config: PrepareConfig, finished: int) -> None:
    """Raises UserError for more shards than a manifest can list.

    Args:
        plan: the remaining work.
        config: shard size.
        finished: number of finished shards.
    """
    count = finished + plan.shards
    if count > MOST_SHARDS:
        enough = 10 ** math.ceil(math.log10(config.shard_tokens * count / MOST_SHARDS))
        raise UserError(
            f"--shard_tokens={config.shard_tokens} would make about {count:,} shards, and "
            f"{MOST_SHARDS:,} is the most; use --shard_tokens={enough} or more"
        )


def measure(source: Source, num_workers: int, tokenizer: str | Tokenizer) -> tuple[float, float]:
    """Tokenises for about two seconds.

    The standard library stands in for a source that still has to be downloaded.

    Returns:
        (tokens per second on this machine, file bytes per token or 0 where unknown).
    """
    sample = source
    if source.downloads:
        sample = find_source(STDLIB, Path())
        sample = replace(sample, parts=sample.parts * 50)
    began = time.monotonic()
    first = last = 0.0  # seconds: end of the start-up burst, arrival of the latest batch
    number = before = tokens = read_bytes = 0  # batches; tokens up to `first`; tokens
    with closing(encode_rows(sample, Position(), num_workers, tokenizer)) as stream:
        for batch, ids, _ in stream:
            last = time.monotonic()
            tokens += len(ids)
            read_bytes, number = batch.read_bytes, number + 1
            if number == UNDER_WAY:
                first, before = last, tokens
            elif first and last - first > SAMPLE_SECONDS:
                break
    if first and last - first > SAMPLE_SECONDS / 4:  # leaves out the workers' start-up
        began, counted = first, tokens - before
    else:
        counted = tokens
    speed = max(1.0, counted / max(1e-3, last - began))
    return speed, 0.0 if source.downloads or not tokens else read_bytes / tokens


def forecast(
    config: PrepareConfig,
    source: Source,
    out_dir: Path,
    shards: list[dict],
    tokenizer: str | Tokenizer = "",
) -> str:
    """The text that `--dry_run` prints. Arguments as in `make_plan` and `encode_rows`."""
    speed, per_token = measure(source, config.num_workers, tokenizer or config.tokenizer)
    plan = make_plan(config, source, out_dir, shards, per_token)
    revision = source.revision and f" at {source.revision}"
    download, beside = "nothing", ""
    if plan.download_bytes:
        duration = _time(plan.download_bytes * 8 / 1e8)
        download = f"{_gb(plan.download_bytes)}, {duration} at 100 Mbit/s"
        beside = ", while files are downloaded"
    return (
        f"source       {config.source}{revision}\n"
        f"to read      {plan.parts:,} of {len(source.parts):,} files\n"
        f"to download  {download}\n"
        f"tokens       about {plan.tokens:,}\n"
        f"shards       about {plan.shards:,}, {_gb(plan.shard_bytes)}, in {out_dir}; "
        f"{len(shards)} are finished\n"
        f"disk         about {_gb(plan.need_bytes)} needed at once, {_gb(plan.free_bytes)} free\n"
        f"time         about {_time(plan.tokens / speed)} to tokenise, at {speed:,.0f} tokens/s "
        f"on this machine{beside}\n"
        "a dry run: nothing was downloaded or written"
    )


def limit_name(config: PrepareConfig) -> str:
    """Name of the option that sets the limit of shards."""
    return "max_shards" if config.shard_limit == config.max_shards else "max_tokens"


def limit_text(config: PrepareConfig) -> str:
    """The limiting option with its value, and its meaning in shards."""
    if limit_name(config) == "max_shards":
        return f"max_shards={config.max_shards}"
    return rounded_text(config)


def rounded_text(config: PrepareConfig) -> str:
    """The value of max_tokens, and the whole shards that it means."""
    return (
        f"max_tokens={config.max_tokens:,}, rounded up to {config.shards_of_tokens} shards of "
        f"{config.shard_tokens:,} (a smaller --shard_tokens= comes closer)"
    )


def _usual(part: Part) -> float:
    """Typical file bytes per token for the format of a part."""
    return BYTES_PER_TOKEN.get(Path(part.name).suffix.lower(), PLAIN_BYTES_PER_TOKEN)


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    """Seconds below a minute and a half, then minutes, then hours: 1 second, 12 minutes."""
    whole = max(1, round(seconds))
    if whole < 90:
        return f"{whole} second{'s' * (whole > 1)}"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"
