"""Measures how training scales over the GPUs of this machine: `benchmarks.scaling --measure`.

Each row (scaling_rows.py) is `train_gpt2.py`, under torchrun for several GPUs, in processes of its
own on random tokens (Zipf). Rows that need fewer GPUs than there are run side by side. A row's
tokens per second are the median over its steady steps, as its metrics.jsonl has them, so no step
waits to be timed. The row is then ended by SIGQUIT, which torchrun passes on and `gpt2 train` does
not catch, so that it does not save gigabytes. All rows share one cache of compiled code, which is
empty at the beginning.

A row that was measured, or failed, is a line of scaling.jsonl at once.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gpt2.errors import UserError
from gpt2.report.metrics import read_metrics

from .scaling_report import report, share_of_ideal
from .scaling_rows import TRIED, Row, rows
from .throughput import make_data

ROOT = Path(__file__).parent.parent
WARMUP, STEADY = 4, 10  # steps: compilation and recording, then at least so many that count
STEADY_SECONDS = 3.0  # of steps that count, at least
TINY_STEPS = (1, 3, 0.0)  # these three of tiny networks
SECONDS, RESERVE = 480.0, 10.0  # of all, and of that for the table and the plot
LONGEST = 150.0  # seconds of a row
TO_END = 40.0  # seconds after SIGQUIT; torchrun kills its ranks after 30
POLL = 0.1  # seconds
# What ends a row at once, and what says of one that ended why it did; a micro-batch that cannot be
# recorded for want of memory does neither.
RAN_OUT = re.compile(r"error: out of GPU memory")
NO_MEMORY = re.compile(r"^(?!.*going on without).*(out of (GPU )?memory|OutOfMemoryError)", re.M)
ERROR = re.compile(r"(\S+ )?\w*[eE]rror: ")


class Running:
    """A row whose processes run."""

    def __init__(self, row: Row, cards: Sequence[str], work: Path, number: int):
        self.row, self.cards = row, list(cards)
        self.found: list[dict] = []  # its lines of scaling.jsonl
        self._out = work / f"row_{number}"
        self._log = self._out.with_suffix(".log")
        self._ending = 0.0  # when it was told to end
        self._first: float | None = None
        self._began = time.monotonic()
        _, most = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, most))  # SIGQUIT would leave core files
        if signal.getsignal(signal.SIGQUIT) == signal.SIG_IGN:  # behind `&`; rows would inherit it
            signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command(row, work / "data", self._out),
                cwd=ROOT,
                env=environment(row, cards, work),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us alone
            )

    def poll(self, until: float) -> bool:
        """Looks for results, and ends the processes when there are; True when they have ended."""
        ended = self._process.poll() is not None
        if not self.found:
            self.found = self._results(ended, until)
        if self.found and not ended:
            self.end()
        return ended

    def end(self):
        """Tells the processes to end; after a while it kills them."""
        if not self._ending:
            self._ending = time.monotonic()
            self._process.send_signal(signal.SIGQUIT)
        elif time.monotonic() > self._ending + TO_END:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _results(self, ended: bool, until: float) -> list[dict]:
        """The lines of the row; empty while it is not known."""
        now = time.monotonic()
        if self.row.reduces:
            printed = [line for line in self._text().splitlines() if line.startswith("{")]
            if ended and self._process.returncode == 0:
                return [self._line(json.loads(line) | {"result": "measured"}) for line in printed]
        else:
            steps = self._steps()
            if steps and self._first is None:
                self._first = now - self._began
            real = (WARMUP, STEADY, STEADY_SECONDS)
            warmup, least, seconds = TINY_STEPS if self.row.tiny else real
            steady = [step for step in steps if step["step"] > warmup]
            enough = len(steady) >= least
            if enough and steady[-1]["seconds"] - steady[0]["seconds"] >= seconds:
                return [self._line(self._measured(steady))]
        reason = self._why_not(ended, now, until)
        return [self._line({"result": reason})] if reason else []

    def _why_not(self, ended: bool, now: float, until: float) -> str:
        """Why it has no result and will have none; empty: it may have one yet."""
        text = self._text()
        if (NO_MEMORY if ended else RAN_OUT).search(text):
            return "out of memory"
        if ended:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            errors = [line for line in lines if ERROR.match(line)]
            told = errors[:1] or lines[-1:] or ["no output"]
            return f"failed: exit code {self._process.returncode}: {told[0][:200]}"
        if now > until:
            return "out of time"
        return f"failed: not over after {LONGEST:.0f} s" * (now > self._began + LONGEST)

    def _measured(self, steady: list[dict]) -> dict:
        rates = [step["tokens_per_second"] for step in steady]
        return {
            "result": "measured",
            "tokens_per_second": statistics.median(rates),
            "fastest_tokens_per_second": max(rates),
            "steps": len(rates),
            "peak_gib": steady[-1].get("peak_gib"),
            "first_step_seconds": round(self._first or 0.0, 1),
            "recorded": "cannot be recorded" not in self._text(),
            "device": self._device(),
            "torch": torch.__version__,
        }

    def _line(self, values: dict) -> dict:
        return self.row.facts() | {"cards": self.cards} | values

    def _steps(self) -> list[dict]:
        path = self._out / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def _text(self) -> str:
        return self._log.read_text("utf-8", errors="replace")

    def _device(self) -> str:
        found = re.search(r"^device [\w:]+ \((.*?), \d+ GiB\)", self._text(), re.MULTILINE)
        return found[1] if found else "CPU"


def command(row: Row, data: Path, out: Path) -> list[str]:
    """What measures a row."""
    device = f"--device={'cpu' if row.tiny else 'cuda'}"
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={row.gpus}"]
    if row.reduces:
        sizes = ["--bytes=4,65536"] if row.tiny else []
        return [sys.executable, *ranks, "-m", "benchmarks.all_reduce", device, *sizes]
    places = [f"--data_dir={data}", f"--out_dir={out}", device]
    ends = ["--max_steps=10000", "--eval_every=0", "--save_every=0", "--eval_tokens=1024"]
    launched = ranks if row.gpus > 1 else []
    return [sys.executable, *launched, "train_gpt2.py", *row.arguments(), *places, *ends]


def environment(row: Row, cards: Sequence[str], work: Path) -> dict[str, str]:
    """Of the processes of a row."""
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    if not row.tiny:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
        found["TORCHINDUCTOR_CACHE_DIR"] = str(work / "compiled")
    return found


def run_all(plan: Sequence[Row], cards: Sequence[str], work: Path, until: float) -> Iterator[dict]:
    """The lines of all rows as they come; rows begin in their order, as soon as GPUs are free.

    Args:
        plan: the rows.
        cards: names of the GPUs for CUDA_VISIBLE_DEVICES.
        work: a folder for data, logs and runs.
        until: moment of time.monotonic() at which all rows end.
    """
    waiting, free = list(plan), list(cards)
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and (taken := choose(waiting[0], cards, free)):
                row = waiting.pop(0)
                if time.monotonic() + row.seconds > until:
                    yield row.facts() | {"result": "skipped: does not fit in the time left"}
                    continue
                free = [card for card in free if card not in taken]
                running.append(Running(row, taken, work, len(plan) - len(waiting)))
            for each in list(running):
                told = len(each.found)
                if each.poll(until):
                    running.remove(each)
                    free += each.cards
                yield from each.found[told:]
            time.sleep(POLL)
    finally:
        end_all(running)


def choose(row: Row, cards: Sequence[str], free: Sequence[str]) -> list[str]:
    """Free GPUs for a row, in the order of `cards`; none: it must wait."""
    wanted = cards if row.card is None else cards[row.card : row.card + 1]
    found = [card for card in wanted if card in free][: row.gpus]
    return found if len(found) == row.gpus else []


def end_all(running: list[Running]):
    """Ends what runs, and waits for that; a second Ctrl-C does not interrupt this."""
    with handled(signal.SIG_IGN):
        while running:
            for each in running:
                each.end()
            time.sleep(POLL)
            running = [each for each in running if not each.poll(0.0)]


def find_cards(device: str) -> list[str]:
    """Names of the GPUs to use: a power of two of them, at most eight.

    Raises:
        UserError: there is none.
    """
    if device == "cpu":
        return ["0", "1"]
    count = torch.cuda.device_count()
    if not count:
        raise UserError(
            "no CUDA device: --measure needs NVIDIA GPUs; --device=cpu tries it out with tiny "
            "networks"
        )
    used = max(n for n in (1, 2, 4, 8) if n <= count)
    if used < count:
        print(f"{count} GPUs, of which {used} are used: rows have 1, 2, 4 or 8")
    return visible_cards()[:used]


def visible_cards() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]


def chosen(cards: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """The rows to measure.

    Raises:
        UserError: --only names none.
    """
    plan = rows(len(cards), tiny=options.device == "cpu")
    parts = options.only or [""]
    found = [row for row in plan if any(part in row.name for part in parts)]
    if not found:
        names = "; ".join(dict.fromkeys(row.name for row in plan))
        raise UserError(f"--only={options.only[0]}: no row has this in its name; rows: {names}")
    return found


def measure(options: argparse.Namespace) -> int:
    """Measures, writes scaling.jsonl, scaling.md and scaling.png; the exit code.

    Raises:
        UserError: no GPU, no such row, or an --out_dir that has a measurement already.
    """
    began = time.monotonic()
    seconds = SECONDS if options.seconds is None else options.seconds
    if not seconds > 0:
        raise UserError(f"--seconds={seconds:g}: use a number above 0; {SECONDS:g} is the default")
    cards = find_cards(options.device or "cuda")
    plan, out_dir = chosen(cards, options), options.out_dir or Path("out/scaling")
    path = out_dir / "scaling.jsonl"
    if path.exists():
        raise UserError(f"{path} holds another measurement; move it, or use another --out_dir=")
    out_dir.mkdir(parents=True, exist_ok=True)
    until = began + seconds - min(RESERVE, seconds / 10)
    found: list[dict] = []
    stopped = False
    if options.device == "cpu":
        print(f"on this CPU {TRIED}", flush=True)
    work = TemporaryDirectory(ignore_cleanup_errors=True)  # the report matters more than its rest
    with stoppable(), work as folder, open(path, "w", encoding="utf-8") as log:
        try:
            (Path(folder) / "data").mkdir()
            make_data(Path(folder) / "data")
            with contextlib.closing(run_all(plan, cards, Path(folder), until)) as lines:
                for line in lines:
                    found.append(with_share(line, found))
                    log.write(json.dumps(found[-1]) + "\n")
                    log.flush()
                    print(f"{time.monotonic() - began:4.0f} s  {told(found[-1])}", flush=True)
        except KeyboardInterrupt:
            stopped = True
    missing = dict.fromkeys(row.name for row in plan if row.name not in names_of(found))
    found += [{"name": name, "result": "skipped: stopped before"} for name in missing]
    report(found, out_dir)
    failed = any(row["result"].startswith("failed") for row in found)
    return 128 + signal.SIGINT if stopped else int(failed)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGQUIT do what Ctrl-C does, also behind `&`, where a shell ignores some.

    Under nohup SIGHUP stays ignored.
    """
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    with handled(signal.default_int_handler):
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        yield


@contextlib.contextmanager
def handled(handler: Any) -> Iterator[None]:
    """Within, this handles the signals that ask to stop."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, earlier in zip(numbers, before, strict=True):
            signal.signal(number, earlier)


def names_of(found: list[dict]) -> set[str]:
    """Names of rows that have a line."""
    return {line["name"] for line in found}


def with_share(line: dict, earlier: list[dict]) -> dict:
    """The line with its share of the ideal, where that is known yet."""
    share = share_of_ideal(line, earlier)
    return line if share is None else line | {"share_of_ideal": round(share, 4)}


def told(line: dict) -> str:
    """A line for the console."""
    if line["result"] != "measured":
        return f"{line['name']}: {line['result']}"
    if "bytes" in line:
        return (
            f"{line['name']}, {line['bytes']:,} bytes: {1e3 * line['seconds']:.3f} ms, "
            f"{line['bus_bandwidth'] / 1e9:.1f} GB/s"
        )
    share = f", {line['share_of_ideal']:.1%} of ideal" if "share_of_ideal" in line else ""
    return f"{line['name']}: {line['tokens_per_second']:,.0f} tokens/s{share}"
