"""How fast is `gpt2 prepare`? Tokens per second and memory, beside the usual plain loop.

    python -m benchmarks.prepare                       makes its own text from the standard library
    python -m benchmarks.prepare --source=FOLDER       on your .parquet files with a column `text`

Each contender is a process of its own, the whole command from start to finished shards, on the
same files, in turns, with the same number of workers; the median counts. The plain loop is
what build-nanogpt's fineweb.py does, written anew: a multiprocessing.Pool tokenises documents with
tiktoken, and the main process collects them in a buffer of one shard, which it writes with np.save.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from gpt2.data.shards import HEADER_BYTES
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer

from .arguments import count

ROOT = Path(__file__).parent.parent
FAST, FALLBACK, LOOP = "gpt2 prepare, gigatoken", "gpt2 prepare, tiktoken", "plain loop, tiktoken"
COLOURS = {FAST: "#0072B2", FALLBACK: "#56B4E9", LOOP: "#D55E00"}
ROW_GROUP = 1000  # rows, as in FineWeb-Edu's files


def main():
    """Runs the comparison, or (as its own child process) the plain loop."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", allow_abbrev=False)
    parser.add_argument("--source", type=Path, help="folder of .parquet files; default: made")
    parser.add_argument("--out_dir", type=Path, default=Path("out/benchmark-prepare"))
    parser.add_argument("--label", default="the standard library's sources", help="of the text")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--num_workers", type=count, default=2)
    parser.add_argument("--shard_tokens", type=count, default=10_000_000)
    parser.add_argument("--megabytes", type=count, default=200, help="of text to make")
    parser.add_argument("--plain_loop", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain_loop:
        plain_loop(options.source, options.plain_loop, options.shard_tokens, options.num_workers)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, scratch: Path):
    """Measures all contenders in turns, checks that they agree, and writes the results."""
    source = options.source
    if source is None:
        source = scratch / "source"
        make_text(source, options.megabytes * 1_000_000)
    for path in source.glob("*.parquet"):
        path.read_bytes()  # into the system's cache, for all alike
    rows = []
    for repeat in range(options.repeats):
        for name, command in commands(options, source.resolve(), scratch).items():
            shutil.rmtree(scratch / name, ignore_errors=True)
            measured = measure(command)
            rows.append({"contender": name, "repeat": repeat, **measured})
            rows[-1]["tokens"] = tokens = count_tokens(scratch / name)
            rows[-1]["tokens_per_second"] = round(tokens / measured["seconds"])
            print(json.dumps(rows[-1]), flush=True)
    summary = {
        "text": options.label,
        "num_workers": options.num_workers,
        "shard_tokens": options.shard_tokens,
        "same_shards": same_shards(scratch),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
    }
    options.out_dir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in [summary, *rows]]
    (options.out_dir / "results.jsonl").write_text("".join(lines), encoding="utf-8")
    print(table(rows, summary))
    draw(rows, summary, options.out_dir / "speed.png")


def commands(options: argparse.Namespace, source: Path, scratch: Path) -> dict[str, list[str]]:
    """Contender -> its command line."""
    shared = [f"--shard_tokens={options.shard_tokens}", f"--num_workers={options.num_workers}"]
    shared += [f"--source={source}"]
    prepare = [sys.executable, "-m", "gpt2", "prepare", *shared]
    loop = [sys.executable, "-m", "benchmarks.prepare", *shared]
    return {
        FAST: [*prepare, f"--out_dir={scratch / FAST}", "--tokenizer=gigatoken"],
        FALLBACK: [*prepare, f"--out_dir={scratch / FALLBACK}", "--tokenizer=tiktoken"],
        LOOP: [*loop, f"--plain_loop={scratch / LOOP}"],
    }


