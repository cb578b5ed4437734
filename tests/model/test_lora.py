"""LoRA: begins as the given network, trains adapters alone, equals peft and its own merged form."""

import json

import pytest
import torch

from gpt2.api import GPT2
from gpt2.checkpoint import model_file, training_state
from gpt2.cli import main
from gpt2.config.command_line import parse
from gpt2.config.finetune import FinetuneConfig, TuningOptions
from gpt2.config.train import OptimOptions
from gpt2.errors import UserError
from gpt2.model.lora import adapt, is_adapted, merged_state, to_peft
from gpt2.train.optimizer import build_optimizer

from ..data.test_conversations import base, chats, finetune  # noqa: F401 - two fixtures
from ..models import reference

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 100}
IDX = torch.arange(40).view(2, 20)


def adapted(rank=4, trained=True, **given) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(**SHAPE)
    adapt(model, TuningOptions(lora_rank=rank, **given))
    if trained:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_B"):
                    p.normal_(0, 0.1)
    return model.eval()


def test_training_begins_with_the_given_network():
    model = adapted(trained=False)
    torch.manual_seed(0)
    torch.testing.assert_close(model(IDX), GPT2(**SHAPE).eval()(IDX))


def test_only_adapters_are_in_the_optimizer():
    model = adapted()
    adapters = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    groups = build_optimizer(model, OptimOptions()).param_groups
    assert {id(p) for group in groups for p in group["params"]} == adapters
    per_block = 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * per_block


def test_targets_choose_the_matrices():
    names = [n for n, _ in adapted(lora_targets="c_attn").named_parameters() if "lora_" in n]
    assert names
    assert all(".attn.c_attn." in n for n in names)
    with pytest.raises(UserError, match="'wte' is none of"):
        TuningOptions(lora_targets="wte")


def test_merged_weights_do_the_same():
    model, plain = adapted(), GPT2(**SHAPE).eval()
    assert is_adapted(model)
    assert not is_adapted(plain)
    model_file.load_into(plain, merged_state(model), "merged")
    torch.testing.assert_close(plain(IDX), model(IDX), atol=1e-5, rtol=1e-4)


def test_peft_loads_the_adapter_with_equal_logits(tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft")
    theirs = reference(vocab_size=100)
    theirs.save_pretrained(tmp_path / "base")
    ours = GPT2.from_checkpoint(tmp_path / "base", device="cpu")
    adapt(ours, TuningOptions(lora_rank=4, lora_alpha=24.0))
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.3)
    model_file.write_adapter(tmp_path / "adapter", *to_peft(ours, str(tmp_path / "base")))
    before = theirs(IDX).logits
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDX), loaded(IDX).logits, atol=1e-4, rtol=1e-4)
        assert (loaded(IDX).logits - before).abs().max() > 0.1


def test_a_run_leaves_frozen_weights_alone_and_exports_merged_ones(chats, base, tmp_path):  # noqa: F811
    assert finetune(base, chats, tmp_path, "--lora_rank=2", "--max_steps=3") == 0
    began = model_file.load_model(base)[1]
    state = training_state.find_state(tmp_path, "auto")[0].model
    assert all(torch.equal(state[name], began[name]) for name in began)
    exported = GPT2.from_checkpoint(tmp_path / "out_ckpt.pt", device="cpu").state_dict()
    changed = {name for name in began if not torch.equal(exported[name], began[name])}
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"transformer.h.{i}.{n}.weight" for i in range(2) for n in matrices}
    assert (tmp_path / "out_adapter" / "adapter_config.json").exists()


def test_adapters_are_evaluated_on_what_their_run_held_out(chats, base, tmp_path, capsys):  # noqa: F811
    """In the rows of their run, which are shorter than the context of their base."""
    shape = ("--lora_rank=2", "--max_steps=1", "--block_size=40")
    assert finetune(base, chats, tmp_path, *shape) == 0
    options, result = ["--device=cpu", "--dtype=float32"], tmp_path / "x.json"
    adapters, losses = tmp_path / "out_adapter", []
    sources = (tmp_path / "out_ckpt.pt", adapters, adapters / "adapter_model.safetensors", tmp_path)
    for source in sources:
        if source == tmp_path:  # the folder of the run, with its adapters alone
            (tmp_path / "out_ckpt.pt").unlink()
        assert main(["eval", str(source), *options, f"--json={result}"]) == 0
        losses.append(json.loads(result.read_text())["val_loss"])
    assert losses == pytest.approx(losses[:1] * len(sources), abs=1e-5)
    capsys.readouterr()
    assert main(["eval", str(adapters), *options, "--block_size=48"]) == 2
    told = "packed for the run's block_size=40, and this evaluation has 48; use --block_size=40\n"
    assert told in capsys.readouterr().err
    assert main(["eval", str(adapters), *options, "--block_size=40"]) == 0
    settings = tmp_path / "config.toml"
    settings.write_text(settings.read_text().replace("block_size = 40", "block_size = 50"))
    assert main(["eval", str(tmp_path), *options]) == 2
    assert "this evaluation has 48; evaluate a checkpoint of that run" in capsys.readouterr().err


def test_adapters_on_adapters_are_warned_of(chats, base, tmp_path, capsys):  # noqa: F811
    """Their base would be no whole model; out_ckpt.pt is one."""
    shape = ("--lora_rank=2", "--max_steps=1", "--block_size=40")
    assert finetune(base, chats, tmp_path / "a", *shape) == 0
    assert "will have adapters as their base" not in capsys.readouterr().out
    assert finetune(tmp_path / "a/out_adapter", chats, tmp_path / "b", *shape) == 0
    assert "will have adapters as their base" in capsys.readouterr().out
    assert GPT2.from_checkpoint(tmp_path / "b/out_ckpt.pt", "cpu")


def test_without_a_rank_nothing_is_adapted():
    model = GPT2(**SHAPE)
    adapt(model, TuningOptions())
    adapt(model, None)
    assert not is_adapted(model)


def test_the_learning_rate_follows_from_what_is_trained():
    given = ["--init=gpt2", "--data=x.jsonl"]
    assert parse(FinetuneConfig, given, "x").optim.learning_rate == 2e-4
    assert parse(FinetuneConfig, [*given, "--lora_rank=8"], "x").optim.learning_rate == 1e-3
