"""Exported folders as transformers reads them, and their way to a Hub on this machine."""

import json
import os

import pytest
import torch
import transformers

from gpt2 import GPT2
from gpt2.checkpoint.weights import load
from gpt2.cli import main
from gpt2.commands.export import export_hf
from gpt2.data.chat_template import encode_conversation, encode_prompt
from gpt2.errors import UserError
from gpt2.huggingface.model_format import from_hf
from gpt2.tokenizer import gpt2_tokenizer

from ..conftest import ROOT, run_python
from ..fake_hub import Trouble, fake_hub
from ..models import change_json, logits, reference, write_llmc, write_nanogpt

IDX = torch.arange(64).reshape(2, 32) * 700
TEXTS = (
    *("Hello world,", " 1999 wasn't\n\n\tit?  ", "naïve 日本語 🙂 e\u0301\u200d", "", "a" * 300),
    *("don't DON'T we'LL", "\x00\x7f\u00a0\u2028", "x <|endoftext", "def f(x):\n    return x\n"),
)


def a_model(seed=0, **shape) -> GPT2:
    torch.manual_seed(seed)
    model = GPT2(**({"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64} | shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def model():
    return a_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("export")
    model.save(made / "out_ckpt.pt")
    assert main(["export", str(made / "out_ckpt.pt"), "--to=hf", str(made / "hf")]) == 0
    return made / "hf"


def test_transformers_computes_the_same(model, folder):
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info  # nothing missing, unexpected or of another shape
    assert theirs.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(model(IDX), logits(theirs, IDX), atol=1e-4, rtol=0)
    prompt = [15496, 995]
    written = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False,
                              attention_mask=torch.ones(1, 2))  # fmt: skip
    ours = model.generate(prompt, 20, temperature=0)
    assert ours == written[0].tolist()


def test_transformers_makes_the_same_tokens(folder, text):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.model_max_length == 64
    assert theirs.eos_token_id == theirs.bos_token_id == 50256
    for piece in (*TEXTS, text):
        ids = theirs(piece, truncation=False)["input_ids"]
        assert ids == gpt2_tokenizer().encode(piece)
        assert theirs.decode(ids) == piece
    assert theirs("a<|endoftext|>b")["input_ids"] == [64, 50256, 65]


def test_it_comes_back_to_the_bit(model, folder):
    again = GPT2.from_pretrained(folder, device="cpu")
    assert again.config == model.config
    ours = model.state_dict()
    assert all(torch.equal(t, ours[n]) for n, t in again.state_dict().items())


def test_files_say_what_they_are(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        *("README.md", "config.json", "generation_config.json", "merges.txt"),
        *("model.safetensors", "special_tokens_map.json", "tokenizer.json"),
        *("tokenizer_config.json", "vocab.json"),
    ]
    card = (folder / "README.md").read_text("utf-8")
    assert "2 layers, 2 heads, width 32" in card
    assert f"{a_model().num_parameters():,} parameters" in card
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 50256
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(("write", "said"), [(write_nanogpt, "erf"), (write_llmc, None)])
def test_checkpoints_of_others(tmp_path, write, said, capsys):
    theirs = reference()
    path = write(tmp_path / "theirs.bin", theirs)
    assert main(["export", str(path), str(tmp_path / "hf")]) == 0
    assert said is None or said in capsys.readouterr().out
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(again, IDX), logits(theirs, IDX), atol=1e-5, rtol=0)


def test_step_and_loss_are_in_the_card(tmp_path):
    export_hf(load(write_nanogpt(tmp_path / "ckpt.pt", reference())), tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text("utf-8")
    assert "trained for 2,000 steps; last measured validation loss 3.2500 nats per token." in card


def test_another_vocabulary_has_no_tokenizer(tmp_path):
    export_hf(load(write_nanogpt(tmp_path / "ckpt.pt", reference(vocab_size=65))), tmp_path / "hf")
    assert not list((tmp_path / "hf").glob("*token*"))
    assert "without a tokenizer" in (tmp_path / "hf/README.md").read_text("utf-8")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert again.config.eos_token_id is None


def test_only_new_and_empty_folders_are_written(model, tmp_path, capsys):
    model.save(tmp_path / "m.pt")
    source = str(tmp_path / "m.pt")
    (tmp_path / "empty").mkdir()
    assert main(["export", source, str(tmp_path / "empty")]) == 0
    before = (tmp_path / "empty/README.md").read_bytes()
    for target in (tmp_path / "empty", tmp_path / "m.pt"):
        assert main(["export", source, str(target)]) == 2
        assert "is there already; name a new folder" in capsys.readouterr().err
    assert main(["export", source, str(tmp_path / "m.pt/x")]) == 2
    assert "not written" in capsys.readouterr().err
    assert (tmp_path / "empty/README.md").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "m.pt"]


def test_tensors_that_do_not_fit_leave_nothing(tmp_path):
    theirs = reference(vocab_size=1000)
    theirs.save_pretrained(tmp_path / "theirs")
    change_json(tmp_path / "theirs/config.json", n_layer=3)
    with pytest.raises(UserError, match="does not fit the model"):
        export_hf(load(tmp_path / "theirs"), tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


# Runs commands in one process; prints the exit code of each. "HF_TOKEN" sets it for the next ones.
COMMANDS = """
import json, os, sys
from gpt2.cli import main
codes = []
for argv in json.loads(sys.argv[1]):
    if argv[0] == "HF_TOKEN":
        os.environ["HF_TOKEN"] = argv[1]
    else:
        codes.append(main(argv))
print(codes)
"""


def run_commands(hub, tmp_path, *commands, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(tmp_path / "home")}
    env |= {"HF_TOKEN": "secret", **environment}
    done = run_python("-c", COMMANDS, json.dumps(commands), cwd=tmp_path, env=env)
    codes = json.loads(done.stdout.splitlines()[-1])
    errors = [line for line in done.stderr.splitlines() if line.startswith("gpt2: error")]
    assert len(errors) == codes.count(2)
    assert "Traceback" not in done.stderr
    return codes, errors, done.stdout


@pytest.fixture
def hub():
    with fake_hub({}) as hub:
        hub.token = "secret"
        yield hub


@pytest.mark.slow
def test_push_and_back(hub, model, tmp_path):
    model.save(tmp_path / "out_ckpt.pt")
    codes, _, out = run_commands(
        hub, tmp_path,
        ["push", "out_ckpt.pt", "me/first", "--private"],
        ["export", "out_ckpt.pt", "hf"],
        ["push", "hf", "me/second"],
        ["export", "me/first", "back"],
    )  # fmt: skip
    assert codes == [0, 0, 0, 0]
    assert f"{hub.url}/me/first" in out
    assert (sorted(hub.models), hub.private) == (["me/first", "me/second"], ["me/first"])
    first, second = hub.models["me/first"], hub.models["me/second"]
    assert sorted(first) == sorted(p.name for p in (tmp_path / "hf").iterdir())
    assert {n for n in first if first[n] != second[n]} == {"README.md"}  # its title
    back = tmp_path / "back/model.safetensors"
    assert back.read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_an_edited_card_is_pushed_and_other_files_are_not(hub, model, tmp_path):
    model.save(tmp_path / "m.pt")
    export_hf(load(tmp_path / "m.pt"), tmp_path / "hf")
    (tmp_path / "hf/README.md").write_text("my words")
    (tmp_path / "hf/secret.txt").write_text("not for you")
    codes, _, _ = run_commands(hub, tmp_path, ["push", "hf", "me/m"], ["push", "hf", "me/m"])
    assert codes == [0, 0]
    assert hub.models["me/m"]["README.md"] == b"my words"
    assert "secret.txt" not in hub.models["me/m"]


def test_push_that_cannot_be_is_one_line(hub, model, tmp_path, capsys):
    model.save(tmp_path / "m.pt")
    push = ["push", "m.pt", "me/m"]
    hub.trouble = {"/api/repos/create": [Trouble(status=500)]}
    _, errors, _ = run_commands(
        hub, tmp_path,
        push,
        ["push", "m.pt", "m"],
        ["push", "no.pt", "me/m"],
        ["HF_TOKEN", "wrong"],
        push,
        ["HF_TOKEN", ""],
        push,
    )  # fmt: skip
    assert len(errors) == 5
    assert "me/m not uploaded" in errors[0]
    assert errors[0].endswith("the same command tries again")
    assert "'m': name the repository as OWNER/NAME" in errors[1]
    assert "no.pt: no such checkpoint" in errors[2]
    assert "Invalid credentials" in errors[3]
    assert errors[3].endswith("use a token that may write there")
    assert "not logged in to the Hub: set HF_TOKEN" in errors[4]
    assert not hub.models
    assert main(push) == 2  # in this process: see conftest.py
    assert "HF_HUB_OFFLINE is set; unset it" in capsys.readouterr().err


@pytest.mark.slow
def test_push_without_a_connection(hub, model, tmp_path):
    model.save(tmp_path / "m.pt")
    closed = "http://127.0.0.1:9"
    _, (error,), _ = run_commands(hub, tmp_path, ["push", "m.pt", "me/m"], HF_ENDPOINT=closed)
    assert "me/m not uploaded" in error
    assert error.endswith("the same command tries again")


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_cast_weights_are_read_back_by_both(model, tmp_path, name):
    model.save(tmp_path / "m.pt")
    folder, dtype = tmp_path / "hf", getattr(torch, name)
    assert main(["export", str(tmp_path / "m.pt"), str(folder), f"--dtype={name}"]) == 0
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == name
    ours = GPT2.from_pretrained(folder, device="cpu").state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert theirs.dtype == dtype
    theirs = from_hf(theirs.state_dict())
    for key, tensor in model.state_dict().items():
        cast = tensor.to(dtype)
        assert not torch.equal(cast.float(), tensor) or tensor.dim() == 1, key
        assert torch.equal(ours[key], cast.float())
        assert torch.equal(theirs[key], cast)
    size = (folder / "model.safetensors").stat().st_size
    assert size == pytest.approx(2 * model.num_parameters(), rel=0.01)


def test_a_weight_beyond_float16_is_one_line(tmp_path, capsys):
    model = a_model(vocab_size=20)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = 1e5
    model.save(tmp_path / "m.pt")
    command = ["export", str(tmp_path / "m.pt"), str(tmp_path / "hf")]
    assert main([*command, "--dtype=float16"]) == 2
    assert "has numbers up to 1e+05, and float16 ends at 6.55e+04; use" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert main([*command, "--dtype=bfloat16"]) == 0


def test_a_chat_model_brings_its_template(model, tmp_path):
    model.save(tmp_path / "out_ckpt.pt")
    (tmp_path / "config.toml").write_text('data_dir = "chats.jsonl"\n')
    assert main(["export", str(tmp_path / "out_ckpt.pt"), str(tmp_path / "hf")]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?\n\nSay it in Ünïcödé 🙂."},
        {"role": "assistant", "content": "A small model."},
        {"role": "user", "content": "1999?"},
    ]
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert asked["input_ids"] == encode_prompt(messages)
    whole = theirs.apply_chat_template(messages[:3], return_dict=True)["input_ids"]
    assert whole == encode_conversation(messages[:3])[0]
    card = (tmp_path / "hf/README.md").read_text("utf-8")
    code = card.partition("```python\n")[2].partition("```")[0]
    done = run_python("-c", code, cwd=tmp_path / "hf")
    assert done.returncode == 0, done.stderr


def test_other_models_have_no_chat_template(folder):
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template is None
