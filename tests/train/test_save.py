"""Runs that begin with given weights: the same loop, and exact when they go on."""

import json
import shutil

import pytest
import torch

from gpt2.checkpoint import model_file, training_state
from gpt2.cli import main
from gpt2.config.command_line import parse
from gpt2.config.train import TrainConfig
from gpt2.model.gpt import GPT
from gpt2.report import metrics as metrics_module
from gpt2.train import loop

from ..conftest import TINY
from ..models import linear_state, reference, write_build_nanogpt, write_llmc, write_nanogpt
from .test_loop import metrics, same, weights

UNSHAPED = [a for a in TINY if not a.startswith(("--n_", "--block_size"))]


@pytest.fixture(scope="module")
def theirs():
    return reference()


@pytest.fixture(scope="module")
def sources(theirs, tmp_path_factory):
    """The same weights in every form, by name."""
    folder = tmp_path_factory.mktemp("weights")
    theirs.save_pretrained(folder / "hf")
    state = {n: t for n, t in linear_state(theirs).items() if n != "lm_head.weight"}
    path = write_nanogpt(folder / "ckpt.pt", theirs, "_orig_mod.")
    config, _, _ = model_file.load_model(path)
    model = GPT(config)
    model_file.load_into(model, state, path)
    model_file.save_model(folder / "out_ckpt.pt", model, 3, 4.0)
    return {
        "own": folder / "out_ckpt.pt",
        "hf": folder / "hf",
        "nanogpt": path,
        "build-nanogpt": write_build_nanogpt(folder / "model_00250.pt", theirs),
        "llm.c": write_llmc(folder / "gpt2.bin", theirs),
    }


@pytest.fixture(scope="session")
def data_dir(gpt2_data_dir):
    """Shards of the vocabulary that the weights have."""
    return gpt2_data_dir


def config(data_dir, out_dir, *arguments) -> TrainConfig:
    argv = [f"--data_dir={data_dir}", f"--out_dir={out_dir}", *UNSHAPED, *arguments]
    return parse(TrainConfig, argv, "gpt2 train")


@pytest.mark.parametrize("kind", ["own", "hf", "nanogpt", "build-nanogpt", "llm.c"])
def test_a_run_begins_with_the_weights(kind, sources, theirs, data_dir, tmp_path, capsys):
    """With a learning rate of 0 they are still there at its end, to the bit."""
    arguments = [f"--init={sources[kind]}", "--max_steps=1", "--learning_rate=0"]
    assert loop.run(config(data_dir, tmp_path, *arguments)) == 0
    out = capsys.readouterr().out
    assert "beginning with" in out
    assert "2 layers, 2 heads, width 32, context 64" in out
    found, state, _ = model_file.load_model(tmp_path / "out_ckpt.pt")
    assert (found.n_layer, found.n_head, found.n_embd, found.block_size) == (2, 2, 32, 64)
    expected = {n: t for n, t in linear_state(theirs).items() if n != "lm_head.weight"}
    assert same(state, expected)


