"""A folder of LoRA adapters is a model wherever one is read, if its base is known."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import GPT2
from gpt2.checkpoint import model_file, weights
from gpt2.config.finetune import TuningOptions
from gpt2.errors import UserError
from gpt2.model.lora import adapt, merged_state, to_peft

from ..models import change_json

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 50}
IDX = torch.arange(8)[None]


@pytest.fixture
def tuned(tmp_path):
    """(folder of adapters, the tuned model); the base lies beside the folder."""
    torch.manual_seed(0)
    model = GPT2(**SHAPE).eval()
    model.save(tmp_path / "base.pt")
    adapt(model, TuningOptions(lora_rank=3, lora_alpha=24.0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.1)
    model_file.write_adapter(tmp_path / "adapter", *to_peft(model, str(tmp_path / "base.pt")))
    return tmp_path / "adapter", model


def refused(folder, message: str):
    with pytest.raises(UserError, match=message) as caught:
        weights.load(str(folder))
    assert "\n" not in str(caught.value)


def test_merged_weights_are_those_of_the_run(tuned):
    folder, model = tuned
    found = weights.load(str(folder))
    whole = merged_state(model)
    assert found.state.keys() == whole.keys()
    assert all(torch.equal(found.state[n], t) for n, t in whole.items())
    assert "adapter (adapters on" in found.origin
    again = GPT2.from_checkpoint(folder, "cpu")
    torch.testing.assert_close(again(IDX), model(IDX), atol=1e-5, rtol=1e-4)


def test_adapters_of_some_layers(tuned):
    folder, _ = tuned
    path = folder / "adapter_model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if ".h.1.mlp.c_fc." in n}
    assert len(kept) == 2
    save_file(kept, path)
    base, found = model_file.load_model(folder.parent / "base.pt")[1], weights.load_local(folder)
    changed = {n for n, t in found.state.items() if not torch.equal(t, base[n])}
    assert changed == {"transformer.h.1.mlp.c_fc.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only plain LoRA is read, which has no peft_type='IA3'"),
        ({"use_dora": True}, "no use_dora=True"),
        ({"use_rslora": True}, "no use_rslora=True"),
        ({"rank_pattern": {"c_fc": 2}}, "no rank_pattern="),
        ({"bias": "all"}, "no bias='all'"),
        ({"init_lora_weights": "pissa"}, "no init_lora_weights='pissa'"),
        ({"r": 0}, "r is 0, and must be from 1"),
        ({"r": 4}, r"is \(3, 16\) instead of \(4, 16\)"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', and must be a number above 0"),
        ({"base_model_name_or_path": None}, "does not name its base"),
        (
            {"base_model_name_or_path": "gone.pt"},
            "its base is gone.pt: gone.pt: no such checkpoint",
        ),
        ({"base_model_name_or_path": "é" * 300}, "its base is é"),
        ({"base_model_name_or_path": "a\0b"}, "its base is a"),
        ({"base_model_name_or_path": "//far/away/x"}, "lies on another machine"),
        ({"base_model_name_or_path": "box-chat"}, "holds adapters as well"),
    ],
)
def test_what_is_not_plain_lora_on_a_known_base_is_one_line(tuned, change, message):
    folder, _ = tuned
    change_json(folder / "adapter_config.json", **change)
    refused(folder, message)


def test_a_base_that_is_the_folder_itself(tuned):
    folder, _ = tuned
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(folder))
    refused(folder, "holds adapters as well, not whole weights")


def test_adapters_that_do_not_fit(tuned):
    folder, _ = tuned
    path = folder / "adapter_model.safetensors"
    # Copies: safetensors 0.5 maps the file, which is written again below.
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    name = next(n for n in tensors if "lora_B" in n)
    for changed, message in (
        ({}, "holds no adapters"),
        ({n: t for n, t in tensors.items() if n != name}, "missing transformer.h.0"),
        (tensors | {"base_model.model.transformer.wte.lora_A.weight": torch.ones(3)}, "unexpected"),
        (tensors | {name: torch.full_like(tensors[name], torch.inf)}, "NaN or infinity in"),
        (tensors | {name: tensors[name].int()}, "holds whole numbers"),
    ):
        save_file(changed, path)
        refused(folder, message)
    path.unlink()
    refused(folder, "missing or damaged")


def test_settings_as_peft_writes_them_are_read(tuned):
    """peft writes more fields than we do; all of them at their defaults are read."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    folder, _ = tuned
    ours = json.loads((folder / "adapter_config.json").read_text())
    config = peft.LoraConfig.from_pretrained(folder)
    config.save_pretrained(folder)
    theirs = json.loads((folder / "adapter_config.json").read_text())
    assert set(theirs) > set(ours)
    assert weights.load(str(folder)).state.keys()


def test_adapters_know_their_base_again(tuned):
    """A base that was trained further, in silence, is another; one that was rounded is not."""
    folder, model = tuned
    whole, base = merged_state(model), folder.parent / "base.pt"
    config, state, _ = model_file.load_model(base)
    rounded = {name: t.bfloat16().float() for name, t in state.items()}
    model_file.write_model(base, config, rounded, 0, None)
    for name, tensor in weights.load(str(folder)).state.items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-3, rtol=1e-2)
    halves = {name: t.half().float() for name, t in state.items()}
    model_file.write_model(base, config, halves, 0, None)
    assert weights.load(str(folder)).state
    for change in (2e-3, 3e-5):  # a step or so at the usual learning rates
        further = {name: t + change * torch.randn_like(t) for name, t in state.items()}
        model_file.write_model(base, config, further, 0, None)
        refused(folder, r"adapter: these adapters were trained on other weights than .*base.pt has")


@pytest.mark.parametrize("sample", ["x", "[]", "[1, null]", "[[1]]", "9" * 5000, "{}", "[" * 5000])
def test_a_damaged_sample_is_of_no_base(tuned, sample):
    folder, _ = tuned
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "base_sample": sample})
    refused(folder, "were trained on other weights")


def test_adapters_without_a_sample_are_read(tuned):
    """Those of `peft`, and of earlier versions."""
    folder, _ = tuned
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    assert weights.load(str(folder)).state
