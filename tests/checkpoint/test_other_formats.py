"""Checkpoints of nanoGPT, build-nanogpt and llm.c, against transformers with the same weights."""

import os

import pytest
import torch

from gpt2 import GPT2
from gpt2.checkpoint import model_file
from gpt2.errors import UserError

from ..models import (
    linear_state,
    logits,
    reference,
    write_build_nanogpt,
    write_llmc,
    write_nanogpt,
)

IDX = torch.arange(64).reshape(2, 32) * 700


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module._orig_mod."])
def test_nanogpt_with_any_prefix(tmp_path, prefix, capsys):
    hf = reference(vocab_size=50304)
    model = GPT2.from_checkpoint(write_nanogpt(tmp_path / "ckpt.pt", hf, prefix), "cpu")
    assert model.config.vocab_size == 50257
    torch.testing.assert_close(model(IDX), logits(hf, IDX)[..., :50257], atol=1e-5, rtol=0)
    err = capsys.readouterr().err
    assert "47 rows that pad the vocabulary" in err
    assert "erf" in err


def test_nanogpt_without_biases_has_zeros(tmp_path, capsys):
    hf = reference(bias=False)
    model = GPT2.from_checkpoint(write_nanogpt(tmp_path / "ckpt.pt", hf, bias=False), "cpu")
    torch.testing.assert_close(model(IDX), logits(hf, IDX), atol=1e-5, rtol=0)
    assert "it has no biases" in capsys.readouterr().err


def test_nanogpt_computes_another_gelu(tmp_path):
    """What the note says: with nanoGPT's own GELU, by erf, logits differ a little, and do."""
    hf = reference(activation="gelu")
    model = GPT2.from_checkpoint(write_nanogpt(tmp_path / "ckpt.pt", hf), "cpu")
    difference = (model(IDX) - logits(hf, IDX)).abs().max()
    assert 1e-5 < difference < 5e-3


def test_nanogpt_of_characters(tmp_path):
    hf = reference(vocab_size=65)
    model = GPT2.from_checkpoint(write_nanogpt(tmp_path / "ckpt.pt", hf), "cpu")
    assert model.config.vocab_size == 65
    with pytest.raises(UserError, match="knows 65 tokens, text and shards are GPT-2's 50,257"):
        model.generate("Hello")
    with pytest.raises(UserError, match="token ids must be from 0 to 64"):
        model.generate([65])
    assert len(model.generate([1, 2], 5, temperature=0)) == 7


def test_added_tokens_are_no_text(tmp_path):
    """Rows behind GPT-2's, as others add them, can be the likeliest; they write nothing."""
    hf = reference(vocab_size=50300)
    with torch.no_grad():
        hf.transformer.wte.weight[50257:] *= 9
    hf.save_pretrained(tmp_path)
    model = GPT2.from_checkpoint(tmp_path, "cpu")
    assert max(model.generate([15496], 9, temperature=0)) > 50256
    assert model.generate("Hello", 9, temperature=0).startswith("Hello")


def test_what_is_known_of_a_run_comes_along(tmp_path):
    _, _, rest = model_file.load_model(write_nanogpt(tmp_path / "a.pt", reference(seed=1)))
    assert (rest["step"], rest["val_loss"], rest["origin"]) == (2000, 3.25, "nanoGPT")
    _, _, rest = model_file.load_model(write_build_nanogpt(tmp_path / "b.pt", reference(seed=1)))
    assert (rest["step"], rest["val_loss"], rest["origin"]) == (250, 6.5, "build-nanogpt")


@pytest.mark.parametrize("module", ["__main__", "train_gpt2_elsewhere"])
def test_build_nanogpt(tmp_path, module):
    hf = reference(vocab_size=50304)
    path = write_build_nanogpt(tmp_path / "model_00250.pt", hf, module)
    model = GPT2.from_checkpoint(path, "cpu")
    torch.testing.assert_close(model(IDX), logits(hf, IDX)[..., :50257], atol=1e-5, rtol=0)


def test_other_classes_are_refused(tmp_path):
    path = write_build_nanogpt(tmp_path / "x.pt", reference(), name="Settings")
    with pytest.raises(UserError, match="refused"):
        model_file.load_model(path)


class GPTConfig:
    """Of the right name, with code in it."""

    def __reduce__(self):
        return (os.system, ("touch canary",))


def test_code_under_the_name_of_the_class_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "config": GPTConfig()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="refused"):
        model_file.load_model(tmp_path / "x.pt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(("version", "tolerance"), [(3, 1e-5), (5, 0.05)])
def test_llmc(tmp_path, version, tolerance):
    hf = reference()
    model = GPT2.from_checkpoint(write_llmc(tmp_path / "m.bin", hf, version), "cpu")
    torch.testing.assert_close(model(IDX), logits(hf, IDX), atol=tolerance, rtol=0)
    if version == 5:  # the weights themselves are bf16's, to the bit
        for name, tensor in linear_state(hf).items():
            if name != "lm_head.weight":
                assert torch.equal(model.state_dict()[name], tensor.bfloat16().float()), name


@pytest.mark.parametrize("cut", [1, 4, 2000, 10**6])
def test_llmc_cut_short_or_too_long(tmp_path, cut):
    path = write_llmc(tmp_path / "m.bin", reference())
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    with pytest.raises(UserError, match=r"damaged, .* bytes instead of"):
        model_file.load_model(path)
    path.write_bytes(data + b"more")
    with pytest.raises(UserError, match="damaged"):
        model_file.load_model(path)
    path.write_bytes(data[:500])
    with pytest.raises(UserError, match="cut off inside its header"):
        model_file.load_model(path)


def test_llmc_of_another_version(tmp_path):
    path = write_llmc(tmp_path / "m.bin", reference(), version=3)
    data = bytearray(path.read_bytes())
    data[4] = 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="version 1; versions 3 and 5"):
        model_file.load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model_args"].pop("n_head"), "does not say its"),
        (lambda c: c["model_args"].update(n_head=[2]), "sizes are not numbers"),
        (lambda c: c["model_args"].update(n_layer=3), "does not fit the model: missing"),
        (lambda c: c["model"]["lm_head.weight"].add_(1), "a GPT-2 has one table for both"),
        (lambda c: c.pop("model"), "not a table of tensors"),
    ],
)
def test_damaged_nanogpt(tmp_path, change, message):
    path = write_nanogpt(tmp_path / "ckpt.pt", reference())
    content = torch.load(path, weights_only=True)
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"].clone()
    change(content)
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        GPT2.from_checkpoint(path, "cpu")
