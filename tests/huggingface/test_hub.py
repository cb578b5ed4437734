"""The Hub's protocol against a server that misbehaves, in processes of their own.

huggingface_hub reads its environment when it is imported, so each test has a child with another.
"""

import json
import os
from email.utils import formatdate
from time import time

import pytest

from ..conftest import ROOT, run_python
from ..fake_hub import Trouble, fake_hub

COMMIT = "c" * 40
BODY = bytes(range(256)) * 4000  # 1 MB
# Prints a JSON object: what was said, what the code left in `result`, or the error, and the time.
SCRIPT = """
import json, sys, time
from pathlib import Path
from gpt2.errors import UserError
from gpt2.huggingface import hub

hub.FIRST_WAIT_SECONDS, hub.TRIES = 0.02, 4
said, result, error, began = [], None, "", time.monotonic()
dataset = hub.HubDataset("owner/name", "main", said.append)
folder = Path(sys.argv[1])
try:
{code}
except UserError as problem:
    error = str(problem)
seconds = time.monotonic() - began
print(json.dumps(dict(said=said, result=result, error=error, seconds=seconds)))
"""
FIND = "files = dataset.find('data'); result = [f.name for f in files]"
DOWNLOAD = (
    "file = hub.File('data/a.bin', 1_024_000); dataset.revision = 'c' * 40; "
    "dataset.download(file, folder / 'a.bin')"
)


@pytest.fixture
def hub():
    names = ("data/a.bin", "data/b.bin", "data/deep/c.bin", "README.md")
    with fake_hub(dict.fromkeys(names, BODY), "owner/name", COMMIT) as hub:
        yield hub


def child(hub, tmp_path, code, **environment):
    script = SCRIPT.format(code="    " + code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(tmp_path / "home")}
    done = run_python("-c", script, tmp_path, env={**env, **environment})
    return json.loads(done.stdout)


@pytest.mark.parametrize("large", [False, True])
def test_revision_is_settled_and_pages_are_followed(hub, tmp_path, large):
    hub.page_size = 1
    code = "files = dataset.find('data'); result = [dataset.revision, [vars(f) for f in files]]"
    if large:  # the answer about a large repository may lack files: its tree is read
        code = "hub.LARGE_REPOSITORY = 4; " + code
    commit, files = child(hub, tmp_path, code)["result"]
    assert any("/tree/" in line for line in hub.requests) == large
    assert commit == COMMIT
    assert [f["name"] for f in files] == ["data/a.bin", "data/b.bin", "data/deep/c.bin"]
    assert {f["size_bytes"] for f in files} == {len(BODY)}
    assert {len(f["sha256"]) for f in files} == {64}
    everything = child(hub, tmp_path, FIND.replace("'data'", "''"))
    assert "README.md" in everything["result"]


def test_a_name_that_does_not_resolve_is_told_soon(hub, tmp_path):
    code = "hub.TRIES = 8; hub.FIRST_WAIT_SECONDS = 0.02; " + FIND
    told = child(hub, tmp_path, code, HF_ENDPOINT="http://no-such-host.invalid:1")
    assert told["error"].startswith("the name no-such-host.invalid does not resolve: there is no")
    assert "--source=PATH, --source=stdlib or HF_HUB_OFFLINE=1" in told["error"]
    assert len(told["said"]) == 1  # two tries
    assert told["seconds"] < 10


def test_the_first_signal_ends_waiting_for_the_next_try(hub, tmp_path):
    """As a run with `--eval_hellaswag_every=` waits: its signals are noted and not raised."""
    code = (
        "import os, signal, threading; from gpt2.distributed.signals import caught; "
        "hub.FIRST_WAIT_SECONDS = 60; hub.TRIES = 8\n"
        "    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    try:\n"
        "        with caught(lambda n: said.append(n)): dataset.find('data')\n"
        "    except KeyboardInterrupt as stopped: result = stopped.number\n"
    )
    told = child(hub, tmp_path, code, HF_ENDPOINT="http://127.0.0.1:1")
    assert told["result"] == told["said"][-1] == 15
    assert told["seconds"] < 5


