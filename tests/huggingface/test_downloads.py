"""Whole, verified files from a Hub that misbehaves, one ahead; in processes of their own."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gpt2.errors import UserError
from gpt2.huggingface.downloads import Downloads
from gpt2.huggingface.hub import File, HubDataset

from ..conftest import ROOT, run_python
from ..fake_hub import Trouble, fake_hub, sha256

COMMIT = "c" * 40
FILES = {f"data/{name}.bin": bytes([i]) * 500_000 for i, name in enumerate("abc")}
SCRIPT = """
import json, sys, threading, time
from pathlib import Path
from gpt2.errors import UserError
from gpt2.huggingface import hub
from gpt2.huggingface.downloads import Downloads

hub.FIRST_WAIT_SECONDS = 0.02
said, result, error = [], None, ""
dataset = hub.HubDataset("owner/name", "main", said.append)
folder = Path(sys.argv[1]) / "downloads"
files = sorted(dataset.find("data"), key=lambda file: file.name)
downloads = Downloads(dataset, folder, {keep}, said.append)
try:
{code}
except UserError as problem:
    error = str(problem)
print(json.dumps(dict(said=said, result=result, error=error)))
"""
READ = """
    result = []
    for file, following in zip(files, [*files[1:], None]):
        with downloads.open(file, following) as path:
            result.append([path.name, path.stat().st_size])
"""
READ_ONE = """
    with downloads.open(files[0]) as path:
        result = path.read_bytes()[:1].hex()
"""


@pytest.fixture
def hub():
    with fake_hub(dict(FILES), "owner/name", COMMIT) as hub:
        yield hub


def environment(hub, tmp_path):
    return {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(tmp_path / "home")}


def child(hub, tmp_path, code, keep=False, **more):
    script = SCRIPT.format(code=code, keep=keep)
    done = run_python("-c", script, tmp_path, env={**environment(hub, tmp_path), **more})
    return json.loads(done.stdout)


def left(tmp_path):
    return sorted(p.name for p in (tmp_path / "downloads").rglob("*") if p.is_file())


def test_files_come_whole_and_go_after_use(hub, tmp_path):
    found = child(hub, tmp_path, READ)
    assert found["result"] == [[f"{name}.bin", 500_000] for name in "abc"]
    assert found["said"] == [f"downloading data/{name}.bin, 0.00 GB" for name in "abc"]
    assert left(tmp_path) == []
    assert len(hub.downloads()) == 3


def test_one_file_is_downloaded_ahead_and_no_more(hub, tmp_path):
    code = """
    with downloads.open(files[0], files[1]) as path:
        deadline = time.monotonic() + 20
        while not (folder / files[1].name).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        result = sorted(p.name for p in folder.rglob("*.bin"))
