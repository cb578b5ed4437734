"""Files and command lines of commit 74df706 (2026-11-27) still work, to the last bit.

`fixtures/written_by_74df706.tar.xz` is the disk of a small user, written by that commit: shards,
runs at step 3 of 6 (GPT-2, switches, LoRA, FSDP parts), models, an exported folder. It also holds
`expected.json`, which says what that commit went on to compute. `fixtures/make_compat.py` makes
such an archive from any commit.
"""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2.untrusted.display import shown

from .conftest import run_python
from .fixtures import make_compat

FIXTURES = Path(__file__).parent / "fixtures"
ARCHIVE = FIXTURES / "written_by_74df706.tar.xz"
MOST_BYTES = 1_000_000  # of the archive, which is in the repository


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    """The unpacked archive; for tests that leave its files as they are."""
    folder = tmp_path_factory.mktemp("compat") / "disk"
    make_compat.unpack(ARCHIVE, folder)
    return folder


@pytest.fixture(scope="module")
def expected(disk) -> dict:
    return json.loads((disk / "expected.json").read_text("utf-8"))


@pytest.fixture
def here(disk, monkeypatch):
    """The unpacked archive is the working directory."""
    monkeypatch.chdir(disk)


@pytest.fixture
def copy(disk, tmp_path, monkeypatch):
    """A copy is the working directory, to be written into."""
    monkeypatch.chdir(shutil.copytree(disk, tmp_path / "disk"))


def observe(name: str):
    """What today's code computes, as JSON would give it back."""
    return json.loads(json.dumps(make_compat.OBSERVATIONS[name]()))


def named(start: str) -> list[str]:
    """Names of observations."""
    return [name for name in make_compat.OBSERVATIONS if name.startswith(start)]


def check(found, wanted, bits: bool):
    """Equal to the last bit; numbers to four digits where the CPU or torch is another.

    A perplexity is compared by its logarithm, the loss in nats: its relative error is the loss's
    absolute one. Texts, ids and digests follow from the last bits, and are compared where these
    must be equal.
    """
    if bits:
        assert found == wanted
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            if key.endswith("perplexity"):
                check(math.log(found[key]), math.log(value), bits)
            else:
                check(found[key], value, bits)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    elif isinstance(wanted, list) and wanted and isinstance(wanted[0], float):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def bits(expected) -> bool:
    """Whether this machine rounds as the one that wrote the archive."""
    return expected["machine"] == make_compat.machine()


def test_archive_is_small_and_complete(expected):
    assert ARCHIVE.stat().st_size < MOST_BYTES
    assert expected.keys() - {"machine"} == make_compat.OBSERVATIONS.keys()


def test_check_sees_one_bit():
    one, next_one = 1.0, float(np.nextafter(1.0, 2.0))
    with pytest.raises(AssertionError):
        check({"losses": {"4": next_one}}, {"losses": {"4": one}}, bits=True)
    check({"losses": {"4": next_one}}, {"losses": {"4": one}}, bits=False)
    for found, wanted in (
        ({"losses": {"4": 1.001}}, {"losses": {"4": one}}),
        ({"val_perplexity": math.exp(10.53)}, {"val_perplexity": math.exp(10.54)}),
    ):
        with pytest.raises(AssertionError):
            check(found, wanted, bits=False)
    check({"val_perplexity": math.exp(10.5401)}, {"val_perplexity": math.exp(10.54)}, bits=False)


def test_shards_of_before_are_complete_and_made_alike_today(copy, expected):
    assert observe("shards") == expected["shards"]


@pytest.mark.parametrize("name", named("checkpoint "))
def test_models_of_before_compute_what_they_did(here, expected, bits, name):
    wanted = expected[name]
    if "text" in wanted:  # control characters are shown today
        wanted = wanted | {"text": [shown(t, limit=0, keep="\n\t") for t in wanted["text"]]}
    check(observe(name), wanted, bits)


