"""Atomic writes, and one process at a time in a folder, with real processes."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gpt2 import files
from gpt2.errors import UserError, first_line
from gpt2.files import (
    InUse,
    check_replaceable,
    check_writable_file,
    discard,
    fingerprint,
    leftovers,
    locked,
    replacing_file,
    replacing_folder,
    sha256_of,
    write_atomically,
)

from .conftest import ROOT

HOLD = """
import sys
from pathlib import Path
from pathlib import Path
from gpt2.files import locked

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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_there_are_no_locks_a_living_process_of_this_machine_is_noticed(
    tmp_path, monkeypatch, number
):
    """And neither a dead one nor one of another machine, which may be dead."""
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(number, os.strerror(number))

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


def test_a_folder_is_held_once_in_one_process_too(tmp_path):
    with locked(tmp_path):
        with pytest.raises(UserError, match=rf"pid {os.getpid()} on \S+\) is making shards"):
            locked(tmp_path).__enter__()
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} ")  # still names us


def test_the_lock_follows_a_folder_that_is_moved_or_deleted(tmp_path):
    folder, other = tmp_path / "a", tmp_path / "b"
    with locked(folder) as lock:
        assert lock.held()
        assert not lock.moved()
        folder.rename(other)
        assert lock.moved()
        before = lock._lock  # which the garbage collector is not to release
        with locked(folder):  # by another process
            with pytest.raises(InUse, match="is making shards"):
                lock.renew()
            assert not lock.held()
        lock.renew()
        assert lock.held()
        assert not lock.moved()
        with pytest.raises(InUse), locked(folder):
            pass
        with locked(other):  # is nobody's any more
            assert not before.is_locked
        (folder / ".lock").unlink()
        assert not lock.held()
        assert not lock.moved()
        lock.renew()
        folder.rename(tmp_path / "away")
        (tmp_path / "away").rename(folder)
        assert lock.held()
        folder.rename(other / "c")
        with locked(folder):
            lock.release()
            assert (folder / ".lock").exists()  # which is the other's


OF_ANOTHER_USER = """
import os, sys
from pathlib import Path
from gpt2 import files
from gpt2.errors import UserError
from gpt2.files import locked
import filelock, fcntl

os.setuid(int(sys.argv[2]))
os.umask(0o077)  # no file of theirs is for others
try:
    with locked(Path(sys.argv[1])):
        print("locked", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""


@pytest.mark.skipif(getattr(os, "geteuid", int)() != 0 or os.name == "nt", reason="needs root")
def test_a_file_that_another_users_killed_run_left_locks_nobody_out():
    def started(user):
        command = [sys.executable, "-c", OF_ANOTHER_USER, str(folder), str(user)]
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)
        return process, process.stdout.readline()

    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        folder = Path(made) / "shared"
        folder.mkdir()
        folder.chmod(0o777)
        first, said = started(65533)
        assert said == "locked\n"
        second, said = started(65534)
        assert f"(pid {first.pid} on" in said
        first.kill()
        first.communicate()
        third, said = started(65534)
        assert said == "locked\n"
        third.kill()
        folder.chmod(0o1777)  # as /tmp: nobody else may delete a file
        fourth, said = started(65533)
        assert "/.lock is another user's, and cannot be taken over (Operation not perm" in said
        for process in (second, third, fourth):
            process.communicate()


def test_a_file_that_was_taken_while_it_was_looked_at_stays(tmp_path, monkeypatch):
    fcntl, path = pytest.importorskip("fcntl"), tmp_path / ".lock"
    path.touch()

    def take(*_):
        path.rename(tmp_path / "deleted")
        path.write_text("of the next one")

    monkeypatch.setattr(fcntl, "flock", take)
    files._discard_if_free(path)
    assert path.read_text() == "of the next one"


TURNS = """
import os, sys, time
from pathlib import Path
from gpt2.errors import UserError
from gpt2.files import locked

folder, turns = Path(sys.argv[1]), 0
until = time.monotonic() + 1.5
while time.monotonic() < until:
    try:
        with locked(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "inside")
            turns += 1
    except UserError as error:
        assert "is making shards" in str(error), error
