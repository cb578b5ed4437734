"""`python …` and `torchrun …` by forks of one process that has imported torch already.

Importing torch takes three seconds of a core; a fork takes milliseconds, and it has everything that
a process has: working directory, environment, exit code, output, signals. Ranks find each other by
the variables that torchrun sets. tests/test_forks.py compares forks with real processes.

A fork is no test of start-up: imports, encodings of the console and `python -X …` need a real
process. One server runs for each pytest process, from the first use to the end of pytest:

    tests ── job, stdin, stdout, stderr ──> server ── fork ──> the program
      ^──────────── pid, exit code ───────────┘

The server kills the program when the connection ends. `sys.executable` of a fork is a command of a
few milliseconds that asks the server for another fork, if it is to run a program of this project.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import json
import math
import os
import random
import runpy
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from pathlib import Path
from types import ModuleType
from typing import TextIO

AVAILABLE = sys.platform == "linux"
PRELOADED = (
    "torch.distributed.fsdp",
    "torch.optim",
    "torch._dynamo",  # optimizers import it at their first step
    "gpt2.api",
    "gpt2.commands.evaluate",
    "gpt2.commands.profile_step",
    "gpt2.model.modern",
    "gpt2.prepare.run",
    "gpt2.report.plot",
    "gpt2.train.loop",
)
# Packages that not every installation has. huggingface_hub itself is left to the forks: it reads
# its environment when it is imported.
PRELOADED_IF_THERE = (
    "awkward",  # in which gigatoken gives its tokens
    "gpt2.serve.server",
    "httpx2",  # by which huggingface_hub asks
)
LARGEST_JOB = 1 << 17  # bytes
GRACE = 30  # seconds from SIGTERM to SIGKILL, as torchrun gives its ranks


def no_fsync(_: int) -> None:
    """In the place of os.fsync, which keeps files in a power cut; a kill takes none away."""


# ---- the server ---------------------------------------------------------------------------------


def main(place: Path):
    """Serves until stdin ends; returns in each fork, to run its program as the main one."""
    sys.path[0] = ""  # not tests/
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(place / "bound"))
    listener.listen()
    (place / "bound").rename(place / "socket")  # what is there can be connected to
    # pyarrow's allocator would start a thread; the environment is the server's own.
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    for name in PRELOADED:
        __import__(name)
    for name in PRELOADED_IF_THERE:
        with contextlib.suppress(ImportError):
            __import__(name)
    make_tokenizers()
    leave_nothing_to_do_at_the_end()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a fork would lose {threads - 1} threads"
    os.fsync = no_fsync
    gc.freeze()  # no collection in a fork looks at, so copies, what the server imported
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # of a terminal: the programs get them, too
    import resource  # Windows lacks it

    # SIGQUIT would leave the memory of a program in a file of gigabytes.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    sys.executable = str(place / "python")
    return serve(listener)


def serve(listener: socket.socket) -> list[str] | None:
    """Forks a program for each that asks, and tells it how the program ended.

    Returns the arguments in each fork, and None when stdin has ended.
    """
    programs: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> (pid, who waits for its end)
    while True:
        waiting = {asking: file for file, (_, asking) in programs.items()}
        ready = select.select([0, listener, *programs, *waiting], [], [])[0]
        if 0 in ready:
            return None
        for file in ready:
            if file is listener:
                asking, _ = listener.accept()
                arguments = begin(asking, programs, listener)
                if arguments is not None:
                    return arguments
            elif file in programs:
                pid, asking = programs.pop(file)
                os.close(file)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with asking, contextlib.suppress(OSError):
                    asking.send(b"%d" % code)
            elif waiting[file] in programs:  # nobody waits any more
                os.kill(programs[waiting[file]][0], signal.SIGKILL)


def make_tokenizers():
    """Those that a program makes at its first text, which takes it up to a second."""
    from gpt2.prepare import fast_tokenizer
    from gpt2.tokenizer import gpt2_tokenizer

    gpt2_tokenizer()
    make, made = fast_tokenizer._gigatoken, []
    with contextlib.suppress(ImportError):  # gigatoken is optional
        made.append(make())

    def lend():  # one belongs to one thread: only the first gets it
        with contextlib.suppress(IndexError):
            return made.pop()
        return make()

    fast_tokenizer._gigatoken = lend


def leave_nothing_to_do_at_the_end():
    """What the imports want to be done at the end of a process is not done by each fork.

    It takes 0.1 s: torch removes its operators one by one, and makes a table of what it compiled.
    """
    for finalizer in getattr(weakref.finalize, "_registry", ()):
        finalizer.atexit = False
    atexit.unregister(getattr(sys.modules["torch._dynamo.utils"], "dump_compile_times", None))


def begin(asking: socket.socket, programs: dict, listener: socket.socket) -> list[str] | None:
    """Forks a program, in which this returns its arguments, and adds it to `programs`."""
    message, streams, *_ = socket.recv_fds(asking, LARGEST_JOB, 3)
    if not message:  # who asked has ended
        asking.close()
        return None
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for file, (_, other) in programs.items():
            os.close(file)
            other.close()
        listener.close()
        asking.close()
        job = json.loads(message)
        become(job, streams)
        return job["arguments"]
    for file in streams:
        os.close(file)
    programs[os.pidfd_open(pid)] = pid, asking
    with contextlib.suppress(OSError):
        asking.send(b"%d" % pid)
    return None


def become(job: dict, streams: list[int]):
    """Takes over streams, environment and folder of the job."""
    for target, file in enumerate(streams):
        os.dup2(file, target)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = job["environment"]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(job["folder"])
    join_network(job["network"])
    tempfile.tempdir = None  # the environment may name another
    random.seed()  # not the numbers of all other forks
    lines = 1 if environment.get("PYTHONUNBUFFERED") else -1
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=lines)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    faulthandler.register(signal.SIGUSR2)  # a test that waits too long sees where its forks stand
    places = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [place for place in places if place]


def join_network(namespace: str):
    """Gives a fork the network of its parent, where that is not the server's (`ip netns exec`)."""
    if not os.path.samefile(namespace, "/proc/self/ns/net"):
        libc = ctypes.CDLL(None, use_errno=True)
        with open(namespace) as file:  # os.setns is of Python 3.12
            assert libc.setns(file.fileno(), 0) == 0, os.strerror(ctypes.get_errno())


