"""Folders that transformers wrote, and settings that are not GPT-2's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import GPT2
from gpt2.config.model import GPT2Config
from gpt2.errors import UserError
from gpt2.huggingface import model_format

from ..models import change_json, logits, reference

IDX = torch.arange(64).reshape(2, 32) * 15


@pytest.fixture(scope="module")
def theirs():
    return reference(vocab_size=1000)


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def agrees(folder, theirs) -> bool:
    model = GPT2.from_pretrained(folder, device="cpu")
    return torch.allclose(model(IDX), logits(theirs, IDX), atol=1e-4, rtol=0)


def test_logits_of_a_folder(folder, theirs):
    assert agrees(folder, theirs)
    assert torch.equal(
        GPT2.from_checkpoint(folder, "cpu")(IDX), GPT2.from_pretrained(folder, device="cpu")(IDX)
    )


def test_sharded_folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert agrees(tmp_path, theirs)
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        GPT2.from_pretrained(tmp_path)


def test_names_without_prefix_masks_and_the_head(folder, theirs):
    """As in the files that OpenAI's weights were published in."""
    path = folder / "model.safetensors"
    state = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, path)
    assert agrees(folder, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(folder, dtype):
    path = folder / "model.safetensors"
    half = {n: t.to(dtype) for n, t in load_file(path).items()}
    save_file(half, path)
    model = GPT2.from_pretrained(folder, device="cpu")
    assert torch.equal(model.transformer.wte.weight, half["transformer.wte.weight"].float())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", "yes"),
        ("scale_attn_weights", False),
        ("reorder_and_upcast_attn", 2),
        ("add_cross_attention", True),
        ("n_inner", 100),
        ("layer_norm_epsilon", 1e-6),
        ("quantization_config", {"bits": 4}),
        ("model_type", "llama"),
    ],
)
def test_another_network_is_refused_by_name(folder, field, value):
    change_json(folder / "config.json", **{field: value})
    with pytest.raises(UserError, match=field):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("fields", [{"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 128}])
def test_other_words_for_the_same(folder, theirs, fields):
    change_json(folder / "config.json", **fields)
    assert agrees(folder, theirs)


def test_untied_head(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file(state | {"lm_head.weight": state["transformer.wte.weight"] * 2}, path)
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        GPT2.from_pretrained(folder)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle and is not read"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "is not JSON"),
        ("config.json", b"[]", "not a JSON object"),
        ("model.safetensors", b"\x10", "missing or damaged"),
        ("config.json", b'{"model_type": "gpt2", "n_layer": 2}', "does not fit the model"),
        ("config.json", b'{"model_type": "gpt2", "n_layer": "two"}', "whole number"),
    ],
)
def test_damaged_folders(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        GPT2.from_pretrained(folder)


def test_index_cannot_point_out_of_the_folder(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": "../other.safetensors"}}
    (folder / model_format.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a table of files beside it"):
        GPT2.from_pretrained(folder)


def test_config_round_trip():
    config = GPT2Config(n_layer=3, n_head=4, n_embd=64, block_size=77, vocab_size=99, dropout=0.25)
    assert model_format.config_from_hf(model_format.config_to_hf(config), "x") == config


def test_dropout_only_where_all_agree():
    base = model_format.config_to_hf(GPT2Config(dropout=0.1))
    assert model_format.config_from_hf(base | {"attn_pdrop": 0.2}, "x").dropout == 0