print(turns)
"""


def test_processes_that_hurry_are_never_inside_together(tmp_path):
    """The file is deleted after each turn: a lock of a deleted file must not count."""
    command = [sys.executable, "-c", TURNS, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    four = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(4)]
    turns = [int(process.communicate()[0]) for process in four]
    assert [process.returncode for process in four] == [0] * 4
    assert sum(turns) > 20
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"old ", b"text")
    with pytest.raises(KeyboardInterrupt), replacing_file(path) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"old text"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    final = tmp_path / "new" / "folder"
    for text in ("one", "two"):
        with replacing_folder(final) as temporary:
            (temporary / text).write_text(text)
    with pytest.raises(OSError, match="full"), replacing_folder(final) as temporary:  # noqa: PT012
        (temporary / "three").write_text("half")
        raise OSError("full")
    assert [p.name for p in final.iterdir()] == ["two"]
    assert [p.name for p in final.parent.iterdir()] == ["folder"]


def test_temporary_names_of_others_stay(tmp_path):
    """Earlier versions opened, emptied and deleted whatever had the name."""
    for name in ("a.json.tmp", "folder.tmp", "folder.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for _ in range(2):
        write_atomically(tmp_path / "a.json", b"text")
        with replacing_folder(tmp_path / "folder") as temporary:
            (temporary / "one").write_text("one")
    assert [p.read_text() for p in sorted(tmp_path.rglob("mine"))] == ["mine"] * 3
    assert len(list(tmp_path.iterdir())) == 5


def test_results_may_be_read_by_those_that_may_read_other_files(tmp_path):
    """Unlike files and folders of tempfile, which belong to their owner alone."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    write_atomically(tmp_path / "new", b"x")
    with replacing_folder(tmp_path / "new_folder"):
        pass
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert (modes["new"], modes["new_folder"]) == (modes["file"], modes["folder"])


def test_leftovers_are_those_of_one_result(tmp_path):
    ours = ["a.json.tmp", "a.json.0123abcd.tmp"]
    for name in (
        *ours,
        "a.json",
        "b.json.tmp",
        "a.json.mine.tmp",
        "a.json.0123abcd",
        "xa.json.tmp",
    ):
        (tmp_path / name).write_text("x")
    assert sorted(path.name for path in leftovers(tmp_path, "a.json")) == sorted(ours)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_of_a_link_only_the_link_is_deleted_or_replaced(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target/mine").write_text("mine")
    for name in ("old", "folder", "a.json", "nowhere"):
        (tmp_path / name).symlink_to(tmp_path / ("target/mine" if name == "a.json" else "target"))
    (tmp_path / "nowhere").unlink()
    (tmp_path / "nowhere").symlink_to(tmp_path / "new")
    discard(tmp_path / "old")
    with replacing_folder(tmp_path / "folder"):
        pass
    write_atomically(tmp_path / "a.json", b"text")
    write_atomically(tmp_path / "nowhere", b"text")
    assert (tmp_path / "target/mine").read_text() == "mine"
    assert not (tmp_path / "new").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"target", "folder", "a.json", "nowhere"}
    assert not any(path.is_symlink() for path in tmp_path.iterdir())


def test_only_earlier_results_are_replaced(tmp_path):
    path = tmp_path / "result.json"
    check_replaceable(path, b"{", "result")
    for content in (b"", b"{", b'{"a": 1}'):
        path.write_bytes(content)
        check_replaceable(path, b"{", "result")
    for content in (b"x", b" {", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"result\.json is there and no result; move it away"):
            check_replaceable(path, b"{", "result")
    with pytest.raises(UserError, match="is there and no result"):
        check_replaceable(tmp_path, b"{", "result")
    if hasattr(os, "mkfifo"):  # nobody writes into it: reading it would wait for ever
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UserError, match="is there and no result"):
            check_replaceable(tmp_path / "pipe", b"{", "result")


def test_a_place_that_takes_no_file_is_found_before_the_work(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")
    check_writable_file(path)
    check_writable_file(tmp_path / "new.json")
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "old"
    with pytest.raises(
        UserError, match=r"^--out=.*x: cannot write there \(.+\); name another file"
    ):
        check_writable_file(tmp_path / "nowhere" / "x", "--out=")
    with pytest.raises(UserError, match="cannot write there \\(it is a folder"):
        check_writable_file(tmp_path)

    def refuse(path):  # as in a folder of somebody else
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(UserError, match=r"result\.json: Permission denied"):
        check_replaceable(path, b"{", "result")


def test_sha256_and_the_first_line_of_an_error(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc").startswith("ba7816bf")
    assert fingerprint(tmp_path / "abc") == [3, sha256_of(tmp_path / "abc")]
    assert first_line(OSError("\n one\n two")) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError(), "damaged") == "damaged"
    assert len(first_line(ValueError("x" * 300))) == 200