def execute(arguments: list[str]):
    """As `python ARGUMENTS`: `-c CODE …`, `-m MODULE …` or `FILE …`."""
    first, *rest = arguments
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(module))
    elif first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def execute_and_exit(arguments: list[str]):
    """Ends as Python does, but frees nothing: that would copy all pages of the server."""
    code: object = 0
    try:
        execute(arguments)
    except SystemExit as error:
        code = error.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:  # noqa: BLE001 - as Python does at its top level
        traceback.print_exc()
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- the tests' side ----------------------------------------------------------------------------


class Server:
    """The process that is forked; begins to start at once, with the environment of the tests.

    Forks of the process that starts it use it, too: all workers of pytest-xdist have one server.
    """

    def __init__(self, package: Path):
        self._owner = os.getpid()
        # Not a TemporaryDirectory: that is also removed by forks of this process that end.
        self._folder = place = Path(tempfile.mkdtemp())
        self.socket, self.python = place / "socket", place / "python"
        self.python.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -SE "{__file__}" relay "{self.socket}" '
            f'"{sys.executable}" "$@"\n'
        )
        self.python.chmod(0o755)
        places = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        command = [sys.executable, __file__, "serve", str(place)]
        self._process = subprocess.Popen(
            command, cwd=package, env=environment, stdin=subprocess.PIPE
        )

    def wait(self):
        """Returns when it listens."""
        deadline = time.monotonic() + 120
        while not self.socket.exists():
            ended = os.getpid() == self._owner and self._process.poll() is not None
            assert not ended, "the server of forks did not start"
            assert time.monotonic() < deadline, "the server of forks has not started in 120 s"
            time.sleep(0.01)

    def close(self):
        """Ends the server; its forks run on."""
        if os.getpid() == self._owner:
            self._process.communicate()
            shutil.rmtree(self._folder)


