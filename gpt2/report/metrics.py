"""metrics.jsonl, the log of a run; its numbers also go to services (`trackers.py`)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_atomically
from ..paths import no_follow
from ..untrusted.parsing import load_json, to_json
from . import console
from .trackers import Sink, check_names, open_sink

METRICS = "metrics.jsonl"
HISTORY = "history.jsonl"  # a line for each start of the run: what changed, and on what data
MAX_STEP = 10**12  # of a line that is read


class RunLog:
    """Appends what is measured to metrics.jsonl and forwards it to the sinks.

    Made by `open_run`. With path None (ranks other than the first) every method does nothing.
    """

    def __init__(self, path: Path | None = None, before_each: Callable[[], object] | None = None):
        self._path, self._before_each = path, before_each
        self._began: dict = {}  # the line of history.jsonl
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
        odd = {"nonfinite": bad} if bad else {}
        self._append(self._path, {"step": int(step), **finite, **odd})
        history = self._path.with_name(HISTORY)
        if self._began and not history.exists():  # the folder is another one
            self._append(history, self._began)
        numbers = {n: v for n, v in finite.items() if isinstance(v, int | float)}
        for name in list(self._sinks):
            self._guard(name, self._sinks[name].log, int(step), numbers)

    def started(self, step: int, **facts: Any) -> None:
        """Writes a line of history.jsonl: the run begins, or goes on, at this step."""
        if self._path is not None:
            self._began = {"step": int(step), **facts}
            self._append(self._path.with_name(HISTORY), self._began)

    def recorded(self, step: int) -> dict[str, Any]:
        """The values that metrics.jsonl holds for a step; empty on ranks other than the first."""
        if self._path is None or not self._path.exists():
            return {}
        found: dict[str, Any] = {}
        for row in read_metrics(self._path):
            if row["step"] == step:
                join(found, row)
        return found

    def open_sinks(self, names: list[str], **settings: Any) -> None:
        """Opens services; one that cannot be reached is left out with a warning."""
        for name in names:
            sink = self._guard(name, open_sink, name, **settings)
            if sink is not None:
                self._sinks[name] = sink
                if sink.notice:
                    console.log(sink.notice)

    def attach(self, name: str, sink: Sink) -> None:
        """Forwards values to a sink of the caller, too; on the first rank only."""
        if self._path is not None:
            self._sinks[name] = sink

    def close(self, failed: bool) -> None:
        """Closes the sinks; `failed` marks the run as failed where a service knows that."""
        for name in list(self._sinks):
            self._guard(name, self._sinks[name].close, failed)
        self._sinks.clear()

    def _append(self, path: Path, line: dict) -> None:
        """Opens the file anew each time, so that it comes back when it was deleted or moved."""
        data = to_json(line, allow_nan=False) + b"\n"
        if self._before_each:
            self._before_each()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", opener=no_follow) as file:
                file.write(data)
        except OSError as problem:  # a full disk costs a line of the log, not the run
            if not self._warned:
                console.warn(f"{path}: {problem.strerror or problem}; this part of the log is lost")
            self._warned = True

    def _guard(self, name: str, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls a sink; when it fails, training goes on without it."""
        try:
            return call(*args, **kwargs)
        except Exception as problem:  # noqa: BLE001 - other people's services raise anything
            self._sinks.pop(name, None)
            reason = f"{type(problem).__name__}: {problem}"
            console.warn(f"--log_to={name} failed and is left out from here on ({reason})")
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
    before_each: Callable[[], object] | None = None,
) -> Iterator[RunLog]:
    """The log of one run, closed at the end of the `with` block.

    Args:
        out_dir: Folder of metrics.jsonl; made if it is missing.
        config: Flat settings, shown by the services.
        sinks: Comma-separated names out of `trackers.SINKS`; may be empty.
        run_name: Name in those services; empty means the name of out_dir.
        resume_step: Step to go on from: lines of later steps are dropped, since they will be
            written again. None starts a new log.
        is_main: False on all ranks but one; they write nothing.
        before_each: Called before each line of a file is written.

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
    log = RunLog(path, before_each)
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
            row = load_json(line, path, dict)
        except UserError:  # not JSON in UTF-8
            continue
        if type(row.get("step")) is int and 0 <= row["step"] < MAX_STEP:
            rows.append(row)
    return rows


def measured(row: dict, name: str) -> float | None:
    """The number of this name in a line; NaN where it was NaN or infinite, None where it lacks."""
    if name in _nonfinite(row):
        return math.nan
    value: Any = row.get(name)
    return value if type(value) in (int, float) and math.isfinite(value) else None


def join(found: dict[str, Any], row: dict[str, Any]) -> None:
    """Adds a line to the values of earlier lines of its step, whose values it replaces."""
    odd = [name for name in _nonfinite(found) if name not in row] + _nonfinite(row)
    found.update(row)
    for name in ("nonfinite", *odd):
        found.pop(name, None)
    found.update({"nonfinite": odd} if odd else {})


def _nonfinite(row: dict) -> list[str]:
    """Names of the values of a line that were NaN or infinite."""
    names = row.get("nonfinite")
    return [n for n in names if isinstance(n, str)] if isinstance(names, list) else []


def _drop_after(path: Path, step: int) -> None:
    """Leaves out the lines of later steps; raises UserError where that is impossible."""
    if not path.exists():
        return
    try:
        kept = [to_json(row) + b"\n" for row in read_metrics(path) if row["step"] <= step]
        write_atomically(path, *kept)
    except OSError as problem:
        raise UserError(f"{path}: {problem.strerror or problem}; the log stays as it was") from None


def _plain(value: Any) -> Any:
    """A Python number for a scalar of NumPy or PyTorch; anything else as it is."""
    return value.item() if hasattr(value, "item") else value
