"""Workers of pytest-xdist as forks of one process that has collected the tests.

Collecting takes 16 s of a core: the tests import torch, transformers, openai and others. A fork
collects once more, from what is imported, in one second.

    pytest ── fork ──> collector ── fork ──> worker 0, worker 1, …
      └── starts ──> relay 0, relay 1, … ── stdin, stdout, stderr ──> collector

pytest-xdist starts a `python` for each worker and talks to it by its stdin and stdout. Here it
starts a relay, which hands them to the collector and waits for the end of the worker.
"""

import contextlib
import os
import random
import select
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path


def available() -> bool:
    """Whether workers can be forks: a fork cannot use a GPU that its parent has looked at."""
    import torch

    return sys.platform == "linux" and not torch.cuda.device_count()


def are_forks(config, specs):
    """Workers on this machine will be forks; called where pytest-xdist is about to start them."""
    if available():
        collect = config.pluginmanager.get_plugin("session").perform_collect
        command = fork_collector(collect)
        for spec in specs:
            if spec.popen:
                spec.python = command


def fork_collector(collect: Callable[[], object]) -> str:
    """Forks the collector, which calls `collect`; returns the command that starts a worker."""
    folder = tempfile.mkdtemp()
    place = Path(folder) / "socket"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(place))
    listener.listen()
    end, held_by_pytest = os.pipe()  # readable when pytest has ended, in whatever way
    if os.fork() == 0:
        os.close(held_by_pytest)
        with contextlib.suppress(BaseException):  # each worker meets and reports it again
            silently(collect)
        serve(listener, end)
        place.unlink()
        os.rmdir(folder)
        os._exit(0)
    os.close(end)
    listener.close()
    return f'"{sys.executable}" -SE "{__file__}" "{place}"'


def silently(collect: Callable[[], object]):
    """Calls it without stdin, stdout and stderr, which the workers replace."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2):
        os.dup2(nothing, file)
    collect()


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
