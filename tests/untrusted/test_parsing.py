"""JSON and TOML of strangers: one line that names the file, whatever they hold."""

import json
import os
import subprocess
import sys

import pytest

from gpt2.errors import UserError
from gpt2.untrusted.parsing import load_json, load_toml, read_json, read_toml

from ..conftest import ROOT
from ..memory import PEAK


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON in UTF-8"),
        (b"{", "is not JSON in UTF-8"),
        (b"\xff{}", "is not JSON in UTF-8"),
        (b"[]", "is not a JSON object"),
        (b"3", "is not a JSON object"),
        (b"[" * 100_000, "is JSON that is nested too deeply"),
        (b'{"a": ' * 100_000, "is JSON that is nested too deeply"),
        (b'{"a": ' + b"9" * 301 + b"}", "a number of more than 300 digits"),
        (b'{"a": [' + b"[]," * 600_000 + b"1]}", "has more than 500,000 values of JSON"),
        (b'{"\x1b[2J": }', r"is not JSON in UTF-8 \("),
    ],
)
def test_json_that_is_refused(tmp_path, data, message):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path, advice="take another")
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith("; take another")
    assert "\x1b" not in str(caught.value)


def test_json_that_is_read(tmp_path):
    values = {"a": [1, -2.5, None, True, "é\n"], "b": {"c": 10**299}}
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(values).encode())
    assert read_json(tmp_path / "x.json") == values
    assert load_json(b"[1]", "x", list) == [1]
    assert load_json(b"3", "x") == 3
    commas = {"text": 'a, b: [c] {d} \\" , ' * 300_000}  # within a string they are no values
    assert load_json(json.dumps(commas).encode(), "x") == commas


@pytest.mark.parametrize("read", [read_json, read_toml])
def test_files_that_cannot_be_read(tmp_path, read, monkeypatch):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "missing")
    with pytest.raises(UserError, match="not a file"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"null (byte|character)"):
        read(tmp_path / "a\0b")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(UserError, match="not a file"):  # and does not wait for a writer
            read(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b" " * (2**24 + 1))
    with pytest.raises(UserError, match=r"is larger than [0-9,]+ bytes"):
        read(tmp_path / "large")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a = ", "is not a TOML file"),
        (b"a = '\xff'", "is not a TOML file"),
        (b"a = " + b"[" * 50_000, "is TOML that is nested too deeply"),
        (b"a = " + b"9" * 5000, "is not a TOML file"),
        (b"a = 0x" + b"f" * 5000, "a has too many digits"),
        (b"\x1b[2J = 1", "is not a TOML file"),
    ],
)
def test_toml_that_is_refused(tmp_path, data, message):
    path = tmp_path / "x.toml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_toml(path)
    assert str(path) in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_toml_that_is_read():
    text = "a = 1_000\r\nb = 'x'\r\nc = [1, {d = 2}]\r\n"
    assert load_toml(text.encode(), "x") == {"a": 1000, "b": "x", "c": [1, {"d": 2}]}


LOAD = (
    PEAK
    + """
import resource, sys
from gpt2.errors import UserError
from gpt2.untrusted.parsing import load_json
before = peak()
for data in (b"[" + b"[]," * 5_500_000 + b"1]", b"[" + b"{}," * 166_000 + b"1]",
             b'{"a": "' + "\U0001f600".encode() + b"a" * (2**24 - 20) + b'"}'):
    try:
        load_json(data, "x", object)
    except UserError:
        pass
print(int(peak() - before))
"""
)


def test_memory_of_json_is_bounded():
    """The largest texts of a file: lists, objects, and a string of wide characters."""
    answer = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(answer.stdout) <= 200
