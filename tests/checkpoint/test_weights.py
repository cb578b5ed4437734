"""Models of the Hub, from a server on this machine, and what training makes of weights."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.checkpoint import model_file, weights
from gpt2.checkpoint.weights import Weights, for_training, load, resolve_options
from gpt2.config.command_line import parse
from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.config.train import ModelOptions, TrainConfig, check_of_switches
from gpt2.errors import UserError
from gpt2.train.setup import network

from ..conftest import ROOT, run_python
from ..fake_hub import MODEL_COMMIT, Trouble, fake_hub
from ..models import logits, reference, write_nanogpt

IDX = torch.arange(64).reshape(2, 32) * 15
# Loads models by name and says of each: what was found, or the error.
SCRIPT = """
import json, sys
from gpt2 import GPT2
from gpt2.errors import UserError

told = []
for number, name in enumerate(sys.argv[1:]):
    try:
        GPT2.from_pretrained(name, device="cpu").save(f"{number}.pt")
        told.append("found")
    except UserError as error:
        told.append(str(error))
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def theirs():
    return reference(vocab_size=1000)


def files_of(model, folder: Path, **settings) -> dict[str, bytes]:
    """What `save_pretrained` of transformers writes."""
    model.save_pretrained(folder, **settings)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(theirs, data_dir, tmp_path):
    whole = files_of(theirs, tmp_path / "whole")
    llama = whole["config.json"].replace(b'"model_type": "gpt2"', b'"model_type": "llama"')
    assert llama != whole["config.json"]
    with fake_hub({}) as hub:
        hub.models = {
            "openai-community/gpt2": whole | {"pytorch_model.bin": b"pickled"},
            "openai-community/gpt2-xl": files_of(theirs, tmp_path / "x", max_shard_size="100KB"),
            "me/mine": whole,
            "me/untold": whole | {"tokenizer.json": (data_dir / "tokenizer.json").read_bytes()},
            "me/pickled": {"config.json": whole["config.json"], "pytorch_model.bin": b"pickled"},
            "me/llama": whole | {"config.json": llama},
            "me/damaged": whole | {"model.safetensors": whole["model.safetensors"][:-9]},
        }
        yield hub


