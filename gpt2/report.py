"""What a run tells people and services: messages, console lines, metrics.jsonl, throughput.

The functions `say`, `warn` and `error` are the package's only prints. Services such as wandb live
in `sinks.py`; pictures in `plot.py`.
"""

import json
import math
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .config import UserError
from .shards import write_atomically
from .sinks import Sink, check_names, open_sink

METRICS = "metrics.jsonl"


def say(text: str) -> None:
    """Print one message to stdout, at once."""
    _write(sys.stdout, text)


def warn(text: str) -> None:
    """Print one warning to stderr, on one line."""
    _write(sys.stderr, f"warning: {' '.join(text.split())}")


def error(text: str) -> None:
    """Print one error to stderr, on one line."""
    _write(sys.stderr, f"error: {' '.join(text.split())}")


def _write(stream: TextIO, text: str) -> None:
    """Print; a character that the console's encoding lacks becomes "?" instead of a crash."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


class RunLog:
    """Appends what is measured to metrics.jsonl and forwards it to the sinks.

    Made by `open_run`. With path None (ranks other than the first) every method does nothing.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._sinks: dict[str, Sink] = {}
        self._warned = False

    def record(self, step: int, **values: Any) -> None:
        """Writes one line of JSON: the step, then the values in the order given.

        None is left out. JSON has no NaN and no infinity: such a value is left out too and its
        name stands in the line's list "nonfinite".
        """
        if self._path is None:
            return
        plain = {name: _plain(value) for name, value in values.items() if value is not None}
        bad = [n for n, v in plain.items() if isinstance(v, float) and not math.isfinite(v)]
        finite = {name: value for name, value in plain.items() if name not in bad}
        self._append({"step": int(step), **finite, **({"nonfinite": bad} if bad else {})})
        numbers = {n: v for n, v in finite.items() if isinstance(v, int | float)}
        for name in list(self._sinks):
            self._guard(name, self._sinks[name].log, int(step), numbers)

    def recorded(self, step: int) -> dict[str, Any]:
        """What metrics.jsonl already holds for a step; empty on ranks other than the first."""
        if self._path is None or not self._path.exists():
            return {}
        found: dict[str, Any] = {}
        for row in read_metrics(self._path):
            if row["step"] == step:
                found |= row
        return found

    def open_sinks(self, names: list[str], **settings: Any) -> None:
        """Opens services; one that cannot be reached is left out with a warning."""
        for name in names:
            sink = self._guard(name, open_sink, name, **settings)
            if sink is not None:
                self._sinks[name] = sink
                if sink.notice:
                    say(sink.notice)

    def close(self, failed: bool) -> None:
        """Closes the sinks; `failed` marks the run as failed where a service knows that."""
        for name in list(self._sinks):
            self._guard(name, self._sinks[name].close, failed)
        self._sinks.clear()

    def _append(self, line: dict) -> None:
        """Opens the file anew each time, so that it comes back when it was deleted or moved."""
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except OSError as problem:  # a full disk costs a line of the log, not the run
            if not self._warned:
                warn(f"{self._path}: {problem.strerror or problem}; this part of the log is lost")
            self._warned = True

    def _guard(self, name: str, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls a sink; when it fails, training goes on without it."""
        try:
            return call(*args, **kwargs)
        except Exception as problem:  # noqa: BLE001 - other people's services raise anything
            self._sinks.pop(name, None)
            reason = f"{type(problem).__name__}: {problem}"
            warn(f"--log_to={name} failed and is left out from here on ({reason})")
            return None


@contextmanager
def open_run(
    out_dir: Path,
    *,
    config: dict,
    sinks: str,
    run_name: str,
    resume_step: int | None,
    is_main: bool,
) -> Iterator[RunLog]:
    """The log of one run, closed at the end of the `with` block.

    Args:
        out_dir: Folder of metrics.jsonl; made if it is missing.
        config: Flat settings, shown by the services.
        sinks: Comma-separated names out of `sinks.SINKS`; may be empty.
        run_name: Name in those services; empty means the name of out_dir.
        resume_step: Step to go on from: lines of later steps are dropped, since they will be
            written again. None starts a new log.
        is_main: False on all ranks but one; they write nothing.

    Raises:
        UserError: an unknown or uninstalled sink (on every rank), or a metrics.jsonl in the way.
    """
    names = check_names(sinks)
    if not is_main:
        yield RunLog()
        return
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / METRICS
    if resume_step is not None:
        _drop_after(path, resume_step)
    elif path.exists() and path.stat().st_size:
        raise UserError(f"{path} holds another run; move it away or use another --out_dir=")
    run_name = run_name or out_dir.resolve().name
    log = RunLog(path)
    failed = True
    try:
        log.open_sinks(
            names, out_dir=out_dir, config=config, run_name=run_name, resume_step=resume_step
        )
        yield log
        failed = False
    finally:
        log.close(failed)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a half line (after a crash) is skipped."""
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [json.dumps(r, ensure_ascii=False) for r in read_metrics(path) if r["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in kept).encode())


def _plain(value: Any) -> Any:
    """A Python number for a scalar of NumPy or PyTorch; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def console_line(values: dict, *, max_steps: int, seconds_left: float | None) -> str:
    """One line about a training step.

    Args:
        values: What `RunLog.record` gets, and "step". `mfu` is a share from 0 to 1.
        max_steps: Steps of the whole run.
        seconds_left: Estimate of the time to its end; None while there is none.
    """
    step, total = values["step"], f"{max_steps:,}"
    rate, mfu = values.get("tokens_per_second"), values.get("mfu")
    parts = [
        f"step {step:>{len(total)},}/{total} {step / max_steps:6.1%}",
        f"loss {_number(values.get('loss'), '.4f'):>7}",
        f"lr {_number(values.get('lr'), '.2e')}",
        f"norm {_number(values.get('grad_norm'), '.3f'):>6}",
        f"{'n/a' if rate is None else format_count(rate):>5} tok/s",
        f"MFU {_number(mfu, '.1%'):>5}",
        f"{'n/a' if seconds_left is None else format_seconds(seconds_left):>6} left",
    ]
    return " | ".join(parts)


def eval_line(
    step: int, val_loss: float, perplexity: float, bits_per_byte: float | None, tokens: int
) -> str:
    """One line about an evaluation; `tokens` is how many it looked at."""
    parts = [f"step {step:,}", f"val loss {val_loss:.4f}", f"perplexity {perplexity:,.2f}"]
    if bits_per_byte is not None:
        parts.append(f"{bits_per_byte:.4f} bits per byte")
    return " | ".join([*parts, f"over {format_count(tokens)} tokens"])


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def format_count(count: float) -> str:
    """Three digits and a unit: 950, 12.3k, 1.25M, 10.0B."""
    if not math.isfinite(count):
        return str(count)
    for unit in ("", "k", "M", "B"):
        if abs(count) < 999.5 or unit == "B":
            break
        count /= 1000
    digits = 0 if not unit or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:.{digits}f}{unit}"


def format_seconds(seconds: float) -> str:
    """The two largest units: 45s, 4m05s, 1h23m, 3d04h."""
    if not math.isfinite(seconds):
        return str(seconds)
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


class Throughput:
    """Training time and tokens per second; time inside `pause()` does not count.

    Read the loss (or synchronize otherwise) before `lap` and `pause`: an accelerator that still
    works on queued steps would be timed too short.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._laps: deque[float] = deque(maxlen=100)  # seconds per token
        self._tokens = 0
        self._is_first_lap = True
        self.start()

    def start(self, seconds_before: float = 0.0) -> None:
        """Starts the clock; `seconds_before` is the training time before a resume."""
        self._lap_started = self._clock()
        self._seconds_before = seconds_before

    def step(self, tokens: int) -> None:
        """Counts the tokens of one optimizer step."""
        self._tokens += tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around evaluation and saving."""
        started = self._clock()
        try:
            yield
        finally:
            self._lap_started += self._clock() - started

    def lap(self) -> tuple[float, float]:
        """(tokens per second since the last lap, seconds of training so far)."""
        now = self._clock()
        seconds = max(now - self._lap_started, 1e-9)
        self._lap_started, self._seconds_before = now, self._seconds_before + seconds
        tokens, self._tokens = self._tokens, 0
        if tokens:
            if len(self._laps) == 1 and self._is_first_lap:
                self._laps.clear()  # compilation and first allocations tell nothing of the rest
                self._is_first_lap = False
            self._laps.append(seconds / tokens)
        return tokens / seconds, self._seconds_before

    def seconds_left(self, tokens_left: int) -> float | None:
        """Estimate from the median of the last 100 laps; None before the first one."""
        return tokens_left * statistics.median(self._laps) if self._laps else None


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of a GPU as its vendor states it; None when it is not in the table.

    Args:
        device_name: As the driver calls it, such as "NVIDIA H100 80GB HBM3".
        dtype: "bfloat16" and "float16" give the rate of the tensor cores, without sparsity and
            with float32 accumulation. "float32" gives the rate of the ordinary (CUDA) cores;
            TF32 matrix products can exceed it.
    """
    words = re.split(r"[\s-]+", device_name.lower().strip())
    # Every other word ("laptop", "mig", "max") means another chip or a part of one.
    name = " ".join(w for w in words if not _NOT_THE_CHIP.fullmatch(w))
    if name not in _PEAK_TFLOPS or dtype not in ("bfloat16", "float16", "float32"):
        return None
    if dtype == "bfloat16" and name.startswith(_BEFORE_BFLOAT16):
        return None
    half, single = _PEAK_TFLOPS[name]
    return 1e12 * (single if dtype == "float32" else half)


_NOT_THE_CHIP = re.compile(r"nvidia|tesla|geforce|rtx|sxm\d|hbm\d\w?|\d+gb?")
_BEFORE_BFLOAT16 = ("p100", "v100", "t4", "2080")
# fmt: off
_PEAK_TFLOPS = {  # name: (16 bit, float32), from data sheets and architecture white papers
    "p100": (21.2, 10.6), "p100 pcie": (18.7, 9.3),  # no tensor cores
    "v100": (125, 15.7), "v100 pcie": (112, 14),
    "t4": (65, 8.1), "2080 ti": (53.8, 13.4),
    "3060": (25.5, 12.7), "3060 ti": (32.4, 16.2), "3070": (40.6, 20.3),
    "3080": (59.5, 29.8), "3080 ti": (68.2, 34.1), "3090": (71, 35.6), "3090 ti": (80, 40),
    "a10": (125, 31.2), "a10g": (70, 35), "a40": (149.7, 37.4), "a6000": (154.8, 38.7),
    "a100": (312, 19.5), "a100 pcie": (312, 19.5), "a800": (312, 19.5), "a800 pcie": (312, 19.5),
    "4070": (58.3, 29.1), "4070 super": (71, 35.5), "4070 ti": (80.2, 40.1),
    "4080": (97.5, 48.7), "4080 super": (104.4, 52.2), "4090": (165.2, 82.6),
    "l4": (121, 30.3), "l40": (181, 90.5), "l40s": (362, 91.6),
    "h100": (989.4, 66.9), "h100 pcie": (756.5, 51.2), "h100 nvl": (835.5, 60),
    "h800": (989.4, 66.9), "h800 pcie": (756.5, 51.2), "gh200": (989.4, 66.9),
    "h200": (989.4, 66.9), "h200 nvl": (835.5, 60),
    "5070": (61.7, 30.9), "5070 ti": (87.9, 43.9), "5080": (112.6, 56.3), "5090": (209.5, 104.8),
    "b200": (2250, 75),
}
# fmt: on
