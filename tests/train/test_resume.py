"""Which checkpoints a run refuses to go on from, and what it goes on with."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2.checkpoint import training_state
from gpt2.config.command_line import parse
from gpt2.config.finetune import FinetuneConfig
from gpt2.config.model import GPT2Config
from gpt2.config.options import flatten
from gpt2.config.train import TrainConfig
from gpt2.data.shards import find_shards, write_shard
from gpt2.errors import UserError
from gpt2.report.metrics import read_metrics
from gpt2.train import loop
from gpt2.train.resume import check_same_run, check_same_tuning

from .test_loop import best, config, metrics, scripted_losses


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
        ("--lora_rank=4", "--lora_rank=4 --lora_alpha=400", "lora_alpha=16.0, not 400.0"),
        ("--val_share=0.1", "--val_share=0.2", "val_share=0.1, not 0.2"),
    ],
)
def test_other_adapters_and_other_held_out_conversations(before, now, said):
    check_same_tuning(checkpoint(tuning(before)), tuning(before))
    with pytest.raises(UserError, match=said):
        check_same_tuning(checkpoint(tuning(before)), tuning(*now.split()))


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


@pytest.fixture
def other_data(data_dir, tmp_path) -> Path:
    """The shards with other validation tokens, under another name."""
    folder = tmp_path / "other"
    shutil.copytree(data_dir, folder)
    (shard,) = find_shards(folder, "val")
    write_shard(shard.path, np.roll(shard.read(0, shard.tokens), 100))
    return folder


@pytest.mark.parametrize("changed", ["data_dir", "eval_tokens"])
def test_losses_of_other_validation_tokens_begin_anew(
    data_dir, other_data, tmp_path, monkeypatch, capsys, changed
):
    """The lowest loss, early stopping and the best model are about the run's present tokens."""
    out, other = tmp_path / "out", [f"--{changed}={other_data if changed == 'data_dir' else 100}"]
    asked = ["--eval_every=2", "--early_stop_evals=2"]
    scripted_losses(monkeypatch, 3.0, 3.1, 5.0, 4.9, 4.8, 4.7)
    assert loop.run(config(data_dir, out, "--max_steps=4", *asked)) == 0
    capsys.readouterr()
    assert loop.run(config(data_dir, out, "--max_steps=10", *asked, *other)) == 0
    assert "other validation tokens than in" in capsys.readouterr().out
    assert metrics(out, "val_loss") == pytest.approx({2: 3, 4: 3.1, 6: 5, 8: 4.9, 10: 4.8})
    assert best(out) == (10, 4.8)
    assert best(out / "archive_1") == (2, 3.0)
    assert [path.name for path in (out / "archive_1").iterdir()] == ["best_ckpt.pt"]
    assert loop.run(config(data_dir, out, "--max_steps=12", *asked, *other)) == 0
    assert "other validation tokens" not in capsys.readouterr().out
    assert best(out) == (12, 4.7)


@pytest.mark.parametrize("way", ["back", "crash", "branch"])
def test_the_best_model_of_an_abandoned_branch_is_archived(
    data_dir, tmp_path, monkeypatch, capsys, way
):
    """best_ckpt.pt is the best of the steps in metrics.jsonl, in the folder in which it lies."""
    out = tmp_path / "out"
    asked = ["--eval_every=2", "--save_every=3", "--keep_last=9"]
    scripted_losses(monkeypatch, 3.0, 2.0, 1.0, 9.0, 8.5, 8.7)
    assert loop.run(config(data_dir, out, "--max_steps=6", *asked)) == 0
    assert best(out) == (6, 1.0)
    first = out / "state/step_00000003"
    if way == "back":
        asked += [f"--resume={first}", "--learning_rate=0.01"]
    elif way == "crash":  # before the save of step 6; then with another learning rate
        shutil.rmtree(out / "state/step_00000006")
        asked += ["--learning_rate=0.01"]
    else:
        asked += [f"--resume={first}"]
    folder = tmp_path / "new" if way == "branch" else out
    capsys.readouterr()
    assert loop.run(config(data_dir, folder, "--max_steps=8", *asked)) == 0
    assert ": the lowest validation loss is counted anew\n" in capsys.readouterr().out
    losses = {4: 9, 6: 8.5, 8: 8.7}
    assert metrics(folder, "val_loss") == pytest.approx(losses | ({2: 3} if folder == out else {}))
    assert best(folder) == (6, 8.5)
    assert best(out if way == "branch" else out / "archive_1") == (6, 1.0)


