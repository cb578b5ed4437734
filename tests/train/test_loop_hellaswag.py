"""HellaSwag between steps of training: right numbers, and training as if it were not there."""

import json
import signal
import sys

import pytest
import torch

from gpt2.api import GPT2
from gpt2.checkpoint import training_state
from gpt2.distributed import runtime
from gpt2.errors import UserError
from gpt2.evaluate.tasks import HELLASWAG, load_items
from gpt2.train import loop

from ..conftest import run_python
from ..evaluate.test_tasks import hellaswag_items, write_jsonl
from ..test_distributed import command
from .test_loop import config, metrics


def hellaswag_file(tmp_path):
    return write_jsonl(tmp_path / "h.jsonl", hellaswag_items(21))


def test_hellaswag_on_the_way_changes_nothing_and_equals_gpt2_eval(data_dir, tmp_path, capsys):
    arguments = ["--max_steps=5", "--dropout=0.2", "--eval_every=0"]
    loop.run(config(data_dir, tmp_path / "without", *arguments))
    asked = [f"--hellaswag={hellaswag_file(tmp_path)}", "--eval_hellaswag_every=2"]
    loop.run(config(data_dir, tmp_path / "with", *arguments, *asked))
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    found = metrics(tmp_path / "with", "hellaswag_acc_norm")
    assert list(found) == [2, 4, 5]
    shown = [line for line in capsys.readouterr().out.splitlines() if "HellaSwag" in line]
    assert shown[0].startswith(f"step 2 | HellaSwag acc_norm {found[2]:.4f} | acc ")
    assert shown[-1].endswith("over 21 items")
    model = GPT2.from_checkpoint(tmp_path / "with" / "out_ckpt.pt", "cpu")
    file = str(hellaswag_file(tmp_path))
    items = load_items(HELLASWAG, file, print, model.tokenizer)
    again = HELLASWAG.ask(model, items, runtime.Runtime(torch.device("cpu"), torch.float32))
    assert again["hellaswag_acc_norm"] == found[5]


def test_hellaswag_that_was_logged_is_not_asked_again(data_dir, tmp_path, monkeypatch):
    asked = [f"--hellaswag={hellaswag_file(tmp_path)}", "--eval_hellaswag_every=3"]
    out = tmp_path / "out"
    loop.run(config(data_dir, out, "--max_steps=3", *asked))
    loop.run(config(data_dir, out, "--max_steps=4", *asked))  # goes on from step 3
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "hellaswag_acc" in row] == [3, 4]


def test_signal_while_on_hellaswag_leaves_it_for_the_next_run(data_dir, tmp_path, monkeypatch):
    asked = [f"--hellaswag={hellaswag_file(tmp_path)}", "--eval_hellaswag_every=3"]
    out, ask = tmp_path / "out", loop.evaluate_hellaswag

    def interrupted(state, rt, log):
        rt.stop_signal = signal.SIGTERM
        ask(state, rt, log)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_hellaswag", interrupted)
        assert loop.run(config(data_dir, out, "--max_steps=5", *asked)) == 143
    assert training_state.find_state(out, "auto")[0].step == 3
    assert metrics(out, "hellaswag_acc") == {}
    assert loop.run(config(data_dir, out, "--max_steps=5", *asked)) == 0
    assert list(metrics(out, "hellaswag_acc")) == [3, 5]


def test_missing_hellaswag_fails_before_anything_is_written(data_dir, tmp_path):
    arguments = ["--hellaswag=/nowhere.jsonl", "--eval_hellaswag_every=3"]
    with pytest.raises(UserError, match=r"/nowhere.jsonl: No such file"):
        loop.run(config(data_dir, tmp_path / "out", *arguments))
    assert not list((tmp_path / "out").glob("*"))
    with pytest.raises(UserError, match="give both"):
        config(data_dir, tmp_path / "out", "--hellaswag=x.jsonl")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv on Windows")
def test_two_ranks_share_the_items(data_dir, tmp_path):
    """A learning rate of 0 keeps the weights, which are the same on any number of ranks."""
    asked = [f"--hellaswag={hellaswag_file(tmp_path)}", "--eval_hellaswag_every=1"]
    arguments = [*asked, "--max_steps=2", "--learning_rate=0"]
    run_python(*command(2, data_dir, tmp_path / "two", *arguments))
    loop.run(config(data_dir, tmp_path / "one", *arguments, "--grad_accum_steps=4"))
    for name in ("hellaswag_acc_norm", "hellaswag_acc", "hellaswag_items"):
        assert metrics(tmp_path / "two", name) == metrics(tmp_path / "one", name)
        assert list(metrics(tmp_path / "two", name)) == [1, 2]
