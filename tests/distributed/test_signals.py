"""Ctrl-C while a command imports what it needs."""

import pytest

from ..conftest import run_python

# A program whose command imports a module; the import asks for Ctrl-C, and may swallow it.
PROGRAM = """
import os, signal, sys, time
from gpt2.cli import main

class Import:
    def find_spec(self, name, path=None, target=None):
        if name == "gpt2.report.plot":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                if not {swallows}:
                    raise
                time.sleep(60)

sys.meta_path.insert(0, Import())
if {closed}:
    os.close(2)
try:
    code = main(["plot", "no_such_run"])
finally:
    print("left in order")
sys.exit(code)
"""


@pytest.mark.parametrize("closed", [False, True])
def test_an_import_that_swallows_ctrl_c_does_not_go_on(closed):
    done = run_python("-c", PROGRAM.format(swallows=True, closed=closed), check=False, real=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == ("" if closed else "interrupted\n")


def test_an_import_that_does_not_swallow_it_is_left_in_order():
    """So that files of the command are cleaned up, and a program around it goes on."""
    done = run_python("-c", PROGRAM.format(swallows=False, closed=False), check=False, real=True)
    wanted = (130, "left in order\n", "interrupted\n")
    assert (done.returncode, done.stdout, done.stderr) == wanted


WORK = """
import os, signal, sys, time
from gpt2 import cli
def handler(number, frame): print("mine")
if {own}: signal.signal(signal.SIGINT, handler)
before = signal.getsignal(signal.SIGINT)
def work(rest):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    finally:
        time.sleep({cleans})
    return 0
cli.COMMANDS["plot"] = work
code = cli.main(["plot"])
assert signal.getsignal(signal.SIGINT) is before
sys.exit(code)
"""


@pytest.mark.parametrize(("own", "cleans"), [(False, 3), (True, 0)])
def test_elsewhere_and_with_a_handler_of_the_program_nothing_changes(own, cleans, tmp_path):
    """The program is imported by another, so that an import is on the stack all the time."""
    (tmp_path / "program.py").write_text(WORK.format(own=own, cleans=cleans))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import program"
    done = run_python("-c", code, check=False, real=True)
    wanted = (0, "mine\n", "") if own else (130, "", "interrupted\n")
    assert (done.returncode, done.stdout, done.stderr) == wanted
