"""Workers of pytest-xdist as forks of one process that has collected the tests.

Collecting takes 16 s of a core: the tests import torch, transformers, openai and others. A fork
collects once more, from what is imported, in one second.

    pytest ── fork ──> collector ── fork ──> worker 0, worker 1, …
      └── starts ──> relay 0, relay 1, … ── stdin, stdout, stderr ──> collector

pytest-xdist starts a `python` for each worker and talks to it by its stdin and stdout. Here it
starts a relay, which hands them to the collector and waits for the end of the worker.
"""

import contextlib
import logging
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

AVAILABLE = sys.platform == "linux"


def are_forks(specs, collect: Callable[[], object], close: Callable[[], object]):
    """The workers that `specs` of pytest-xdist place on this machine will be forks.

    Forks the collector, which calls `collect` at first and `close` at last.
    """
    folder = tempfile.mkdtemp()
    place = Path(folder) / "socket"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(place))
    listener.listen()
    end, held_by_pytest = os.pipe()  # `end` is readable when pytest has ended, in whatever way
    if os.fork() == 0:
        os.close(held_by_pytest)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)  # what collecting reports; each worker reports it again
        with contextlib.suppress(BaseException):
            collect()
        follow_stderr()
        serve(listener, end)
        close()
        shutil.rmtree(folder)
        os._exit(0)
    os.close(end)
    listener.close()
    for spec in specs:
        if spec.popen:
            spec.python = f'"{sys.executable}" -SE "{__file__}" "{place}"'


class Stderr:
    """The sys.stderr of the moment."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self):
        sys.stderr.flush()


def follow_stderr():
    """Handlers of logging that keep a file of pytest's capture get the sys.stderr of the moment."""
    from _pytest.capture import EncodedFile

    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if isinstance(vars(handler).get("stream"), EncodedFile):
            handler.setStream(Stderr())


def serve(listener: socket.socket, end: int):
    """Forks a worker for each relay until `end` is readable."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # of a terminal: pytest ends, then the collector
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers are not waited for
    while listener in select.select([listener, end], [], [])[0]:
        relay, _ = listener.accept()
        with warnings.catch_warnings(action="ignore"):  # an allocator has a thread of its own
            pid = os.fork()
        if pid == 0:
            listener.close()
            os.close(end)
            work(relay)
        relay.close()


def work(relay: socket.socket):
    """Becomes the process that pytest-xdist believes it has started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    streams = socket.recv_fds(relay, 1, 3)[1]
    for target, file in enumerate(streams):
        os.dup2(file, target)
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", errors="backslashreplace", buffering=1)
    random.seed()  # not the numbers of the other workers
    source = eval(sys.stdin.readline())  # as the `python -c …` of execnet does
    exec(source, {"__name__": "__main__"})
    os._exit(0)  # frees nothing: that would copy all pages of the collector


def start_worker(place: str):
    """The relay: only the worker has stdin and stdout afterwards, so that its death shows."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as collector:
        collector.connect(place)
        socket.send_fds(collector, [b"."], [0, 1, 2])
        os.close(0)
        os.close(1)
        collector.recv(1)


if __name__ == "__main__":
    start_worker(sys.argv[1])
