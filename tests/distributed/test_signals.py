"""Ctrl-C while a command imports what it needs."""

import pytest

from ..conftest import run_python

# An import that asks for Ctrl-C and swallows the exception, as imports of packages do.
SIGNALLED = """
import os, signal, sys, time

class Swallowing:
    def find_spec(self, name, path=None, target=None):
        if name == "gpt2.report.plot":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except BaseException:
                print("swallowed")

from gpt2.cli import main
sys.meta_path.insert(0, Swallowing())
{before}
sys.exit(main(["plot", "no_such_run"]))
"""


def test_ctrl_c_in_an_import_ends_the_process_with_one_line():
    done = run_python("-c", SIGNALLED.format(before=""), check=False, real=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_with_other_processes_it_is_an_exception_as_ever():
    before = (
        "import multiprocessing; child = multiprocessing.Process(target=time.sleep, args=(60,))"
    )
    before += "; child.start(); import atexit; atexit.register(child.kill)"
    done = run_python("-c", SIGNALLED.format(before=before), check=False, real=True)
    assert done.stdout == "swallowed\n"
    assert done.returncode == 2, done.stderr  # no such run


@pytest.mark.parametrize("own", [False, True])
def test_elsewhere_and_with_a_handler_of_the_program_nothing_changes(own):
    code = """
import os, signal, sys, time
from gpt2 import cli
def handler(number, frame): print("mine")
if {own}: signal.signal(signal.SIGINT, handler)
before = signal.getsignal(signal.SIGINT)
def work(rest):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    return 0
cli.COMMANDS["plot"] = work
code = cli.main(["plot"])
assert signal.getsignal(signal.SIGINT) is before
sys.exit(code)
"""
    done = run_python("-c", code.format(own=own), check=False, real=True)
    wanted = (0, "mine\n", "") if own else (130, "", "interrupted\n")
    assert (done.returncode, done.stdout, done.stderr) == wanted
