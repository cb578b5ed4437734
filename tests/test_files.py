"""One process at a time in a folder, with real processes."""

import os
import subprocess
import sys

import pytest

from gpt2.errors import UserError
from gpt2.files import locked

from .conftest import ROOT

HOLD = """
import sys
from pathlib import Path
from gpt2.lock import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "locked\n"
    return process


def test_second_process_is_refused_until_the_first_ends(tmp_path):
    folder = tmp_path / "new" / "folder"
    process = hold(folder)
    with pytest.raises(
        UserError,
        match=rf"another process \(pid {process.pid} on \S+\) is making shards in .*folder; wait",
    ):
        locked(folder).__enter__()
    process.communicate()
    assert list(folder.iterdir()) == []
    with locked(folder):
        assert [p.name for p in folder.iterdir()] == [".lock"]
    assert list(folder.iterdir()) == []


def test_lock_ends_with_a_killed_process(tmp_path):
    process = hold(tmp_path)
    process.kill()
    process.communicate()
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_unusable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--out_dir=.*: cannot write there \(.*\); use another"):
        locked(tmp_path / "file" / "below").__enter__()


def test_where_there_are_no_locks_a_living_process_of_this_machine_is_noticed(
    tmp_path, monkeypatch
):
    """And neither a dead one nor one of another machine, which may be dead."""
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    process = hold(tmp_path)
    try:
        with pytest.raises(UserError, match=rf"pid {process.pid} on"):
            locked(tmp_path).__enter__()
    finally:
        process.kill()
        process.communicate()
    with locked(tmp_path):
        pass
    for text in (f"{os.getppid()} elsewhere", "0 x", "x", "", "9" * 40 + " x"):
        (tmp_path / ".lock").write_text(text)
        with locked(tmp_path):
            pass
