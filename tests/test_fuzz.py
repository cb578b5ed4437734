"""Bytes and words that hypothesis makes up: an answer in one line, never a traceback."""

import contextlib
import io
import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gpt2 import files
from gpt2.checkpoint import training_state
from gpt2.cli import COMMANDS, main
from gpt2.config.command_line import parse
from gpt2.config.model import GPT2Config
from gpt2.config.train import TrainConfig
from gpt2.data.shards import open_shard, read_manifest
from gpt2.errors import UserError
from gpt2.model.gpt import GPT

from .states import save_state
from .test_architecture import CONFIGS

fuzz = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


def said(error: BaseException, code: int = 0):
    assert code == 0
    assert isinstance(error, SystemExit) or str(error)


def one_line(error: UserError):
    assert str(error)
    assert "\n" not in str(error)


@fuzz
@given(
    header=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
    known=st.integers(0, 3), body=st.binary(max_size=3000),
)  # fmt: skip
def test_shards(tmp_path, header, known, body):
    numbers = [20240520, 1, len(body) // 2][:known] + header
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(struct.pack(f"<{len(numbers)}i", *numbers) + body)
    try:
        shard = open_shard(path)
        shard.read(0, shard.tokens)
    except UserError as error:
        one_line(error)


ENTRY = {"name": "x_train_000001.bin", "split": "train", "tokens": 3, "documents": 1, "sha256": ""}


@fuzz
@given(content=JSON | st.dictionaries(st.sampled_from(["shards", "workers", *ENTRY]), JSON),
       entry=st.dictionaries(st.sampled_from(list(ENTRY)), JSON))  # fmt: skip
def test_manifests_of_shards(tmp_path, content, entry):
    for value in (content, {"shards": [ENTRY | entry]}):
        (tmp_path / "manifest.json").write_text(json.dumps(value), encoding="utf-8")
        try:
            found = read_manifest(tmp_path)
        except UserError as error:
            one_line(error)
        else:
            for shard in found["shards"]:
                assert "/" not in shard["name"]
                assert "\\" not in shard["name"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    model = GPT(GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=20))
    return save_state(folder, 1, model, {"t": torch.ones(2)}, 1)


@fuzz
@given(change=st.dictionaries(st.sampled_from(["format", "step", "config", "files"]), JSON),
       config=st.dictionaries(st.sampled_from(["n_layer", "n_embd", "vocab_size", "x"]), JSON),
       sign=st.booleans())  # fmt: skip
def test_manifests_of_checkpoints(saved, change, config, sign):
    """Also with a right hash, as an attacker would write it."""
    path = saved / "manifest.json"
    whole = path.read_bytes()
    manifest = json.loads(whole)
    manifest["config"] |= config
    manifest |= change
    del manifest["sha256"]
    if sign:
        manifest["sha256"] = training_state._digest(manifest)
    try:
        path.write_text(json.dumps(manifest), encoding="utf-8")
        training_state.load_state(saved)
    except UserError as error:
        one_line(error)
    finally:
        path.write_bytes(whole)


@fuzz
@given(place=st.floats(0, 1, exclude_max=True), content=st.binary(min_size=1, max_size=20),
       cut=st.booleans(),
       name=st.sampled_from(["train_state.pt", "model.safetensors"]))  # fmt: skip
def test_files_of_checkpoints(saved, place, content, cut, name):
    """With right hashes: what is left is what torch and safetensors make of them."""
    path, manifest = saved / name, saved / "manifest.json"
    whole, signed = path.read_bytes(), manifest.read_bytes()
    start = int(place * len(whole))
    path.write_bytes(whole[:start] + content + (b"" if cut else whole[start + len(content) :]))
    table = json.loads(signed)
    table["files"][name] = files.fingerprint(path)
    del table["sha256"]
    table["sha256"] = training_state._digest(table)
    manifest.write_text(json.dumps(table))
    try:
        training_state.load_state(saved)
    except UserError as error:
        one_line(error)
    finally:
        path.write_bytes(whole)
        manifest.write_bytes(signed)


NAMES = [f.name for f in GPT2Config.__dataclass_fields__.values()] + ["max_steps", "dtype", "x"]


@fuzz
@given(text=st.text(max_size=60), name=st.sampled_from(NAMES), value=JSON)
def test_toml(tmp_path, text, name, value):
    path = tmp_path / "c.toml"
    for content in (text, f"{name} = {text}", f"{name} = {json.dumps(value)}", f"[{name}]\n{text}"):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            parse(TrainConfig, [f"--config={path}"], "gpt2 train")
        except UserError as error:
            said(error)


WORDS = st.text(max_size=12) | st.sampled_from(
    ["--max_steps", "--max_steps=", "--n_layer=1e999", "--n_layer=-3", "--dtype=float8",
     "--seed=" + "9" * 30,
     "--config=/", "--config=", "--data_dir=:0", "--", "-", "--=", "--resume=\0", "--size=gpt2-xxl"]
)  # fmt: skip


@fuzz
@given(words=st.lists(WORDS, max_size=5), number=st.integers(0, len(CONFIGS)))
def test_options(words, number):
    cls = [TrainConfig, *CONFIGS][number]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parse(cls, words, "gpt2 x")
    except UserError as error:
        said(error)
    except SystemExit as end:  # --help
        said(end, end.code or 0)


@fuzz
@given(words=st.lists(st.text(max_size=8), min_size=1, max_size=3))
def test_commands(words):
    assume(words[0] not in COMMANDS)  # Hypothesis draws words of our code too, and they would run
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(words) in (0, 2)