def load_in_child(hub, tmp_path, *names, first="", **environment) -> list[str]:
    """What SCRIPT says, after a line of code that the child runs `first`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(tmp_path / "home")}
    done = run_python("-c", first + SCRIPT, *names, cwd=tmp_path, env={**env, **environment})
    told = json.loads(done.stdout.splitlines()[-1])
    assert not any("\n" in line for line in told)
    return told


@pytest.mark.slow
def test_models_of_the_hub(hub, theirs, tmp_path):
    (tmp_path / "gpt2").mkdir()  # as in a clone of this project: the name means OpenAI's weights
    names = ["gpt2", "gpt2-xl", "me/mine", f"me/mine@{MODEL_COMMIT}"]
    assert load_in_child(hub, tmp_path, *names) == ["found"] * 4
    for number in range(4):
        model = GPT2.from_checkpoint(tmp_path / f"{number}.pt", "cpu")
        torch.testing.assert_close(model(IDX), logits(theirs, IDX), atol=1e-5, rtol=0)
    assert not any(".bin" in line for line in hub.requests)
    requests = len(hub.requests)
    assert load_in_child(hub, tmp_path, *names, HF_HUB_OFFLINE="1") == ["found"] * 4
    assert len(hub.requests) == requests


def test_what_is_not_there_is_one_line(hub, tmp_path):
    told = load_in_child(
        hub,
        tmp_path,
        "me/none",
        "me/mine@never",
        "me/pickled",
        "me/llama",
        "me/damaged",
        "out/x.pt",
    )
    expected = (
        "no such file or folder here, and no such model at",
        "me/mine has no revision never",
        "has no safetensors (pickles are not read)",
        "model_type 'llama' is not gpt2",
        "missing or damaged",
        "out/x.pt: no such checkpoint",
    )
    assert len(told) == len(expected)
    for line, part in zip(told, expected, strict=True):
        assert part in line
    assert not any("me/llama" in r and "safetensors" in r for r in hub.requests)


def test_without_a_network_only_the_cache_is_asked(hub, tmp_path):
    """A name under .invalid never resolves (RFC 6761); huggingface_hub would try it for 26 s."""
    assert load_in_child(hub, tmp_path, "me/mine") == ["found"]
    no_network = {"HF_ENDPOINT": "http://hub.invalid"}
    more = "me/untold", "out/mine"
    assert load_in_child(hub, tmp_path, more[0]) == ["found"]
    for link in tmp_path.glob("home/hub/models--me--untold/snapshots/*/tokenizer.json"):
        link.unlink()  # as after a download that was cut off
    found, untold, told = load_in_child(hub, tmp_path, "me/mine", *more, **no_network)
    assert found == "found"  # the cache knows that it has no tokenizer
    assert "does not resolve (no network?) and the cache lacks its tokenizer.json" in untold
    offline = load_in_child(hub, tmp_path, "me/mine", more[0], HF_HUB_OFFLINE="1")
    assert offline[0] == "found"
    assert "HF_HUB_OFFLINE is set and the cache lacks its tokenizer.json" in offline[1]
    assert told == (
        "out/mine: no such file or folder here, the name hub.invalid does not resolve (no "
        "network?) and the cache lacks its config.json; try again with a network, or download first"
    )


@pytest.mark.slow
def test_no_connection_is_one_line_after_some_tries(hub, tmp_path):
    """Between its tries huggingface_hub would wait for 23 s."""
    no_wait = "import time; time.sleep = lambda seconds: None"
    (told,) = load_in_child(
        hub, tmp_path, "me/mine", first=no_wait, HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert told.startswith("cannot get config.json of http://127.0.0.1:9/me/mine: ")
    assert "refused" in told


@pytest.mark.slow
def test_no_access_is_one_line(hub, tmp_path):
    (told,) = load_in_child(hub, tmp_path, "me/mine", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set and the cache lacks its config.json" in told
    hub.trouble, hub.token = {"config.json": [Trouble(status=403)]}, "secret"
    told = load_in_child(hub, tmp_path, "me/mine", "me/mine")
    assert "403" in told[0]
    assert "no access to me/mine: set HF_TOKEN" in told[1]
    assert load_in_child(hub, tmp_path, "me/mine", HF_TOKEN="secret") == ["found"]


@pytest.mark.slow
def test_damage_in_the_cache_is_noticed(hub, tmp_path):
    assert load_in_child(hub, tmp_path, "me/mine") == ["found"]
    (kept,) = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
    blob = kept.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    (told,) = load_in_child(hub, tmp_path, "me/mine")
    assert f"{blob} is damaged" in told


def test_a_path_is_never_a_name(theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs.save_pretrained("gpt2")
    for source in ("./gpt2", Path("gpt2"), tmp_path / "gpt2"):
        assert weights.load(source).config.vocab_size == 1000
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        weights.load("gpt2")
    with pytest.raises(UserError, match="names a revision already"):
        weights.load("me/mine@a", revision="b")


def test_folder_of_a_run_stands_for_its_checkpoint(tmp_path):
    model = GPT2(n_layer=1, n_head=1, n_embd=8)
    model.save(tmp_path / "out_ckpt.pt")
    found = weights.load(tmp_path).state["transformer.wte.weight"]
    assert torch.equal(found, model.state_dict()["transformer.wte.weight"])
    (tmp_path / "config.toml").write_text("seed = 1\n")
    (tmp_path / "out_ckpt.pt").rename(tmp_path / "best_ckpt.pt")
    with pytest.raises(UserError, match=r"no model; use .*best_ckpt\.pt"):
        weights.load(tmp_path)
    (tmp_path / "best_ckpt.pt").unlink()
    with pytest.raises(UserError, match=r"run that has written no model yet$"):
        weights.load(tmp_path)
    (tmp_path / "state/step_00000005").mkdir(parents=True)
    with pytest.raises(UserError, match=r"yet; make one by `gpt2 average .* --last=1`$"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("me/mine/", "me/mine"),
        ("https://huggingface.co/me/mine", "me/mine"),
        ("huggingface.co/me/mine/", "me/mine"),
        ("https://huggingface.co/me/mine/tree/v1", "me/mine@v1"),
        ("hf.co/me/mine", "me/mine"),
    ],
)
def test_address_of_the_hub_is_a_name(given, meant, monkeypatch):
    asked = []

    def download(repository, revision, **_):
        asked.append(f"{repository}@{revision}".removesuffix("@"))
        raise UserError("told")

    monkeypatch.setattr(weights, "download", download)
    with pytest.raises(UserError, match="told"):
        load(given)
    assert asked == [meant]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_of_a_folder_stands_for_it(name, theirs, tmp_path):
    files_of(theirs, tmp_path / "x")
    assert load(str(tmp_path / "x" / name)).folder == tmp_path / "x"


def test_weights_without_a_config_are_named(theirs, tmp_path):
    files_of(theirs, tmp_path / "x")
    (tmp_path / "x" / "config.json").unlink()
    torch.save(theirs.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(UserError, match="weights without a config; name a folder"):
        load(str(tmp_path / "x" / "model.safetensors"))
    with pytest.raises(UserError, match="weights alone do not say how many heads"):
        load(str(tmp_path / "bare.pt"))


def test_infinite_weights_are_refused(theirs, tmp_path):
    model = reference(vocab_size=1000)
    with torch.no_grad():
        model.transformer.wpe.weight[3, 3] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"NaN or infinity in transformer\.wpe\.weight"):
        weights.load(tmp_path)


FOUND = GPT2Config(n_layer=3, n_head=5, n_embd=40, block_size=64)


def test_sizes_are_those_of_the_weights():
    options = resolve_options(ModelOptions(init="x", dropout=0.1), FOUND)
    assert options.shape() == GPT2Config(**{**vars(FOUND), "dropout": 0.1})
    same = ModelOptions(init="x", n_layer=3, n_head=5, n_embd=40, block_size=16)
    assert resolve_options(same, FOUND).shape() == GPT2Config(**{**vars(FOUND), "block_size": 16})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"n_layer": 4}, "has n_layer=3, not 4; leave --size"),
        ({"size": "gpt2"}, "has n_layer=3, not 12, n_head=5, not 12, n_embd=40, not 768"),
        ({"block_size": 65}, "knows 64 positions; use --block_size=64 or smaller"),
    ],
)
def test_sizes_that_contradict_the_weights(asked, message):
    with pytest.raises(UserError, match=message):
        resolve_options(ModelOptions(init="x", **asked), FOUND)


def test_windows_and_rates_of_switches_that_the_weights_have():
    found = ModernConfig(n_layer=3, n_head=5, n_embd=40, block_size=64, untied_head=True,
                         window_pattern="SL", window=32)  # fmt: skip
    for room in (1, 32):
        with pytest.raises(
            UserError, match="attention windows of 32 positions; use --block_size=33"
        ):
            resolve_options(ModelOptions(init="x", block_size=room), found)
    assert resolve_options(ModelOptions(init="x", block_size=33), found).shape().window == 32
    asked = parse(TrainConfig, ["--init=x", "--head_lr=1e-3", "--window_warmup=0.5"], "gpt2 train")
    check_of_switches(asked.optim, resolve_options(asked.model, found))
    with pytest.raises(UserError, match="head_lr is for --untied_head"):
        check_of_switches(asked.optim, resolve_options(asked.model, FOUND))


def test_tables_and_a_head_of_their_own_are_cut_as_well():
    config = ModernConfig(n_layer=2, n_head=2, n_embd=8, block_size=16, vocab_size=50304,
                          untied_head=True, value_embeddings=1)  # fmt: skip
    found = Weights(config, network(config).state_dict(), "x")
    cut = for_training(found, 16)
    network(cut.config).load_state_dict(cut.state)
    assert torch.equal(cut.state["head.weight"], found.state["head.weight"][:50257])
    assert len(cut.notes) == 3


def test_rows_that_training_cannot_meet_are_cut_off(tmp_path):
    found = weights.load(write_nanogpt(tmp_path / "ckpt.pt", reference(vocab_size=50304)))
    cut = for_training(found, 16)
    assert cut.config.block_size == 16
    assert cut.state["transformer.wpe.weight"].shape == (16, 32)
    assert found.config.block_size == 64
    assert any("wpe: the first 16 of 64 rows" in note for note in cut.notes)
    small = Weights(GPT2Config(vocab_size=65), {}, "x")
    with pytest.raises(UserError, match="x knows 65 tokens"):
        for_training(small, 16)


def test_a_checkpoint_of_a_run_that_has_diverged_says_so(tmp_path, capsys):
    model = GPT2(n_layer=1, n_head=1, n_embd=8, block_size=8)
    for loss, said in ((float("nan"), 1), (3.0, 0), (None, 0)):
        model_file.save_model(tmp_path / "m.pt", model, step=5, val_loss=loss)
        capsys.readouterr()
        GPT2.from_checkpoint(tmp_path / "m.pt", device="cpu")
        assert capsys.readouterr().err.count("its validation loss is NaN: training has") == said


def test_other_files_of_a_run_say_what_they_are(tmp_path, monkeypatch):
    run = tmp_path / "my run"
    state = run / "state" / "step_00000003"
    state.mkdir(parents=True)
    (state / "train_state.pt").write_bytes(b"x")
    told = f"a saved state, to resume from; use a model of it by `gpt2 average '{run}' --last=1`"
    with pytest.raises(UserError, match=re.escape(told)):
        load(str(state))
    (run / "out_ckpt.pt").write_bytes(b"x")
    monkeypatch.chdir(state)
    with pytest.raises(UserError, match=re.escape(f"use '{run / 'out_ckpt.pt'}', or a model")):
        load(".")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(UserError, match="and Ollama; give the checkpoint"):
        load(str(tmp_path / "model.gguf"))


def test_a_model_of_the_clone_is_named_where_only_a_path_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'is loaded by GPT2\.from_pretrained\("box"\)'):
        GPT2.from_checkpoint("box")
