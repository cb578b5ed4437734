"""A fork ends, speaks and listens as a real process does."""

import os
import signal
import time

import pytest

from . import forks
from .conftest import TORCHRUN, run_python, start_python

pytestmark = pytest.mark.skipif(not forks.AVAILABLE, reason="forks are used on Linux only")
PROGRAMS = {
    "output": "print('ä out'); import sys; print('err', file=sys.stderr)",
    "arguments": "import sys; print(sys.argv, __name__)",
    "input": "print(input()); print(input())",
    "exit code": "raise SystemExit(7)",
    "exit text": "raise SystemExit('no')",
    "exception": "1 / 0",
    "assertion in a thread": "import threading; threading.Thread(target=lambda: 1 / 0).start()",
    "thread that goes on": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()"
    ),
    "atexit": "import atexit; atexit.register(print, 'bye'); 1 / 0",
    "interrupt": "raise KeyboardInterrupt",
    "signal": "import os, signal; print('on', flush=True); os.kill(os.getpid(), signal.SIGTERM)",
    "SIGKILL": "import os; print('lost'); os.kill(os.getpid(), 9)",
    "ignored signals": (
        "import signal; print([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGCHLD)])"
    ),
    "child": "import subprocess; print(subprocess.run(['sh', '-c', 'echo $X; exit 3']))",
    "child of ours": (
        "import subprocess, sys; print(subprocess.run([sys.executable, '-m', 'gpt2', 'trian'],"
        "stderr=subprocess.PIPE, text=True).stderr)"
    ),
    "child that is killed": (
        "import subprocess, sys; print(subprocess.run([sys.executable, '-c',"
        "'import os; os.kill(os.getpid(), 9)']).returncode)"
    ),
    "environment": "import os; print(sorted(os.environ.items()))",
    "folder": "import os, sys; print(os.getcwd(), sys.path[0] == '')",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fork_is_like_a_process(name, tmp_path):
    found = []
    for real in (True, False):
        done = run_python(
            "-c", PROGRAMS[name], "one", "--two", cwd=tmp_path, input="ö 1\n2\n", real=real,
            check=False, env={"PATH": os.environ["PATH"], "X": "y", "LC_CTYPE": "C.UTF-8"},
        )  # fmt: skip
        last = done.stderr.splitlines()[-1:]  # a traceback of a fork has the server's frames
        found.append((done.returncode, done.stdout, last))
    assert found[0] == found[1]


def test_modules_and_files_are_run_as_main(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys, beside\nif __name__ == '__main__': print(beside.x, sys.argv)"
    )
    (tmp_path / "beside.py").write_text("x = 5")
    for arguments in (["-m", "program", "a"], ["program.py", "b"], [tmp_path / "program.py"]):
        real, fork = (run_python(*arguments, cwd=tmp_path, real=r).stdout for r in (True, False))
        assert real == fork != ""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert run_python("-c", "import beside; print(beside.x)", env=environment).stdout == "5\n"


def test_time_limit_ends_the_program(tmp_path):
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    code += "def wait(): time.sleep(99)\nprint('begun', flush=True); wait()"
    with pytest.raises(TimeoutError, match=r"runs for 2 s\nbegun\n(?s:.*) in wait\n"):
        run_python("-c", code, timeout=2)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_have_the_variables_of_torchrun():
    code = (
        "import os; print(*(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE',"
        "'LOCAL_WORLD_SIZE', 'MASTER_ADDR')), os.environ['MASTER_PORT'].isdecimal(), end=';')"
    )
    done = run_python(*TORCHRUN, "--nproc_per_node=2", "-c", code)
    assert sorted(done.stdout.split(";")[:2]) == [f"{r} {r} 2 2 127.0.0.1 True" for r in "01"]


def test_ranks_end_when_one_fails():
    code = "import os, time; os.environ['RANK'] == '1' and exit(3); time.sleep(99)"
    began = time.monotonic()
    done = run_python(*TORCHRUN, "--nproc_per_node=2", "-c", code, check=False)
    assert done.returncode == 3
    assert time.monotonic() - began < 60


def test_a_rank_that_does_not_heed_sigterm_is_killed(monkeypatch):
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('on', flush=True); time.sleep(3); os.environ['RANK'] == '1' and exit(3);"
        "time.sleep(99)"
    )
    monkeypatch.setattr(forks, "GRACE", 0.5)
    began = time.monotonic()
    done = run_python(*TORCHRUN, "--nproc_per_node=2", "-c", code, check=False)
    assert (done.returncode, done.stdout) == (3, "on\non\n")
    assert time.monotonic() - began < 60


def test_a_running_fork_takes_signals_and_is_read():
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(9))\n"
        "try: print('ready', flush=True); time.sleep(99)\n"
        "finally: print('rest')"
    )
    fork = start_python("-c", code)
    assert fork.stdout.readline() == "ready\n"
    assert fork.poll() is None
    fork.send_signal(signal.SIGTERM)
    assert fork.communicate() == "rest\n"
    assert fork.poll() == fork.returncode == 9
    fork.send_signal(signal.SIGTERM)  # to one that has ended: nothing


STARTER = """
import signal, subprocess, sys, time
command = [sys.executable, "-u", "-m", "benchmarks.waiting", *sys.argv[1:]]
child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), child.stdout.readline(), sep="", end="", flush=True)
child.send_signal(signal.Signals[sys.argv[1]])
print(child.wait(), child.stdout.read())
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 7), ("SIGQUIT", 8), ("SIGKILL", -9)])
def test_a_program_that_a_fork_starts_is_a_fork_too(name, code, tmp_path):
    """It has torch without an import, gets signals, and ends with its stand-in."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/waiting.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: exit(7))\n"
        "signal.signal(signal.SIGQUIT, lambda *_: exit(8))\n"
        "print('torch' in sys.modules)\nprint(os.getpid())\ntime.sleep(99)\n"
    )
    done = run_python("-c", STARTER, name, cwd=tmp_path)
    imported, pid, result = done.stdout.split()
    assert (imported, result) == ("True", str(code))
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_torch_is_there_before_the_program_begins():
    code = "import sys; print(sorted({'torch', 'gpt2.train.loop'} & set(sys.modules)))"
    assert run_python("-c", code).stdout == "['gpt2.train.loop', 'torch']\n"