def measure(command: list[str]) -> dict:
    """Wall and CPU seconds of a command, and the most memory that its processes had together."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    before, started, peak = os.times(), time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, memory_of(watched))
        time.sleep(0.05)
    seconds, after = time.perf_counter() - started, os.times()
    if process.returncode:
        raise SystemExit(f"{command} ended with exit code {process.returncode}")
    cpu = sum(after[2:4]) - sum(before[2:4])  # of ended children
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 2),
        "peak_bytes": peak,
        "load_before": load,
    }


def memory_of(process: psutil.Process) -> int:
    """Bytes that a process and its children have; pages they share count once where Linux says."""
    total = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            info = each.memory_full_info()
            total += getattr(info, "pss", info.rss)
    except psutil.Error:  # it has just ended
        pass
    return total


# ---- the plain loop


def plain_loop(source: Path, out_dir: Path, shard_tokens: int, num_workers: int):
    """Documents to uint16 arrays by a pool, collected in a buffer, written when it is full."""
    out_dir.mkdir(parents=True)
    buffer, filled, number = np.empty(shard_tokens, dtype=np.uint16), 0, 0
    with multiprocessing.Pool(num_workers) as pool:
        for document in pool.imap(encode, documents(source), chunksize=16):
            tokens = document
            while filled + len(tokens) >= shard_tokens:
                room = shard_tokens - filled
                buffer[filled:] = tokens[:room]
                np.save(out_dir / f"shard_{number:06d}", buffer)
                tokens, filled, number = tokens[room:], 0, number + 1
            buffer[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    if filled:
        np.save(out_dir / f"shard_{number:06d}", buffer[:filled])


def documents(source: Path) -> Iterator[str]:
    """The texts of a folder of .parquet files."""
    for path in sorted(source.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROW_GROUP, columns=["text"]):
                yield from batch.column(0).to_pylist()


def encode(text: str) -> np.ndarray:
    """uint16 tokens of a document behind an end-of-text token."""
    tokens = np.array([END_OF_TEXT, *gpt2_tokenizer().encode(text)])
    assert (tokens >= 0).all()
    assert (tokens < 2**16).all()
    return tokens.astype(np.uint16)


# ---- text, checks, results


def make_text(folder: Path, size: int):
    """Two .parquet files of the standard library's sources, in random order until it is enough."""
    root, rng = Path(sysconfig.get_path("stdlib")), random.Random(1337)
    found = [
        p.read_text("utf-8", "replace")
        for p in sorted(root.rglob("*.py"))
        if "site-packages" not in p.parts and p.stat().st_size < 100_000
    ]
    found = [text for text in found if text]
    folder.mkdir(parents=True)
    for number in range(2):
        texts, room = [], size // 2
        while room > 0:
            texts.append(rng.choice(found))
            room -= len(texts[-1])
        table = pa.table({"text": texts})
        path = folder / f"{number}.parquet"
        pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)


def count_tokens(folder: Path) -> int:
    """Tokens in the shards of either kind."""
    manifest = folder / "manifest.json"
    if manifest.exists():
        return json.loads(manifest.read_text("utf-8"))["tokens"]
    return sum(len(np.load(path, mmap_mode="r")) for path in folder.glob("*.npy"))


def same_shards(scratch: Path) -> bool:
    """Whether both tokenizers made the same bytes, and the plain loop the same tokens."""
    ours = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (scratch / name).iterdir()
        }
        for name in (FAST, FALLBACK)
    ]
    digests = []
    for paths in ((scratch / FAST).glob("*.bin"), (scratch / LOOP).glob("*.npy")):
        digests.append(hashlib.sha256())
        for path in sorted(paths, key=lambda p: p.stem[-6:]):
            skip = HEADER_BYTES if path.suffix == ".bin" else 128  # bytes of header
            digests[-1].update(path.read_bytes()[skip:])
    return ours[0] == ours[1] and digests[0].digest() == digests[1].digest()


def medians(rows: list[dict], key: str) -> dict[str, float]:
    """Contender -> median of a measurement."""
    return {
        name: statistics.median(row[key] for row in rows if row["contender"] == name)
        for name in COLOURS
    }


def table(rows: list[dict], summary: dict) -> str:
    """The medians as text."""
    speed, memory = medians(rows, "tokens_per_second"), medians(rows, "peak_bytes")
    seconds, cpu = medians(rows, "seconds"), medians(rows, "cpu_seconds")
    lines = [
        f"{summary['text']}: {rows[0]['tokens']:,} tokens, {summary['num_workers']} workers, "
        f"{summary['machine']}; same shards: {summary['same_shards']}",
        f"{'':26}{'s':>8}{'CPU s':>8}{'M tokens/s':>12}{'× loop':>8}{'peak MB':>9}",
    ]
    lines += [
        f"{name:26}{seconds[name]:8.1f}{cpu[name]:8.1f}{speed[name] / 1e6:12.1f}"
        f"{speed[name] / speed[LOOP]:8.1f}{memory[name] / 1e6:9.0f}"
        for name in COLOURS
    ]
    return "\n".join(lines)


def draw(rows: list[dict], summary: dict, target: Path):
    """Bars of the medians, with a dot for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=125, layout="constrained")
    figure.suptitle(f"{summary['text']}, parquet to shards, {summary['num_workers']} workers")
    panels = {
        "tokens_per_second": (1e6, "million tokens per second, whole command"),
        "peak_bytes": (1e9, "peak memory of all processes, GB"),
    }
    for axes, (key, (unit, title)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        values = medians(rows, key)
        bars = axes.barh([*values], [v / unit for v in values.values()], color=COLOURS.values())
        axes.bar_label(bars, fmt="%.2g" if unit == 1e9 else "%.1f", label_type="center")
        runs = [(row[key] / unit, row["contender"]) for row in rows]
        axes.plot(*zip(*runs, strict=True), "k.", markersize=4)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].set_yticklabels([])
    figure.savefig(target)


if __name__ == "__main__":
    main()
