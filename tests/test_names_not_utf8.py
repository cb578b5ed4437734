"""Names of files and folders that are not UTF-8, as old archives bring them."""

import json
import os
import sys

import pytest

from gpt2 import GPT2
from gpt2.cli import main
from gpt2.data.shards import read_manifest, write_manifest
from gpt2.errors import UserError
from gpt2.untrusted.parsing import load_json, to_json

from .conftest import TINY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse the names")
NAME = os.fsdecode(b"caf\xe9")  # "café" in Latin-1


def test_json_escapes_what_has_no_bytes():
    value = {NAME: [f"é {NAME} \ud800", 1.5, None]}
    written = to_json(value)
    assert "é caf\\udce9" in written.decode()
    assert load_json(written, "a test", dict) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(float("nan"), allow_nan=False)


def test_texts_become_shards_and_are_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(6):
        (tmp_path / "texts" / f"{NAME}{i}.txt").write_text(f"Some words of the text {i}. " * 9)
    arguments = ["prepare", "--source=texts", "--out_dir=data"]
    assert main(arguments) == 0
    manifest = read_manifest(tmp_path / "data")
    assert NAME in json.dumps(manifest, ensure_ascii=False)
    write_manifest(tmp_path / "data", manifest)
    assert read_manifest(tmp_path / "data") == manifest
    capsys.readouterr()
    assert main(arguments) == 0  # it knows its files again
    assert "already complete" in capsys.readouterr().out
    GPT2(n_layer=1, n_head=1, n_embd=8, block_size=16).save("a.pt")
    text = f"texts/{NAME}0.txt"
    assert main(["eval", "a.pt", "--device=cpu", f"--text={text}", "--json=e.json"]) == 0
    assert json.loads((tmp_path / "e.json").read_bytes())["text_source"] == text


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--data_dir=data", *TINY, "--out_dir={0}"],
        ["sample", "{0}", "--prompt=a"],
        ["average", "run", "--out={0}/mean.pt"],
        ["export", "a.pt", "{0}"],
    ],
    ids=lambda command: command[0],
)
def test_weights_are_not_kept_under_such_a_name(data_dir, tmp_path, monkeypatch, capsys, command):
    """safetensors opens no such file: a run would find all of its checkpoints damaged."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data_dir)
    (tmp_path / NAME).mkdir()
    GPT2(n_layer=1, n_head=1, n_embd=8, block_size=16).save("a.pt")
    assert main([part.format(NAME) for part in command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "caf\\udce9" in error
    assert error.endswith("the name is not UTF-8, as names of weights must be; use another\n")
    assert not any((tmp_path / NAME).iterdir())
    with pytest.raises(UserError, match="the name is not UTF-8"):
        GPT2(n_layer=1, n_head=1, n_embd=8, block_size=16).save(f"{NAME}/a.pt")
