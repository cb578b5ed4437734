"""Signals that ask a run to stop: Ctrl-C, what schedulers send, and that of a closed terminal."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # Slurm's; a closed terminal's
SWALLOWED_SECONDS = 2.0  # what may be left of an import and the clean-up after Ctrl-C
_asked: list[int] = []  # the signal that came inside of `caught`, until its end
_last: list[int] = []  # the first signal of the latest `caught`, also after its end
_waiting = threading.local()  # .depth: how often this thread is inside of `interruptible`


class StopNow(KeyboardInterrupt):
    """A signal came where there was nothing to finish; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def ending_imports() -> Iterator[None]:
    """Ctrl-C during an import ends the program, even if the import swallows the KeyboardInterrupt.

    Imports of large packages do so, and the program would go on with half of a module. If the code
    inside is still running `SWALLOWED_SECONDS` later, the process ends with one line and exit code
    130. Elsewhere Ctrl-C raises KeyboardInterrupt as usual.
    """
    prompt = hasattr(sys, "ps1") or "ipykernel" in sys.modules  # a person's session is never ended
    ours = threading.current_thread() is threading.main_thread() and not prompt
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    outside, timers = sys._getframe(), []

    def handle(_number: int, frame: FrameType | None) -> None:
        while frame and frame is not outside:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                timers.append(threading.Timer(SWALLOWED_SECONDS, _end))
                timers[-1].daemon = True
                timers[-1].start()
                break
            frame = frame.f_back
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        if signal.getsignal(signal.SIGINT) is handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end() -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around waiting for a network: the first signal ends it instead of being noted.

    Raises:
        StopNow: from the code inside, in the main thread and inside of `caught`; also if the
            signal came before.
    """
    if _asked and threading.current_thread() is threading.main_thread():
        raise StopNow(_asked[0])
    _waiting.depth = getattr(_waiting, "depth", 0) + 1
    try:
        yield
    finally:
        _waiting.depth -= 1


def last_signal() -> int:
    """The number of the first signal that came inside of the latest `caught`; 0: none."""
    return _last[0] if _last else 0


@contextlib.contextmanager
def caught(
    stop: Callable[[int], None], answer: Callable[[int], None] = lambda number: None
) -> Iterator[None]:
    """Calls `stop` with the first signal's number; a later, second Ctrl-C ends at once.

    A terminal sends Ctrl-C to the whole process group, and torchrun passes it on once more.
    Therefore a repetition within a second is one request.

    Args:
        stop: is called between two instructions of Python, which may take as long as a backward
            pass or a compilation.
        answer: is called with the first signal's number by a thread, at once.

    Raises:
        KeyboardInterrupt: from the code inside, at a second Ctrl-C, or at the first signal inside
            of `interruptible`.
    """
    first_time: float | None = None
    _last.clear()

    def handle(number: int, _frame: Any) -> None:
        nonlocal first_time
        if first_time is None:
            first_time = time.monotonic()
            _asked.append(number)
            _last.append(number)
            stop(number)
            if getattr(_waiting, "depth", 0):
                raise StopNow(number)
        elif number == signal.SIGINT and time.monotonic() - first_time > 1:
            raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up and signal.getsignal(hang_up) is signal.SIG_IGN:  # by nohup
        numbers.remove(hang_up)
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not the main thread: signals belong to the program that embeds us
        yield
        return
    try:
        with _answered(numbers, answer):
            yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _answered(numbers: list[int], answer: Callable[[int], None]) -> Iterator[None]:
    """Calls `answer` in a thread with the first of these signals that comes.

    C code of Python writes the signal's number into a socket, whatever the main thread computes.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while received := ours.recv(16):
                if known := [number for number in received if number in numbers]:
                    answer(known[0])
                    return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    process = os.getpid()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
        if os.getpid() == process:  # a fork has no such thread
            thread.join(timeout=1)
        ours.close()
