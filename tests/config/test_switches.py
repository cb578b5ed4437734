"""Options that mean nothing together are refused by name."""

import pytest
import torch

from gpt2.api import SwitchedGPT2
from gpt2.commands.terminal import chat
from gpt2.config.command_line import parse
from gpt2.config.commands import ChatConfig
from gpt2.config.finetune import FinetuneConfig
from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.config.train import ModelOptions, TrainConfig
from gpt2.errors import UserError
from gpt2.train import loop


def test_defaults_are_the_faithful_network():
    assert type(ModelOptions().shape()) is GPT2Config
    assert type(ModelOptions(qk_norm=True).shape()) is ModernConfig
    narrow = {"n_layer": 1, "n_head": 4, "n_embd": 4}  # heads of one number have no pairs
    assert ModelOptions(**narrow, qk_norm=True).shape().positions == "learned"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--muon_lr=1"], "muon_lr is for --optimizer=muon"),
        (["--optimizer=muon", "--muon_weight_decay=-0.5"], "use 0 or more, or -1"),
        (["--cooldown=0.1"], "cooldown is for --schedule=wsd"),
        (["--head_lr=1"], "head_lr is for --untied_head"),
        (["--window_warmup=0.5"], "window_warmup is for --window_pattern"),
        (["--batch_warmup=2"], "use a share"),
        (["--window=5"], "give both"),
        (["--rope_fraction=0.5"], "rope_fraction is for positions=rotary"),
        (["--positions=rotary", "--rope_fraction=0"], "above 0 and up to 1"),
        (["--positions=rotary", "--rope_fraction=0.01"], "no pair of the 64 channels"),
        (["--muon_weight_decay=0.1"], "muon_weight_decay is for --optimizer=muon"),
        (["--muon_momentum_warmup=9"], "muon_momentum_warmup is for --optimizer=muon"),
        (["--optimizer=muon", "--learning_rate=0"], "other rates follow its schedule"),
    ],
)
def test_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(TrainConfig, arguments, "gpt2 train")


def test_adapters_are_not_for_muon():
    with pytest.raises(UserError, match="for whole matrices"):
        parse(FinetuneConfig, ["--lora_rank=4", "--optimizer=muon"], "gpt2 finetune")
    for rate in ("--embedding_lr=1", "--head_lr=1"):
        with pytest.raises(UserError, match="that lora_rank leaves as they are"):
            parse(FinetuneConfig, ["--lora_rank=4", "--init=x", rate], "gpt2 finetune")
    config = parse(FinetuneConfig, ["--optimizer=muon"], "gpt2 finetune")
    assert config.optim.learning_rate == 2e-4


def test_conversations_are_not_for_a_document_mask(tmp_path):
    torch.manual_seed(0)
    config = ModernConfig(n_layer=1, n_head=1, n_embd=8, block_size=32, document_mask=True)
    path = tmp_path / "m.pt"
    SwitchedGPT2(config).save(path)
    with pytest.raises(UserError, match="hide them from one another"):
        chat(str(path), parse(ChatConfig, ["--device=cpu"], "gpt2 chat"))
    data = tmp_path / "c.jsonl"
    data.write_text('{"messages": []}\n')
    argv = [f"--init={path}", f"--data={data}", f"--out_dir={tmp_path / 'o'}", "--device=cpu"]
    with pytest.raises(UserError, match="would hide them from one another"):
        loop.run(parse(FinetuneConfig, argv, "gpt2 finetune"))