def test_a_branch_from_before_the_first_evaluation_has_nothing_to_count_anew(
    data_dir, tmp_path, capsys
):
    out, new = tmp_path / "out", tmp_path / "new"
    asked = ["--eval_every=4", "--max_steps=4", "--save_every=2", "--keep_last=9"]
    assert loop.run(config(data_dir, out, *asked)) == 0
    capsys.readouterr()
    assert loop.run(config(data_dir, new, *asked, f"--resume={out}/state/step_00000002")) == 0
    assert "counted anew" not in capsys.readouterr().out
    assert metrics(new, "val_loss") == metrics(out, "val_loss")


def test_a_crash_alone_keeps_the_best_model(data_dir, tmp_path, monkeypatch, capsys):
    """Its step comes again, with its loss."""
    out, asked = tmp_path / "out", ["--eval_every=2", "--save_every=3", "--max_steps=6"]
    scripted_losses(monkeypatch, 3.0, 1.0, 2.0, 1.0, 2.0)
    assert loop.run(config(data_dir, out, *asked, "--keep_last=9")) == 0
    shutil.rmtree(out / "state/step_00000006")
    assert loop.run(config(data_dir, out, *asked)) == 0
    assert best(out) == (4, 1.0)
    assert not (out / "archive_1").exists()


def test_a_mixture_in_another_order_validates_on_the_same_tokens(
    data_dir, other_data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    scripted_losses(monkeypatch, 3.0, 3.0, 4.0, 4.0)  # of each dataset
    for steps, (first, second) in ((2, (data_dir, other_data)), (3, (other_data, data_dir))):
        shares = (0.7, 0.3) if first == data_dir else (0.3, 0.7)
        mixed = f"{first}:{shares[0]},{second}:{shares[1]}"
        assert loop.run(config(mixed, out, f"--max_steps={steps}", "--eval_every=0")) == 0
    assert "other validation tokens" not in capsys.readouterr().out
    assert not (out / "archive_1").exists()


def test_a_run_that_stopped_early_goes_on_with_other_validation_tokens(
    data_dir, other_data, tmp_path, monkeypatch
):
    asked = ["--eval_every=1", "--early_stop_evals=1", "--max_steps=9"]
    scripted_losses(monkeypatch, 3.0, 3.1, 5.0, 5.1)
    for data in (data_dir, other_data):
        assert loop.run(config(data, tmp_path / "out", *asked)) == 0
    assert list(metrics(tmp_path / "out", "val_loss")) == [1, 2, 3, 4]
    assert best(tmp_path / "out") == (3, 5.0)
    assert f'data_dir = "{other_data}"' in (tmp_path / "out/config.toml").read_text()


def test_a_finished_run_keeps_its_results_whatever_the_validation_tokens(
    data_dir, other_data, tmp_path, monkeypatch
):
    scripted_losses(monkeypatch, 3.0, 2.0)
    assert loop.run(config(data_dir, tmp_path / "out", "--max_steps=2")) == 0
    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    assert loop.run(config(other_data, tmp_path / "out", "--max_steps=2")) == 0
    assert best(tmp_path / "out") == (2, 3.0)
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "out/archive_1").exists()


def test_a_setting_that_json_cannot_hold_does_not_end_a_run(data_dir, tmp_path):
    """A checkpoint may come from anyone; its settings are compared, and logged as text."""
    loop.run(config(data_dir, tmp_path, "--max_steps=1"))
    folder = tmp_path / "state/step_00000001"
    found = training_state.load_state(folder)
    found.state["settings"]["grad_clip"] = float("inf")
    training_state.write_state(tmp_path, 1, found.config, found.model, found.state, keep_last=1)
    assert loop.run(config(data_dir, tmp_path, "--max_steps=2")) == 0
    start = read_metrics(tmp_path / "history.jsonl")[-1]
    assert start["changed"] == {"grad_clip": ["inf", 1.0], "max_steps": [1, 2]}


def test_a_setting_of_another_kind_is_refused(data_dir, tmp_path):
    loop.run(config(data_dir, tmp_path, "--max_steps=1"))
    found = training_state.load_state(tmp_path / "state/step_00000001")
    found.state["settings"]["max_steps"] = "many"
    training_state.write_state(tmp_path, 1, found.config, found.model, found.state, keep_last=1)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        loop.run(config(data_dir, tmp_path, "--max_steps=2"))
