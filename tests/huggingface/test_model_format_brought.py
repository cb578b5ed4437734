"""Folders as people bring them: other names, old configs, settings that compute equal functions."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel

from gpt2 import GPT2, cli
from gpt2.checkpoint import weights
from gpt2.errors import UserError

IDS = torch.arange(12).reshape(2, 6)
# The other attention of transformers 5.0 ignores scale_attn_by_inverse_layer_idx.
EAGER = {"attn_implementation": "eager"}


def brought(path, change=None, **settings):
    """(folder, logits of transformers); `change` alters the folder behind its back."""
    torch.manual_seed(1)
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 30}
    theirs = GPT2LMHeadModel(TheirConfig(**shape, **settings, **EAGER)).eval()
    for parameter in theirs.parameters():  # at the start scores are too small to be seen
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(path)
    if change:
        change(path, theirs)
    with torch.no_grad():
        return path, theirs(IDS).logits


def logits(source):
    with torch.no_grad():
        return GPT2.from_pretrained(source, device="cpu")(IDS)


def head_alone(path, theirs):
    (path / "model.safetensors").unlink()
    save_model(theirs, str(path / "model.safetensors"))
    assert "transformer.wte.weight" not in load_file(path / "model.safetensors")


def prefixes(path, theirs):
    tensors = load_file(path / "model.safetensors")
    save_file({f"_orig_mod.module.{n}": t for n, t in tensors.items()}, path / "model.safetensors")


def of_2019(path, theirs):
    config = json.loads((path / "config.json").read_text())
    kept = {n: config[n] for n in ("n_layer", "n_head", "n_embd", "vocab_size")}
    (path / "config.json").write_text(json.dumps(kept | {"n_ctx": 16, "layer_norm_epsilon": 1e-5}))


EQUAL = {
    "the head alone": (head_alone, {}),
    "prefixes": (prefixes, {}),
    "a config of 2019": (of_2019, {}),
    "reordered": (None, {"reorder_and_upcast_attn": True}),
    "scores divided by the layer": (None, {"scale_attn_by_inverse_layer_idx": True}),
    "both": (None, {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    **{name: (None, {"activation_function": name}) for name in ("gelu_fast", "gelu_accurate")},
    "gelu_python_tanh": (None, {"activation_function": "gelu_python_tanh"}),
}


@pytest.mark.parametrize("name", EQUAL)
def test_logits_equal_transformers(name, tmp_path):
    change, settings = EQUAL[name]
    folder, expected = brought(tmp_path / "m", change, **settings)
    torch.testing.assert_close(logits(folder), expected, atol=2e-5, rtol=1e-5)
    assert cli.main(["export", str(folder), str(tmp_path / "hf")]) == 0
    with torch.no_grad():
        again = GPT2LMHeadModel.from_pretrained(tmp_path / "hf", **EAGER)(IDS).logits
    torch.testing.assert_close(again, expected, atol=2e-5, rtol=1e-5)


def test_the_divided_scores_are_seen(tmp_path):
    """Without the division the logits are others, so that the test above can fail."""
    folder, expected = brought(tmp_path / "m", scale_attn_by_inverse_layer_idx=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"scale_attn_by_inverse_layer_idx": False})
    )
    assert (logits(folder) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gelu", "gelu_python"])
def test_the_exact_gelu_is_taken_with_a_note(name, tmp_path):
    folder, expected = brought(tmp_path / "m", activation_function=name)
    assert "erf" in weights.load(folder).notes[0]
    difference = (logits(folder) - expected).abs().max()
    assert 1e-6 < difference < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 32}, "n_positions=16, max_position_embeddings=32 are names"),
        ({"num_hidden_layers": 4}, "n_layer=3, num_hidden_layers=4 are names of one size"),
        ({"n_ctx": 8}, "n_positions=16, n_ctx=8 are names of one size"),
        ({"activation_function": "relu"}, "has no activation_function='relu'"),
        ({"reorder_and_upcast_attn": "yes"}, "has no reorder_and_upcast_attn='yes'"),
        ({"model_type": "gpt_neo"}, "model_type 'gpt_neo' is not gpt2"),
    ],
)
def test_what_is_not_equal_is_refused(changes, message, tmp_path):
    folder, _ = brought(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        weights.load(folder)


def test_a_checkpoint_that_holds_the_head_alone(tmp_path):
    model = GPT2(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=30)
    model.save(tmp_path / "m.pt")
    content = torch.load(tmp_path / "m.pt")
    content["model"]["lm_head.weight"] = content["model"].pop("transformer.wte.weight")
    del content["format"]
    torch.save(content, tmp_path / "m.pt")
    again = GPT2.from_checkpoint(tmp_path / "m.pt", "cpu")
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)


def test_the_file_that_is_meant_is_found(tmp_path):
    folder, expected = brought(tmp_path / "m")
    assert torch.equal(logits(folder / "model.safetensors"), logits(folder))
    (tmp_path / "run").mkdir()
    GPT2.from_pretrained(folder, device="cpu").save(tmp_path / "run/out_ckpt.pt")
    torch.testing.assert_close(logits(tmp_path / "run"), expected, atol=2e-5, rtol=1e-5)


def test_bare_names_of_the_hub(monkeypatch):
    asked = []

    def download(repository, *_, **__):
        asked.append(repository)
        raise UserError("no connection")

    monkeypatch.setattr(weights, "download", download)
    for name in ("distilgpt2", "gpt2-xl"):
        with pytest.raises(UserError, match="no connection"):
            weights.load(name)
    assert asked == ["distilbert/distilgpt2", "openai-community/gpt2-xl"]
    with pytest.raises(UserError, match="models of the Hub are named OWNER/NAME"):
        weights.load("my-model")