def test_files_outside_the_folder_are_refused(hub, tmp_path):
    for name in ("data/../../.bashrc", "/etc/passwd"):
        hub.files = {name: b""}
        assert "outside its folder" in child(hub, tmp_path, FIND.replace("'data'", "''"))["error"]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ([Trouble(503)], "the Hub answered 503"),
        ([Trouble(500), Trouble(502), Trouble(504)], "the Hub answered 500"),
        ([Trouble(cut_after=10)], "peer closed connection"),
        ([Trouble(stall_after=10)], "nothing came for 1 s"),
    ],
)
def test_failures_that_pass_are_waited_out(hub, tmp_path, trouble, reason):
    hub.trouble["/revision/"] = list(trouble)
    found = child(hub, tmp_path, FIND, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert len(found["result"]) == 3
    assert len(found["said"]) == len(trouble)
    assert found["said"][0].startswith(reason)
    assert "trying again in 0.0" in found["said"][0]


@pytest.mark.parametrize("form", ["seconds", "date", "RateLimit"])
def test_the_hub_says_how_long_to_wait(hub, tmp_path, form):
    header = {
        "seconds": {"Retry-After": "1"},
        "date": {"Retry-After": formatdate(time() + 900, usegmt=True)},
        "RateLimit": {"RateLimit": '"api";r=0;t=1'},
    }[form]
    hub.trouble["/revision/"] = [Trouble(429, header)]
    code = FIND
    if form == "date":  # a quarter of an hour: only look at what it says
        code = "import threading; threading.Timer(1, dataset.stop).start()\n    try: " + FIND
        code += "\n    except hub.Stopped: result = []"
    found = child(hub, tmp_path, code)
    assert "the Hub answered 429: trying again in " in found["said"][0]
    seconds = float(found["said"][0].split(" in ")[1].split()[0])
    assert 1 <= seconds < 1.1 or 800 < seconds <= 910
    assert found["seconds"] >= 1


def test_a_bounded_number_of_tries(hub, tmp_path):
    hub.trouble["/revision/"] = [Trouble(500)] * 99
    found = child(hub, tmp_path, FIND)
    assert found["error"].startswith(
        "cannot reach the Hugging Face Hub: the Hub answered 500, 4 times in a row; run the same "
        "command again to continue, or use --source=PATH (docs/troubleshooting.md#no-network)"
    )
    assert len(found["said"]) == 3
    assert len(hub.trouble["/revision/"]) == 95
    hub.url = "http://127.0.0.1:9"  # nobody listens there
    assert "refused, 4 times in a row" in child(hub, tmp_path, FIND)["error"]


def test_what_no_patience_can_mend(hub, tmp_path):
    cases = {
        FIND.replace("'data'", "'elsewhere'"): "has no ",
        "dataset.revision = 'v9'; " + FIND: "the dataset owner/name has no revision v9; see http",
        "dataset.repository = 'owner/other'; " + FIND: "the Hub has no dataset owner/other (HTTP 4",
    }
    for code, message in cases.items():
        found = child(hub, tmp_path, code)
        assert message in found["error"]
        assert found["said"] == []
    hub.trouble["/revision/"] = [Trouble(403), Trouble(400)]
    assert "accepted at http" in child(hub, tmp_path, FIND)["error"]
    assert "(HTTP 400)" in child(hub, tmp_path, FIND)["error"]
    hub.url = "hub.example"
    assert "check HF_ENDPOINT" in child(hub, tmp_path, FIND)["error"]


def test_token(hub, tmp_path):
    hub.token = "hf_secret"
    found = child(hub, tmp_path, FIND)
    assert "HF_TOKEN or `hf auth login`" in found["error"]
    assert len(child(hub, tmp_path, FIND, HF_TOKEN="hf_secret")["result"]) == 3


def test_something_else_than_the_hub(hub, tmp_path):
    hub.trouble["/revision/"] = [Trouble(body=b"<html>please log in to this hotel</html>")]
    assert "answers with something else than the Hub" in child(hub, tmp_path, FIND)["error"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.fault(25, "a connection that ends in the middle")
def test_a_cut_download_goes_on(hub, tmp_path, ranges):
    hub.ranges = ranges
    hub.trouble["resolve"] = [Trouble(cut_after=300_000), Trouble(503), Trouble(cut_after=200_000)]
    found = child(hub, tmp_path, DOWNLOAD)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert len(found["said"]) == 3
    asked = [name.partition("+")[2] for name in hub.downloads()]
    assert asked == ["", "300000", "300000", "500000" if ranges else "200000"]


def test_progress_resets_the_number_of_tries(hub, tmp_path):
    hub.trouble["resolve"] = [Trouble(cut_after=100_000)] * 8
    assert child(hub, tmp_path, DOWNLOAD)["error"] == ""
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_stalled_and_overlong_downloads(hub, tmp_path):
    hub.trouble["resolve"] = [Trouble(stall_after=400_000)]
    found = child(hub, tmp_path, DOWNLOAD, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert found["said"][0].startswith("nothing came for 1 s: trying again in")
    assert (tmp_path / "a.bin").read_bytes() == BODY
    (tmp_path / "a.bin").unlink()
    hub.trouble["resolve"] = [Trouble(body=BODY * 20)]  # the caller sees the wrong size
    assert child(hub, tmp_path, DOWNLOAD)["error"] == ""
    assert len(BODY) < (tmp_path / "a.bin").stat().st_size < 2 * len(BODY)


def test_offline_uses_the_cache(hub, tmp_path):
    fill = (
        "from huggingface_hub import snapshot_download; "
        "snapshot_download('owner/name', repo_type='dataset', allow_patterns='data/*')"
    )
    assert "lacks the dataset owner/name" in child(hub, tmp_path, FIND, HF_HUB_OFFLINE="1")["error"]
    run_python("-c", fill, env={**os.environ, **hub.environment(tmp_path / "home")})
    hub.requests.clear()
    look = FIND + "; result += [dataset.revision, dataset.cached(files[0]).stat().st_size]"
    found = child(hub, tmp_path, look, HF_HUB_OFFLINE="1")
    assert sorted(map(str, found["result"])) == sorted(
        [COMMIT, str(len(BODY)), "data/a.bin", "data/b.bin", "data/deep/c.bin"]
    )
    lacking = child(hub, tmp_path, DOWNLOAD, HF_HUB_OFFLINE="1")
    assert lacking["error"].startswith("HF_HUB_OFFLINE is set and http")
    assert hub.requests == []


def test_nothing_of_the_hub_is_imported_before_it_is_needed():
    code = "import sys; import gpt2.huggingface.hub; assert 'huggingface_hub' not in sys.modules"
    run_python("-c", code, real=True)