"""
    assert child(hub, tmp_path, code)["result"] == ["a.bin", "b.bin"]
    assert hub.downloads() == ["data/a.bin", "data/b.bin"]


def test_kept_files_are_verified_and_used_again(hub, tmp_path):
    child(hub, tmp_path, READ, keep=True)
    assert left(tmp_path) == ["a.bin", "b.bin", "c.bin"]
    (tmp_path / "downloads/data/b.bin").write_bytes(bytes([7]) * 500_000)  # of the right size
    (tmp_path / "downloads/data/c.bin").write_bytes(b"short")
    hub.requests.clear()
    found = child(hub, tmp_path, READ, keep=True)
    assert found["result"] == [[f"{name}.bin", 500_000] for name in "abc"]
    assert hub.downloads() == ["data/b.bin", "data/c.bin"]
    assert {sha256(p.read_bytes()) for p in (tmp_path / "downloads/data").iterdir()} == {
        sha256(body) for body in FILES.values()
    }


def test_wrong_content_is_downloaded_once_more(hub, tmp_path):
    wrong, longer = Trouble(body=bytes([9]) * 500_000), Trouble(body=bytes(600_000))
    hub.trouble["a.bin"] = [wrong]
    found = child(hub, tmp_path, READ_ONE)
    assert found["result"] == "00"
    assert any("its sha256 is " in line and "again" in line for line in found["said"])
    hub.trouble["a.bin"] = [wrong, longer]
    error = child(hub, tmp_path, READ_ONE)["error"]
    assert error.startswith("data/a.bin of owner/name: ")
    assert "bytes came instead of 500,000, twice; run the same command again later" in error
    assert left(tmp_path) == []


def test_the_cache_of_the_hub_is_used_and_not_emptied(hub, tmp_path):
    fill = (
        "from huggingface_hub import snapshot_download; "
        "snapshot_download('owner/name', repo_type='dataset')"
    )
    run_python("-c", fill, env=environment(hub, tmp_path))
    hub.requests.clear()
    for _ in range(2):
        assert len(child(hub, tmp_path, READ)["result"]) == 3
    assert hub.downloads() == []
    blob = next(p for p in (tmp_path / "home").rglob("a.bin") if p.is_file()).resolve()
    blob.write_bytes(bytes([7]) * 500_000)
    assert child(hub, tmp_path, READ_ONE)["result"] == "00"
    assert hub.downloads() == ["data/a.bin"]


def test_error_of_the_thread_comes_when_its_file_is_wanted(hub, tmp_path):
    hub.trouble["b.bin"] = [Trouble(404)]
    found = child(hub, tmp_path, READ)
    assert found["error"]
    assert found["said"] == ["downloading data/a.bin, 0.00 GB", "downloading data/b.bin, 0.00 GB"]


def test_damaged_file_is_not_found_again(hub, tmp_path):
    code = READ_ONE + "        raise UserError('damaged')"
    assert child(hub, tmp_path, code, keep=True)["error"] == "damaged"
    assert left(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(hub, tmp_path):
    full = "    import os; hub.no_follow = lambda path, flags: os.open('/dev/full', flags)"
    error = child(hub, tmp_path, full + READ_ONE)["error"]
    assert error.startswith("disk full while downloading data/a.bin to ")
    assert "finished shards are kept" in error
    assert child(hub, tmp_path, READ_ONE)["result"] == "00"


def test_a_quota_is_no_full_disk(hub, tmp_path):
    quota = f"    def opener(*_): raise OSError({errno.EDQUOT}, 'Disk quota exceeded')\n"
    error = child(hub, tmp_path, quota + "    hub.no_follow = opener\n" + READ_ONE)["error"]
    assert error.startswith("Disk quota exceeded while downloading data/a.bin to ")


def start(hub, tmp_path, code, **more):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(code=code, keep=False), str(tmp_path)],
        env={**environment(hub, tmp_path), **more}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_bytes(path, count, process):
    while not path.exists() or path.stat().st_size < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_and_gone_on_by_range(hub, tmp_path):
    hub.trouble["a.bin"] = [Trouble(stall_after=400_000)]
    process = start(hub, tmp_path, READ_ONE)
    wait_for_bytes(tmp_path / "downloads/data/a.bin.part", 300_000, process)
    process.kill()
    process.communicate()
    have = (tmp_path / "downloads/data/a.bin.part").stat().st_size
    assert child(hub, tmp_path, READ_ONE)["result"] == "00"
    assert hub.downloads() == ["data/a.bin", f"data/a.bin+{have}"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_in_a_stalled_download(hub, tmp_path):
    hub.trouble["a.bin"] = [Trouble(stall_after=400_000)]
    code = READ_ONE.replace("    with", "    try:\n     with").replace("        r", "      r")
    code += "    except KeyboardInterrupt: downloads.close(); result = 'interrupted'\n"
    process = start(hub, tmp_path, code, HF_HUB_DOWNLOAD_TIMEOUT="60")
    wait_for_bytes(tmp_path / "downloads/data/a.bin.part", 300_000, process)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 4
    assert json.loads(out)["result"] == "interrupted"
    assert err == ""


@pytest.fixture
def downloads(tmp_path):
    """Downloads into a folder, of a dataset whose cache is empty."""
    dataset = HubDataset("owner/name", COMMIT, print)
    dataset.cached = lambda file: None
    return Downloads(dataset, tmp_path / "downloads", False, print)


def test_clearing_deletes_only_what_was_downloaded(downloads, tmp_path):
    folder = tmp_path / "downloads"
    for name in ("data/a.bin", "data/b.bin.part", "data/mine.bin", "other/b.bin", "b.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    files = [File(f"{name}.bin", 1) for name in ("data/a", "data/b", "data/deep/c")]
    downloads.clear(files)
    assert left(tmp_path) == ["b.bin", "b.bin", "mine.bin"]
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.unlink()
    (folder / "other").rmdir()
    downloads.clear(files)
    assert not folder.exists()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
@pytest.mark.fault(27, "links in the place of files and folders of a download")
@pytest.mark.parametrize("link", ["data", "data/a.bin", "data/a.bin.part"])
def test_links_are_neither_followed_nor_deleted(downloads, hub, tmp_path, link):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("a.bin", "a.bin.part"):
        (outside / name).write_bytes(FILES["data/a.bin"])  # as if it had been downloaded
    place = tmp_path / "downloads" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(outside if link == "data" else outside / place.name)
    file = File("data/a.bin", 500_000, sha256(FILES["data/a.bin"]))
    for use in (lambda: downloads.open(file).__enter__(), lambda: downloads.clear([file])):
        with pytest.raises(UserError, match="is a symbolic link and may lead out of"):
            use()
    assert "is a symbolic link" in child(hub, tmp_path, READ_ONE)["error"]
    assert place.is_symlink()
    assert [p.read_bytes() for p in outside.iterdir()] == [FILES["data/a.bin"]] * 2


@pytest.mark.parametrize("name", ["../a.bin", "/a.bin", "C:\\a.bin", ""])
def test_a_file_cannot_have_a_name_outside(name):
    with pytest.raises(UserError, match="outside its folder"):
        File(name, 1)
