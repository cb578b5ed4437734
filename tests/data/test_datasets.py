"""Mixes by weight, and datasets that are or are not what they were when a run goes on."""

import json
import shutil

import numpy as np
import pytest

from gpt2.checkpoint import model_file, training_state
from gpt2.config.command_line import parse
from gpt2.config.train import TrainConfig
from gpt2.data.datasets import open_datasets, parse_mix, split_eval_tokens
from gpt2.data.shards import write_shard
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.report import metrics as metrics_module
from gpt2.train import loop

from ..conftest import TINY
from ..states import save_state
from ..train.test_loop import metrics, same, weights


@pytest.fixture
def folders(data_dir, tmp_path):
    """Two datasets: `real`, and `numbers`, whose tokens are 0, 1, 2, … up to 511, and again."""
    shutil.copytree(data_dir, tmp_path / "real")
    tokens = np.arange(20_000, dtype=np.uint16) % 512
    (tmp_path / "numbers").mkdir()
    for name in ("manifest.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_dir / name, tmp_path / "numbers")
    for name, piece in (("val_000000", tokens[:600]), ("train_000001", tokens[600:])):
        write_shard(tmp_path / f"numbers/n_{name}.bin", piece)
    return tmp_path / "real", tmp_path / "numbers"


def run(data, out, *arguments, steps=6) -> int:
    argv = [f"--data={data}", f"--out_dir={out}", *TINY, f"--max_steps={steps}", *arguments]
    return loop.run(parse(TrainConfig, argv, "gpt2 train"))


def change(path):
    tokens = np.frombuffer(path.read_bytes()[1024:], dtype=np.uint16).copy()
    tokens[len(tokens) // 2] += 1
    write_shard(path, tokens)


# ---- what the option means ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("fineweb", [("fineweb", 1.0)]),
        ("fineweb:0.8,code:0.2", [("fineweb", 0.8), ("code", 0.2)]),
        ("a:8,b:1e0,c:.5", [("a", 8.0), ("b", 1.0), ("c", 0.5)]),
        (r"C:\data", [(r"C:\data", 1.0)]),
        ("C:/data", [("C:/data", 1.0)]),
        (r"C:\data:3,D:\more:1", [(r"C:\data", 3.0), (r"D:\more", 1.0)]),
        ("data:v2", [("data:v2", 1.0)]),
    ],
)
def test_folders_and_weights(text, parts):
    assert parse_mix(text) == parts


def test_a_folder_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "run-3,5"):
        (tmp_path / name).mkdir()
        assert parse_mix(name) == [(name, 1.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the name of a folder is missing"),
        ("a:0.8,b", "'b' has no weight; a mix is written"),
        ("a,b", "'a' has no weight"),
        ("a:0.8,", "'' has no weight"),
        ("a:0,b:1", "use a weight above 0 and up to 1e9, not 0"),
        ("a:-1,b:1", "not -1"),
        ("a:nan,b:1", "not nan"),
        ("a:inf,b:1", "not inf"),
        (":0.5,b:0.5", "the name of a folder is missing"),
    ],
)
def test_mistakes_in_a_mix(text, message):
    with pytest.raises(UserError, match=message) as caught:
        open_datasets(text)
    assert "\n" not in str(caught.value)
    assert f"--data_dir={text}: " in str(caught.value)


def test_shares_and_validation_tokens(folders):
    real, numbers = folders
    first, second = open_datasets(f"{real}:3,{numbers}:1")
    assert (first.name, first.share, second.name, second.share) == ("real", 0.75, "numbers", 0.25)
    assert split_eval_tokens([first, second], 1000) == [750, 250]
    assert split_eval_tokens([first, second], 1) == [1, 1]
    assert split_eval_tokens([first, second], 10**6) == [3999, 599]  # all there are
    shutil.copytree(real, real.parent / "third")
    thirds = open_datasets(f"{real}:1,{numbers}:1,{real.parent / 'third'}:1")
    assert split_eval_tokens(thirds, 1000) == [333, 334, 333]
    (only,) = open_datasets(str(real))
    assert (only.share, split_eval_tokens([only], 77)) == (1.0, [77])


def test_two_folders_of_one_name(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "other/real")
    with pytest.raises(UserError, match="two of the folders are named real"):
        open_datasets(f"{folders[0]}:1,{tmp_path / 'other/real'}:1")


# ---- training on a mix --------------------------------------------------------------------------


