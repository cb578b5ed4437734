"""What a run says while nothing is finished: the time of a step before the first one ends, and a
line that moves within long steps and evaluations.

The time is that of a real micro-batch of the first step, so the run computes nothing twice and
draws no random number for it.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from ..report import console

QUIET_SECONDS = 10.0  # no line moves in what takes less
LINE_SECONDS = 60.0  # between two lines where the output is no terminal
STEP_SECONDS = 10.0  # between two steps that are shown
FIRST_LINES = 20  # of steps that are shown whatever the time
CLEAR_SECONDS = 2.0  # a first micro-batch that takes longer is timed well enough

T = TypeVar("T")


class _Now(NamedTuple):
    name: str
    started: float
    done: int
    total: int


class Progress:
    """Times the first micro-batches and shows how far the current step or evaluation is.

    Does nothing outside of `running`, as on ranks other than the first.

    Args:
        clock: seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._now: _Now | None = None
        self._on = False
        self._told: Callable[[float], None] | None = None  # `tell`, until it was called
        self._wait: Callable[[], None] = lambda: None
        self._warm_up = 0  # micro-batches that are still to come before the one that is timed
        self._lines, self._last_line = 0, 0.0  # of steps, on the console
        self._started = 0.0  # of the micro-batch that may be timed

    @contextlib.contextmanager
    def running(
        self, tell: Callable[[float], None], wait: Callable[[], None], warm_up: int
    ) -> Iterator[None]:
        """Around the loop.

        Args:
            tell: gets the seconds of a micro-batch, once.
            wait: returns when the device has computed all that was launched.
            warm_up: micro-batches that compile or search for algorithms and are not timed. 0: the
                first is timed, or the second where there is one and the first was quick, because
                the first also allocates its memory.
        """
        self._told, self._wait, self._warm_up, self._on = tell, wait, warm_up, True
        ended = threading.Event()
        thread = threading.Thread(target=self._show, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._on = False
            ended.set()
            thread.join()
            console.status("")

    def micro_batches(self, batches: list[T], step: int) -> Iterator[T]:
        """The micro-batches of a step; a request for the next says that one is launched."""
        if not self._on:
            yield from batches
            return
        self._begin()
        for done, batch in enumerate(
            self.over(batches, len(batches), f"step {step:,}: micro-batch"), 1
        ):
            yield batch
            self._end(last=done == len(batches))

    def line_due(self) -> bool:
        """Whether a step gets its console line: the first ones, then one in so many seconds."""
        now = self._clock()
        if self._lines >= FIRST_LINES and now - self._last_line < STEP_SECONDS:
            return False
        self._lines, self._last_line = self._lines + 1, now
        return True

    def over(self, items: Iterable[T], total: int, name: str) -> Iterator[T]:
        """The items, while the line says how many of them are done."""
        started = self._clock()
        self._now = _Now(name, started, 0, total)
        try:
            for done, item in enumerate(items, 1):
                yield item
                self._now = _Now(name, started, done, total)
        finally:
            self._now = None

    def _begin(self) -> None:
        if self._told and self._warm_up == 0:
            self._wait()
            self._started = self._clock()

    def _end(self, last: bool) -> None:
        """A micro-batch is launched: the device is waited for until one was timed."""
        if self._told is None:
            return
        self._warm_up -= 1
        if self._warm_up > 0:
            return
        self._wait()
        now = self._clock()
        seconds, self._started = now - self._started, now
        if self._warm_up == 0:  # the one that comes now is timed
            return
        if self._warm_up == -1 and not last and seconds < CLEAR_SECONDS:
            return
        tell, self._told = self._told, None
        tell(seconds)

    def _show(self, ended: threading.Event) -> None:
        """The thread: a line each second on a terminal, each minute elsewhere."""
        last_line = -LINE_SECONDS
        while not ended.wait(1.0):
            now, at = self._now, self._clock()
            if now is None or at - now.started < QUIET_SECONDS:
                continue
            text = describe(now.name, now.done, now.total, at - now.started)
            if console.status(text):
                continue
            if at - max(last_line, now.started - LINE_SECONDS) >= LINE_SECONDS:
                console.log(text)
                last_line = at


def describe(name: str, done: int, total: int, seconds: float) -> str:
    """The line that moves: what is done, for how long it goes on, and how long it may take."""
    left = ""
    if done:
        left = f", about {console.format_seconds(seconds / done * (total - done))} left"
    return f"{name} {min(done + 1, total):,} of {total:,}, {console.format_seconds(seconds)}{left}"
