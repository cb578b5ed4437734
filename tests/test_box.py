"""The models that come with a clone, `box` and `box-chat`: whole, small, and known by their names.

Every command runs offline in an empty folder, by name.
"""

import json
import re
import shlex
import socket
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from gpt2 import GPT2
from gpt2.checkpoint import weights
from gpt2.cli import COMMANDS, main
from gpt2.commands.terminal import Chat
from gpt2.config import commands
from gpt2.config.command_line import parse, read_toml
from gpt2.config.commands import ChatConfig
from gpt2.config.finetune import FinetuneConfig
from gpt2.config.options import flatten
from gpt2.config.train import TrainConfig
from gpt2.errors import UserError
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer

from .conftest import ROOT

MODELS = ROOT / "models"
OPTIONS = {
    "prepare": commands.PrepareConfig, "train": TrainConfig, "average": commands.AverageConfig,
    "eval": commands.EvalConfig, "export": commands.ExportConfig, "finetune": FinetuneConfig,
    "sample": commands.SampleConfig, "inspect": commands.InspectConfig,
    "chat": commands.ChatConfig, "serve": commands.ServeConfig,
}  # fmt: skip
# Lewis Carroll, Alice's Adventures in Wonderland (1865), its beginning.
ALICE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having "
    "nothing to do: once or twice she had peeped into the book her sister was reading, but it had "
    'no pictures or conversations in it, "and what is the use of a book," thought Alice "without '
    'pictures or conversations?"\n\nSo she was considering in her own mind (as well as she could, '
    "for the hot day made her feel very sleepy and stupid), whether the pleasure of making a "
    "daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a "
    "White Rabbit with pink eyes ran close by her."
)


