"""Signals that ask a run to stop: Ctrl-C, and what schedulers send before they end a job."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # Slurm is often told to send the last


@contextlib.contextmanager
def caught(stop: Callable[[int], None]) -> Iterator[None]:
    """Calls `stop` with the first signal's number; a later, second Ctrl-C ends at once.

    A terminal sends Ctrl-C to the whole process group, and torchrun passes it on once more.
    Therefore a repetition within a second is one request.

    Raises:
        KeyboardInterrupt: from the code inside, at a second Ctrl-C.
    """
    first_time: float | None = None

    def handle(number: int, _frame: Any) -> None:
        nonlocal first_time
        if first_time is None:
            first_time = time.monotonic()
            stop(number)
        elif number == signal.SIGINT and time.monotonic() - first_time > 1:
            raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not the main thread: signals belong to the program that embeds us
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