def test_interrupted_run_gives_the_same_bits(sources, data_dir, tmp_path):
    """And does not read the weights again, which may be gone by then."""
    source = tmp_path / "ckpt.pt"
    shutil.copy(sources["nanogpt"], source)
    arguments = [f"--init={source}", "--max_steps=8", "--save_every=3", "--dropout=0.1",
                 "--block_size=32"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.run(config(data_dir, whole, *arguments))
    loop.run(config(data_dir, parts, *arguments, "--keep_last=9"))
    for folder in training_state.state_folders(parts)[1:]:  # as if killed after step 3
        shutil.rmtree(folder)
    source.unlink()
    torch.manual_seed(99)
    assert loop.run(config(data_dir, parts, *arguments)) == 0
    assert same(weights(whole / "out_ckpt.pt"), weights(parts / "out_ckpt.pt"))
    assert metrics(whole) == metrics(parts)
    assert len(metrics(whole)) == 8
    assert model_file.load_model(whole / "out_ckpt.pt")[0].block_size == 32


def test_its_config_file_gives_the_same_run(sources, data_dir, tmp_path):
    arguments = [f"--init={sources['hf']}", "--max_steps=2"]
    loop.run(config(data_dir, tmp_path / "a", *arguments))
    argv = [f"--config={tmp_path / 'a/config.toml'}", f"--out_dir={tmp_path / 'b'}"]
    loop.run(parse(TrainConfig, argv, "gpt2 train"))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_a_second_init_is_another_run(sources, data_dir, tmp_path, capsys):
    common = [f"--data_dir={data_dir}", f"--out_dir={tmp_path}", *UNSHAPED, "--max_steps=1"]
    init = f"--init={sources['hf']}"
    assert main(["train", *common, init]) == 0
    rows = metrics_module.read_metrics(tmp_path / "metrics.jsonl")
    for arguments, message in [
        ([f"--init={sources['llm.c']}"], "began with"),
        ([init, "--n_layer=3"], "you asked for n_layer 3 instead of 2"),
        ([init, "--block_size=128"], "you asked for block_size 128 instead of 64"),
    ]:
        capsys.readouterr()
        assert main(["train", *common, *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert metrics_module.read_metrics(tmp_path / "metrics.jsonl") == rows


def test_a_run_is_named_by_its_folder_or_its_model(data_dir, tmp_path):
    argv = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'base'}", *TINY, "--max_steps=1"]
    loop.run(parse(TrainConfig, argv, "gpt2 train"))
    for steps, init in ((1, "base/out_ckpt.pt"), (2, "base"), (3, "base/out_ckpt.pt")):
        given = [f"--data_dir={data_dir}", f"--init={tmp_path / init}", f"--max_steps={steps}"]
        argv = [*UNSHAPED, *given, f"--out_dir={tmp_path / 'tuned'}"]
        assert loop.run(parse(TrainConfig, argv, "gpt2 train")) == 0
    assert list(metrics(tmp_path / "tuned")) == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n_layer=3"], "has n_layer=2, not 3; leave --size"),
        (["--size=gpt2-xl"], "has n_layer=2, not 48, n_head=2, not 25"),
        (["--block_size=65"], "knows 64 positions; use --block_size=64 or smaller"),
        (["--init=nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["--dropout=1.5"], "dropout=1.5: use a number"),
    ],
)
def test_contradictions_are_one_line(sources, data_dir, tmp_path, capsys, arguments, message):
    common = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}", f"--init={sources['hf']}"]
    assert main(["train", *common, *UNSHAPED, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_vocabulary_of_another_tokenizer(data_dir, tmp_path, capsys):
    path = write_nanogpt(tmp_path / "ckpt.pt", reference(vocab_size=65))
    argv = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}", *UNSHAPED]
    assert main(["train", f"--init={path}", *argv]) == 2
    assert "knows 65 tokens, text and shards are GPT-2's 50,257" in capsys.readouterr().err
    assert main(["eval", str(path), f"--data_dir={data_dir}", "--device=cpu"]) == 2
    assert "knows 65 tokens" in capsys.readouterr().err


def test_all_kinds_have_the_same_validation_loss(sources, data_dir, tmp_path, capsys):
    found = {}
    for kind, source in sources.items():
        json_file = tmp_path / "eval.json"
        argv = [f"--data_dir={data_dir}", "--device=cpu", f"--json={json_file}"]
        assert main(["eval", str(source), *argv, "--eval_tokens=500"]) == 0
        found[kind] = json.loads(json_file.read_text())
    assert {row["val_loss"] for row in found.values()} == {found["own"]["val_loss"]}
    steps = {"own": 3, "hf": None, "nanogpt": 2000, "build-nanogpt": 250, "llm.c": None}
    assert {kind: row["step"] for kind, row in found.items()} == steps


def test_a_profile_begins_with_the_weights_too(sources, data_dir, tmp_path, capsys):
    argv = [f"--data_dir={data_dir}", f"--trace={tmp_path / 't.json'}", *UNSHAPED]
    assert main(["profile", f"--init={sources['hf']}", *argv]) == 0
    assert "block_size 64" in capsys.readouterr().out