@pytest.fixture(scope="module")
def box() -> GPT2:
    return GPT2.from_pretrained("box", device="cpu")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty current folder, and no network."""

    def refuse(*_):
        raise AssertionError("asked for the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


def loss(model: GPT2, text: str) -> float:
    """Nats per token of a text that begins a document."""
    ids = torch.tensor([[END_OF_TEXT, *gpt2_tokenizer().encode(text)]])
    with torch.no_grad():
        return F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).item()


def test_it_has_learned(box):
    """A paragraph of a book that it may have read; any other loss means other weights or code."""
    assert loss(box, ALICE) < 4.5
    assert loss(box, ALICE) == pytest.approx(3.6538, abs=0.005)  # fresh weights: 10.9


def test_files_are_small_and_plain():
    sizes = {p.relative_to(MODELS): p.stat().st_size for p in MODELS.rglob("*") if p.is_file()}
    assert sum(size for path, size in sizes.items() if path.parts[0] == "box") < 40e6
    assert sum(sizes.values()) < 41e6
    state = load_file(MODELS / "box/model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in state  # tied
    assert "safetensors" not in (ROOT / ".gitattributes").read_text("utf-8")  # no Git LFS


def test_it_is_the_network_of_its_recipe(box):
    recipe = parse(TrainConfig, [f"--config={ROOT / 'configs/box.toml'}"], "x")
    assert recipe.model.shape() == box.config
    assert box.num_parameters() == 19_446_528


def test_settings_of_the_files_agree():
    settings = json.loads((MODELS / "box/config.json").read_text("utf-8"))
    assert settings["torch_dtype"] == "bfloat16"
    adapters = json.loads((MODELS / "box-chat/adapter_config.json").read_text("utf-8"))
    assert adapters["base_model_name_or_path"] == "box"
    run = read_toml(MODELS / "box-chat/config.toml")
    assert (run["init"], run["lora_rank"]) == ("box", adapters["r"])


def test_transformers_computes_the_same(box):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODELS / "box", dtype=torch.float32)
    ids = torch.tensor([gpt2_tokenizer().encode(ALICE)[:32]])
    with torch.no_grad():
        torch.testing.assert_close(box(ids), theirs(ids).logits, atol=1e-3, rtol=1e-4)
        peft = pytest.importorskip("peft")
        chat = peft.PeftModel.from_pretrained(theirs, MODELS / "box-chat").eval()
        ours = GPT2.from_pretrained("box-chat", device="cpu")
        torch.testing.assert_close(ours(ids), chat(ids).logits, atol=1e-3, rtol=1e-4)
        assert (ours(ids) - box(ids)).abs().max() > 0.5  # the adapters do something


# ---- names --------------------------------------------------------------------------------------


def test_a_path_of_that_name_comes_first(elsewhere):
    GPT2(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=20).save(elsewhere / "m.pt")
    assert main(["export", "m.pt", "box"]) == 0
    assert weights.load("box").config.n_embd == 8
    assert weights.load("box-chat").config.n_embd == 256  # its base is the one beside it


def test_a_path_object_is_no_name_and_there_are_no_revisions(elsewhere):
    with pytest.raises(UserError, match="box: no such checkpoint"):
        weights.load(Path("box"))
    with pytest.raises(UserError, match="box comes with the clone; leave revision=abc out"):
        GPT2.from_pretrained("box", revision="abc")


def test_without_a_clone_it_is_one_line(elsewhere, monkeypatch, capsys):
    """As in a wheel, beside which another project may have a folder of this name."""
    monkeypatch.setattr(weights, "__file__", str(elsewhere / "gpt2/checkpoint/weights.py"))
    (elsewhere / "models/box").mkdir(parents=True)
    for name in ("box", "box-chat"):
        assert main(["sample", name, "--prompt=Hello"]) == 2
        said = capsys.readouterr().err
        assert said == (
            f"gpt2: error: {name} is not part of the installed package: clone the repository and "
            f"give the folder models/{name} of the clone, or run `pip install -e .` in it\n"
        )


# ---- commands -----------------------------------------------------------------------------------


def test_sample(elsewhere, capsys):
    argv = ["sample", "box", "--prompt=The river", "--max_new_tokens=4", "--temperature=0"]
    assert main(argv) == 0
    assert len(capsys.readouterr().out.strip()) > len("The river")


def test_inspect(elsewhere, capsys):
    assert main(["inspect", "box", "The river rises", "--device=cpu"]) == 0
    assert "rises" in capsys.readouterr().out
    assert (elsewhere / "inspect.html").exists()


def test_eval(elsewhere, box):
    (elsewhere / "alice.txt").write_text(ALICE, encoding="utf-8")
    argv = ["eval", "box", "--text=alice.txt", "--json=x.json", "--device=cpu", "--dtype=float32"]
    assert main(argv) == 0
    found = json.loads((elsewhere / "x.json").read_text())
    assert found["text_loss"] == pytest.approx(loss(box, ALICE), abs=0.1)
    assert found["parameters"] == 19_446_528


def test_chat(elsewhere, monkeypatch, capsys):
    lines = iter(["What is the capital of France?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", "box-chat", "--max_new_tokens=8", "--temperature=0", "--device=cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()[-1]) > 3


def test_an_answer_ends_by_itself():
    """The base never learned to end an answer; the adapters did."""
    talk = Chat(
        GPT2.from_pretrained("box-chat", device="cpu"), ChatConfig(max_new_tokens=60, temperature=0)
    )
    answer = "".join(talk.answer("What is the opposite of hot?"))
    assert 0 < len(gpt2_tokenizer().encode(answer)) < 60


def test_serve_knows_which_of_them_was_taught_to_answer(elsewhere):
    pytest.importorskip("fastapi")
    from gpt2.serve import server

    options = commands.ServeConfig(device="cpu")
    for name, kind in (("box", "untrained"), ("box-chat", "trained")):
        model = server._load(name, options)
        served = server.describe(name, options, model)
        assert (served.name, served.chat, served.block_size) == (name, kind, 1024)


def test_commands_of_the_page_have_options_of_their_commands():
    text = (MODELS / "README.md").read_text("utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    found = [line for line in blocks.splitlines() if line.startswith("gpt2 ")]
    assert {line.split()[1] for line in found} >= {"prepare", "train", "average", "export"}
    for line in found:
        _, command, *words = shlex.split(line)
        names = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        assert command in COMMANDS
        known = flatten(OPTIONS[command]()) if command in OPTIONS else ()
        assert names <= {*known, "config", "data"}, line


def test_models_are_no_part_of_a_wheel():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["packages"] == ["gpt2"]
    assert "/models" in build["targets"]["sdist"]["exclude"]