def test_training_on_a_mix(folders, tmp_path, capsys):
    real, numbers = folders
    run(f"{real}:0.75,{numbers}:0.25", tmp_path / "out")
    out = capsys.readouterr().out
    assert "real: 75.0% of the tokens; " in out
    sequences = len(range(0, 19_400 - 32, 32))
    epochs = 6 * 4 * 0.25 / sequences
    assert f"numbers: 25.0% of the tokens; {sequences * 32:,} training tokens per epoch" in out
    assert f"6 steps are {epochs:.2f} epochs" in out
    row = metrics_module.read_metrics(tmp_path / "out/metrics.jsonl")[-1]
    both = 0.75 * row["val_loss_real"] + 0.25 * row["val_loss_numbers"]
    assert row["val_loss"] == pytest.approx(both, abs=1e-6)
    assert row["val_tokens"] == 500
    assert f"numbers {row['val_loss_numbers']:.4f}" in out


def test_a_mix_goes_on_with_the_same_bits(folders, tmp_path):
    data = f"{folders[0]}:0.7,{folders[1]}:0.3"
    arguments = ["--window_start=document", "--save_every=2", "--keep_last=9"]
    for out in ("whole", "parts"):
        run(data, tmp_path / out, *arguments)
    for state in training_state.state_folders(tmp_path / "parts")[1:]:  # as if killed after step 2
        shutil.rmtree(state)
    run(data, tmp_path / "parts", *arguments)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert same(weights(tmp_path / "whole/out_ckpt.pt"), weights(tmp_path / "parts/out_ckpt.pt"))


def test_weights_may_change_on_the_way(folders, tmp_path):
    """Each dataset goes on where it was, and a dataset that is new begins at its beginning."""
    real, numbers = folders
    out = tmp_path / "out"
    run(real, out, steps=2)
    run(f"{real}:1,{numbers}:1", out, steps=4)
    run(f"{real}:1,{numbers}:3", out, steps=6)
    data = training_state.load_state(training_state.state_folders(out)[-1]).state["data"]
    assert data["began"] == 4 * 4
    assert [d["before"] for d in data["datasets"]] == [2 * 4 + 4, 4]
    assert [d["consumed"] for d in data["datasets"]] == [2 * 4 + 4 + 2, 4 + 6]


# ---- shards that changed ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text_train_000002.bin", "text_val_000000.bin"])
@pytest.mark.fault(16, "a shard rewritten or removed")
def test_a_changed_shard_is_refused(folders, tmp_path, name):
    run(folders[0], tmp_path / "out", steps=2)
    state = training_state.state_folders(tmp_path / "out")
    change(folders[0] / name)
    with pytest.raises(UserError, match=f"{name} holds other tokens than when .*step_00000002"):
        run(folders[0], tmp_path / "out", steps=4)
    (folders[0] / name).rename(folders[0] / "away")
    missing = f"{name} is missing|no \\*_val_\\*.bin"
    with pytest.raises(UserError, match=missing):
        run(folders[0], tmp_path / "out", steps=4)
    assert training_state.state_folders(tmp_path / "out") == state


def test_another_folder_of_the_same_shards_is_the_same(folders, tmp_path):
    for out in ("one", "two"):
        run(folders[0], tmp_path / out, steps=2)
    moved = folders[0].rename(tmp_path / "moved")
    run(moved, tmp_path / "one", steps=4)
    moved.rename(folders[0])
    run(folders[0], tmp_path / "two", steps=4)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


def test_added_shards_are_left_out(folders, tmp_path, capsys):
    for out in ("one", "two"):
        run(folders[0], tmp_path / out, steps=2)
    run(folders[0], tmp_path / "one", steps=4)
    shutil.copy(folders[0] / "text_train_000001.bin", folders[0] / "text_train_000000.bin")
    run(folders[0], tmp_path / "two", steps=4)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    assert "real: shards that were added since" in capsys.readouterr().out
    run(folders[0], tmp_path / "two", "--resume=never", steps=4)
    assert metrics(tmp_path / "one") != metrics(tmp_path / "two")


def test_changed_text_under_another_name_is_new_text(folders, tmp_path, capsys):
    run(folders[0], tmp_path / "out", steps=2)
    change(folders[0] / "text_train_000001.bin")
    run(folders[0].rename(tmp_path / "changed"), tmp_path / "out", steps=4)
    assert "step_00000002, so it is read from its beginning" in capsys.readouterr().out
    data = training_state.load_state(training_state.state_folders(tmp_path / "out")[-1]).state[
        "data"
    ]
    assert (data["began"], data["datasets"][0]["before"]) == (8, 0)


def test_a_checkpoint_that_does_not_know_its_shards(folders, tmp_path, capsys):
    out = tmp_path / "out"
    run(folders[0], out, steps=2)
    found = training_state.load_state(training_state.state_folders(out)[-1])
    del found.state["data"]
    shutil.rmtree(out / "state")
    model = GPT(found.config)
    model_file.load_into(model, found.model, out)
    save_state(out, 2, model, found.state, keep_last=1)
    assert run(folders[0], out, steps=4) == 0
    assert "does not say which shards it was trained on" in capsys.readouterr().out
    rows = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["tokens"] == 4 * 4 * 32
