"""Workers that are forks do, and report, what the workers of pytest-xdist do."""

import os
import re
import time

import pytest

from . import workers
from .conftest import ROOT, run_python

pytest.importorskip("xdist")
pytestmark = pytest.mark.skipif(not workers.AVAILABLE, reason="forks are used on Linux only")
CONFTEST = """
import os
from tests import workers

forks = os.environ["FORKS"] == "yes"

def pytest_xdist_setupnodes(config, specs):
    collect = config.pluginmanager.get_plugin("session").perform_collect
    if forks:
        workers.are_forks(specs, collect, lambda: open("closed", "w").close())
"""
TESTS = """
import os, time, warnings
import pytest

imported_by = os.getpid()

@pytest.mark.parametrize("i", range(4))
def test_passes(i, tmp_path):
    print("in", imported_by, os.getpid())
    time.sleep(0.3)  # so that both workers get some
    assert os.path.basename(os.path.dirname(tmp_path)).startswith("popen-gw")
    warnings.warn("shown")

def test_fails():
    numbers = [1, 2]
    assert numbers == [1, 3]

def test_kills_its_worker():
    os.kill(os.getpid(), 9)
"""


def run_with_two_workers(folder, forks: str) -> tuple[int, str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_good.py").write_text(TESTS)
    (folder / "test_bad.py").write_text("import nothing_is_called_so")
    done = run_python(
        *["-m", "pytest", "-pxdist.plugin", "-n2", "-rA", "--continue-on-collection-errors"],
        cwd=folder, real=True, check=False,
        env={**os.environ, "FORKS": forks, "PYTHONPATH": str(ROOT),
             "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CI": "1"},  # CI: whole lines, not 80 columns
    )  # fmt: skip
    return done.returncode, done.stdout


def test_reports_are_equal(tmp_path):
    found = []
    for forks in ("yes", "no"):
        folder = tmp_path / forks
        folder.mkdir()
        code, said = run_with_two_workers(folder, forks)
        pids = re.findall(r"^in (\d+) (\d+)$", said, re.MULTILINE)
        assert len(pids) == 4, said
        assert {importer == process for importer, process in pids} == {forks == "no"}
        words = ("PASSED", "FAILED", "ERROR", "E  ", "worker", "UserWarning")
        said = said.replace(forks + "/test_bad.py", "test_bad.py")
        lines = [re.sub(r"gw\d", "gw", line.strip()) for line in said.splitlines()]
        found.append((code, sorted(line for line in lines if line.startswith(words))))
    assert found[0] == found[1]
    deadline = time.monotonic() + 10
    while not (tmp_path / "yes/closed").exists():  # the collector ends soon after pytest
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(found[0][1]) > 10