class Fork:
    """A program that runs, with the names of subprocess.Popen."""

    def __init__(self, server: Path, arguments, folder, environment, streams):
        """`streams` are the numbers of its stdin, stdout and stderr."""
        job = {"arguments": arguments, "folder": str(folder), "environment": environment}
        job["network"] = f"/proc/{os.getpid()}/ns/net"
        message = json.dumps(job).encode()
        assert len(message) < LARGEST_JOB
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(str(server))
        socket.send_fds(self._server, [message], streams)
        self.pid = int(self._server.recv(99))
        self.returncode: int | None = None
        self.stdout: TextIO | None = None  # of `popen`

    def fileno(self) -> int:
        """What `select` finds readable when the program has ended."""
        return self._server.fileno()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self], [], [], 0)[0]:
            self.returncode = int(self._server.recv(99))
            self._server.close()
        return self.returncode

    def send_signal(self, number: int):
        """Sends a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def communicate(self, timeout: float = 280) -> str:
        """What else it says until it ends."""
        assert self.stdout
        with self.stdout:
            rest = self.stdout.read()
        assert wait_for_all([self], time.monotonic() + timeout) is not None
        return rest


_servers: dict[Path, Server] = {}


def start(folder: Path):
    """Starts the server of the package in that folder, and does not wait for it."""
    _servers[folder] = Server(folder)


def server(folder: Path) -> Server:
    """The server of the package in that folder."""
    if folder not in _servers:
        start(folder)
    _servers[folder].wait()
    return _servers[folder]


def close():
    """Ends all servers."""
    while _servers:
        _servers.popitem()[1].close()


def free_port() -> int:
    """A port of this machine that nobody listens at.

    Below those that the system gives to connections: one of them could take the port before rank 0.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = 10_000 + secrets.randbelow(22_000)
            probe.bind(("127.0.0.1", port))
            return port


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """The variables by which torchrun numbers its processes."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def popen(arguments: list[str], *, package: Path, cwd: Path) -> Fork:
    """As subprocess.Popen(["python", *arguments], stdout=PIPE, text=True)."""
    reader, writer = os.pipe()
    with open(os.devnull) as nothing:
        streams = (nothing.fileno(), writer, 2)
        fork = Fork(server(package).socket, arguments, cwd, dict(os.environ), streams)
    os.close(writer)
    fork.stdout = os.fdopen(reader, encoding="utf-8")
    return fork


def run(
    arguments: list[str],
    *,
    package: Path,
    cwd: Path,
    env: dict[str, str] | None = None,
    ranks: int = 0,
    input: str = "",
    timeout: float = 280,
) -> subprocess.CompletedProcess:
    """As subprocess.run(["python", *arguments]) with captured text.

    With `ranks`, as torchrun: so many processes, of which all end when one fails.
    """
    extra = rank_environments(ranks) if ranks else [{}]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as given,
        tempfile.TemporaryFile("a+", encoding="utf-8") as out,
        tempfile.TemporaryFile("a+", encoding="utf-8") as err,
    ):
        given.write(input)
        given.seek(0)
        streams = (given.fileno(), out.fileno(), err.fileno())
        environment = dict(os.environ if env is None else env)
        place = server(package).socket
        started = [Fork(place, arguments, cwd, environment | more, streams) for more in extra]
        try:
            code = wait_for_all(started, time.monotonic() + timeout)
            if code is None:
                for fork in started:
                    fork.send_signal(signal.SIGUSR2)
                time.sleep(1)
        finally:
            for fork in started:
                fork.send_signal(signal.SIGKILL)
            out.seek(0)
            err.seek(0)
            said = out.read(), err.read()
        if code is None:
            raise TimeoutError(f"{arguments} runs for {timeout} s\n{said[0]}\n{said[1]}")
    return subprocess.CompletedProcess(arguments, code, *said)


def wait_for_all(forks: list[Fork], deadline: float = math.inf) -> int | None:
    """The exit code of the first that fails, or 0; None after the deadline.

    When one fails, the others get SIGTERM, and SIGKILL after `GRACE`.
    """
    failed = 0
    patience = math.inf
    while running := [fork for fork in forks if fork.returncode is None]:
        until = min(deadline, patience)
        left = None if until == math.inf else max(0, until - time.monotonic())
        ended = select.select(running, [], [], left)[0]
        if not ended and time.monotonic() >= deadline:
            return None
        if not ended:
            for fork in running:
                fork.send_signal(signal.SIGKILL)
            patience = math.inf
        for fork in ended:
            if fork.poll() and not failed:
                failed = fork.returncode
                patience = time.monotonic() + GRACE
                for other in running:
                    other.send_signal(signal.SIGTERM)
    return failed


# ---- `sys.executable` of a fork -----------------------------------------------------------------


def relay(server: Path, python: str, arguments: list[str]):
    """Runs a program of this project as a fork, and passes signals and the exit code on."""
    environment = dict(os.environ)
    words = list(arguments)
    if words[:1] == ["-u"]:  # as torchrun starts its ranks
        environment["PYTHONUNBUFFERED"] = words.pop(0)
    module = words[1] if words[:1] == ["-m"] else ""
    ours = module.split(".")[0] in ("gpt2", "benchmarks") or module == "torch.distributed.run"
    ours |= words[:1] == ["-c"] and "from gpt2.cli import main" in words[1]
    if not ours and not (words and Path(words[0]).name == "train_gpt2.py"):
        os.execv(python, [python, *arguments])
    fork = Fork(server, words, os.getcwd(), environment, (0, 1, 2))
    passed_on = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
    for number in passed_on:
        signal.signal(number, lambda n, _: fork.send_signal(n))
    code = wait_for_all([fork]) or 0
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    role, where, *more = sys.argv[1:]
    if role == "relay":
        relay(Path(where), more[0], more[1:])
    program = main(Path(where))
    if program is not None:
        execute_and_exit(program)