@pytest.mark.slow
@pytest.mark.parametrize("name", named("run "))
def test_runs_of_before_go_on_with_the_bits_of_before(copy, expected, bits, name, monkeypatch):
    if "ranks" in name and sys.platform == "win32":
        pytest.skip("torchrun needs libuv on Windows")

    def torchrun(arguments):  # ranks by forks
        return run_python(*make_compat.TORCHRUN, *arguments, cwd=Path.cwd(), check=False)

    monkeypatch.setattr(make_compat, "torchrun", torchrun)
    wanted = expected[name]
    assert list(wanted["before"]) == ["1", "2", "3"]
    found = observe(name)
    assert {*found["files"]} - {*wanted["files"]} == {"history.jsonl"}  # for `gpt2 compare`
    found["files"].remove("history.jsonl")
    assert found["files"] == wanted["files"]
    assert found["adapter"] == wanted["adapter"]
    assert found["before"] == wanted["before"]
    assert list(found["losses"]) == list("123456")
    check(found, wanted, bits)


def test_export_of_before_is_written_today(copy, expected):
    """The model card is prose and may be worded anew; all else keeps its bytes."""
    found, wanted = observe("export"), expected["export"]
    assert found.keys() == wanted.keys()
    for name, folder in wanted.items():
        assert found[name]["config"] == folder["config"]
        assert found[name]["sha256"].keys() == folder["sha256"].keys()
        del found[name]["sha256"]["README.md"], folder["sha256"]["README.md"]
        assert found[name]["sha256"] == folder["sha256"]


def test_exported_folder_of_before_is_read(here, expected):
    assert observe("exported model") == expected["exported model"]


@pytest.mark.parametrize("name", named("wrong "))
def test_mistakes_are_told_in_the_words_of_before(here, expected, name):
    found, wanted = observe(name), expected[name]
    assert found["code"] == wanted["code"] == 2
    ours, theirs = (as_told(answer["error"]) for answer in (found, wanted))
    assert ours[0] == theirs[0]
    assert ours[1] >= {RENAMED.get(choice, choice) for choice in theirs[1]}


# Values of options that have another name today; the one of before is taken, and not listed.
RENAMED = {"gpt2-small": "gpt2-30m"}


def as_told(error: str) -> tuple[str, set[str]]:
    """(the line, the commands or choices that it lists): there may be more of them today.

    Without quotes, which Python's argparse puts around choices in some versions, with the slashes
    of Linux, and without the page that a line names behind the words of before.
    """
    line = error.replace("\\", "/").replace("'", "")
    line = re.sub(r" \(docs/troubleshooting\.md#[\w-]+\)(?=\n?$)", "", line)
    line = re.sub(r"(argument --\w+)/--\w+", r"\1", line)  # without an alias of today
    listed = re.search(r"(?:unknown command .*; use one of|choose from) ([\w, -]+)", line)
    if not listed:
        return line, set()
    return line.replace(listed[1].strip(), "…"), set(listed[1].strip().split(", "))


# Defaults of gpt2 finetune that today follow the amount of data.
CHANGED_DEFAULTS = {"help finetune": {"--epochs": "0.0", "--batch_size": "0"}}


@pytest.mark.parametrize("name", named("help "))
def test_options_and_commands_of_before_are_accepted(here, expected, name):
    command, wanted = name.split()[1:], expected[name]
    found = observe(name)
    assert found["code"] == wanted["code"] == 0
    pattern = r"^  (gpt2(?: [a-z_]+)+)  "
    listed = [set(re.findall(pattern, o["help"], re.MULTILINE)) for o in (found, wanted)]
    assert listed[0] >= listed[1]
    ours, theirs = found["options"], wanted["options"] | CHANGED_DEFAULTS.get(name, {})
    assert {n: ours.get(n, default) for n, default in theirs.items()} == theirs
    given = {n: d for n, d in theirs.items() if n not in ("--help", "--config")}
    assert "?" not in given.values()
    arguments = [f"{n}={'' if d == 'empty' else d}" for n, d in given.items()]
    assert make_compat.run([*command, *arguments, "--help"])[0] == 0  # aliases may be hidden
    if theirs:
        assert make_compat.run([*command, "--no_such_option=1", "--help"])[0] == 2


def test_operators_of_before_have_their_names(expected):
    assert len(expected["operators"]) == 8
    assert set(observe("operators")) >= set(expected["operators"])
