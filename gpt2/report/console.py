"""Lines on the console. `log`, `warn` and `error` are the package's only prints."""

import errno
import math
import os
import select
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from ..untrusted.display import shown

# What a file says that cannot grow: no room, none for this user, the size that `ulimit -f` allows.
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
LONGEST = 2000  # characters of a warning or error, which may quote several names


_muted: list[bool] = []  # an entry for each `muted` block around this point
_when_unread: list[Callable[[], None]] = []  # what an `unread` block is to call
_unread: list[TextIO] = []  # streams whose reader has gone, within such a block
_lost: list[TextIO] = []  # streams of which a full disk has taken lines
_needed: list[bool] = []  # an entry for each `output_needed` block around this point


@contextmanager
def output_needed() -> Iterator[None]:
    """Within it a full disk under the output is an OSError: nobody wants the work without it."""
    _needed.append(True)
    try:
        yield
    finally:
        _needed.pop()


@contextmanager
def muted() -> Iterator[None]:
    """Within the block `log` prints nothing; warnings and errors stay."""
    _muted.append(True)
    try:
        yield
    finally:
        _muted.pop()


@contextmanager
def unread(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block, output that nobody reads any more ends nothing at once.

    That is a pipe whose reader has ended, or a terminal that was closed. Later lines are dropped.

    Args:
        stop: is called when that is noticed, once.

    Raises:
        BrokenPipeError: at the end of the block, if it was noticed.
    """
    _when_unread.append(stop)
    try:
        yield
    finally:
        _when_unread.pop()
        lost = bool(_unread)
        _unread.clear()
    if lost:
        raise BrokenPipeError


def log(text: str) -> None:
    """Print one message to stdout, at once; control characters but line breaks are shown."""
    if not _muted:
        _write(sys.stdout, shown(text, limit=0, keep="\n\t"))


def warn(text: str) -> None:
    """Print one warning to stderr, on one line."""
    _write(sys.stderr, f"warning: {one_line(text)}")


def error(text: str) -> None:
    """Print one error to stderr, on one line."""
    _write(sys.stderr, f"error: {one_line(text)}")


def one_line(text: str) -> str:
    """A message of at most `LONGEST` characters on one line, for the terminal."""
    return shown(" ".join(text.split()), LONGEST)


def status(text: str) -> bool:
    """Shows one line on a terminal, over the last one of `status`; "" takes it away.

    The next message takes its place. Returns False where stderr is no terminal: nothing is shown.
    """
    stream = sys.stderr
    if stream is None or not stream.isatty():
        return False
    with _writing:
        width = shutil.get_terminal_size().columns - 1
        shown_text = shown(text, limit=0)[:width]
        if shown_text or _moving:
            print(f"\r{shown_text}\x1b[K", end="", file=stream, flush=True)
        _moving[:] = [shown_text] if shown_text else []
    return True


_writing = threading.RLock()  # a line of another thread must not cut one in two
_moving: list[str] = []  # the line that `status` shows, if any


def _write(stream: TextIO, text: str) -> None:
    """Print; a character that the console's encoding lacks becomes "?" instead of a crash."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with _writing:
        if stream in _unread:
            return
        try:
            if _moving:
                status("")
            print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
        except OSError as error:
            if error.errno in FULL and not (_needed and stream is sys.stdout):
                _note_lost(stream, error)
                return
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: of a terminal
                raise
            if not _when_unread:
                raise BrokenPipeError from error
            if not _unread:
                _when_unread[-1]()
            _unread.append(stream)


def _note_lost(stream: TextIO, error: OSError) -> None:
    """Work goes on without its log; `finish` tells the command."""
    if stream not in _lost:
        _lost.append(stream)
        if stream is sys.stdout:
            warn(f"the output cannot be written: {error.strerror}; the work goes on without it")


def finish() -> str:
    """Writes out what is left at the end of a command; why, where a full disk has taken some.

    Raises:
        BrokenPipeError: nobody reads the output any more.
    """
    why = os.strerror(errno.ENOSPC) if _lost else ""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream:  # None where the console gave none
                stream.flush()  # Python's own flush, at its end, would print a traceback
        except OSError as error:
            if error.errno not in FULL:
                raise
            why = os.strerror(error.errno or 0)
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # for that flush
    _lost.clear()
    return why


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


def in_words(seconds: float) -> str:
    """The largest unit: 0.4 seconds, 45 seconds, 12 minutes, 5 hours, 33 days, 60 years."""
    units = (("year", 365.25 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60))
    for name, size in units:
        if seconds >= (2 if name != "minute" else 1.5) * size:
            return f"{seconds / size:,.0f} {name}s"
    if seconds >= 9.5:
        return f"{seconds:.0f} seconds"
    return f"{seconds:.2g} seconds"


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


def closed_pipes() -> list[int]:
    """Those of stdout and stderr that are pipes without a reader, as file descriptors."""
    closed = []
    for number in (1, 2):
        poll = select.poll()  # not on Windows, where writing raises another error
        poll.register(number, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            closed.append(number)
    return closed
