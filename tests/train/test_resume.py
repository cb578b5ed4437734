"""Which checkpoints a run refuses to go on from, by the option that differs."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt2.config.command_line import parse
from gpt2.config.finetune import FinetuneConfig
from gpt2.config.model import GPT2Config
from gpt2.config.options import flatten
from gpt2.config.train import TrainConfig
from gpt2.errors import UserError
from gpt2.train.resume import check_same_run, check_same_tuning


def tuning(*arguments: str, data: str = "chats.jsonl") -> FinetuneConfig:
    return parse(FinetuneConfig, ["--init=box", f"--data={data}", *arguments], "gpt2 finetune")


def checkpoint(config: TrainConfig):
    """A checkpoint of a run with these options."""
    return SimpleNamespace(path=Path("out/state/step_1"), state={"settings": flatten(config)})


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("--lora_rank=4", "--lora_rank=8", "is of a run with lora_rank=4, not 8; use the same"),
        ("--lora_rank=4", "--lora_rank=0", "lora_rank=4, not 0"),
        ("--lora_rank=0", "--lora_rank=4", "lora_rank=0, not 4"),
        ("--val_share=0.1", "--val_share=0.2", "val_share=0.1, not 0.2"),
    ],
)
def test_other_adapters_and_other_held_out_conversations(before, now, said):
    check_same_tuning(checkpoint(tuning(before)), tuning(before))
    with pytest.raises(UserError, match=said):
        check_same_tuning(checkpoint(tuning(before)), tuning(now))


def test_targets_count_with_adapters_and_shares_with_conversations():
    rank, targets = "--lora_rank=4", "--lora_targets=c_attn"
    with pytest.raises(UserError, match="lora_targets=c_attn,c_proj,c_fc, not c_attn"):
        check_same_tuning(checkpoint(tuning(rank)), tuning(rank, targets))
    check_same_tuning(
        checkpoint(tuning(rank, "--lora_targets=c_fc, c_attn")),
        tuning(rank, "--lora_targets=c_attn,c_fc"),
    )
    without = checkpoint(tuning())
    without.state["settings"]["lora_targets"] = "c_attn"  # versions before took it with all weights
    check_same_tuning(without, tuning())
    check_same_tuning(checkpoint(tuning("--val_share=0.1", data="shards")), tuning(data="shards"))


def test_a_run_of_gpt2_train_has_none_of_them():
    config = parse(TrainConfig, ["--data_dir=shards"], "gpt2 train")
    check_same_tuning(checkpoint(tuning("--lora_rank=4")), config)
    check_same_tuning(checkpoint(config), tuning(data="shards"))


@pytest.mark.parametrize(
    ("before", "now", "equal"),
    [
        ("out/run", "out/run/", True),
        ("out/run/", "out/run/out_ckpt.pt", True),
        ("out_ckpt.pt", ".", True),
        ("OWNER/NAME", "OWNER/NAME", True),
        ("out/run", "out/other", False),
        ("", "out_ckpt.pt", False),
        ("", "/out_ckpt.pt", False),
        ("box", "gpt2", False),
    ],
)
def test_weights_to_begin_with_are_named_in_several_ways(before, now, equal):
    found = SimpleNamespace(
        path=Path("out/state/step_1"), state={"settings": {"init": before}}, config=GPT2Config()
    )
    options = parse(TrainConfig, [f"--init={now}"], "gpt2 train").model
    if equal:
        check_same_run(found, options)
    else:
        with pytest.raises(UserError, match="is of a run that began with"):
            check_same_run(found, options)
