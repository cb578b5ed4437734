"""Defaults of fine-tuning follow the amount of data, and a model learns its file by them."""

import json
from types import SimpleNamespace

import pytest
import torch

from gpt2.api import GPT2
from gpt2.config.command_line import parse
from gpt2.config.finetune import FinetuneConfig, TuningData
from gpt2.config.train import BatchPlan, plan_batch
from gpt2.data.chat_template import encode_prompt
from gpt2.tokenizer import gpt2_tokenizer
from gpt2.train import loop
from gpt2.train.tuning_plan import fit_batch, note_few_steps, resolve_steps


def planned(
    rows: int,
    *arguments: str,
    world: int = 1,
    stored: int = 0,
    epochs: float = 0,
    done: tuple[int, int] = (0, 0),
) -> FinetuneConfig:
    """The settings that a file of so many rows leads to.

    Args:
        rows: of the file.
        arguments: of the command.
        world: ranks.
        stored: batch size of the run that is continued; 0: a new run.
        epochs: that it was to make.
        done: its steps, and the sequences that it has read.
    """
    given = ["--init=gpt2", "--data=x.jsonl", *arguments]
    config = parse(FinetuneConfig, given, "gpt2 finetune")
    order = SimpleNamespace(orders=[SimpleNamespace(per_epoch=rows)])
    settings = {"batch_size": stored, **({"epochs": epochs} if epochs else {})}
    resumed = SimpleNamespace(state={"settings": settings}) if stored else None
    data = fit_batch(config.data, order, world, resumed)
    plan = plan_batch(data, 1024, world)
    step, position = done
    loader = SimpleNamespace(order=order, position=position)
    return resolve_steps(config, SimpleNamespace(loader=loader, plan=plan, step=step), resumed)


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"),
    [
        (1, 1, 30, 30),  # a dozen short conversations
        (4, 1, 25, 100),  # 120 of them
        (16, 1, 7, 112),
        (40, 2, 5, 100),
        (216, 8, 4, 108),  # docs/results/chat
        (100_000, 8, 3, 37_500),
    ],
)
def test_batch_and_epochs_follow_the_rows(rows, batch, epochs, steps):
    config = planned(rows)
    assert (config.data.batch_size, config.tuning.epochs) == (batch, epochs)
    assert config.optim.max_steps == steps


def test_what_is_given_is_kept():
    config = planned(4, "--batch_size=8", "--epochs=3")
    assert (config.data.batch_size, config.tuning.epochs, config.optim.max_steps) == (8, 3, 2)
    assert planned(4, "--max_steps=7").optim.max_steps == 7
    assert planned(1000, stored=2).data.batch_size == 2  # as when the run began
    assert planned(128, world=8).data.batch_size == 1  # 16 steps an epoch of all ranks
    assert fit_batch(TuningData(batch_size=3), None, 1, None).batch_size == 3


@pytest.mark.parametrize("warmup", [0, 0.5])
def test_a_resumed_run_reads_what_is_left_of_its_epochs(warmup):
    """41 rows four times by steps of four, of which 10 are done; then by two or eight ranks."""
    asked = ["--epochs=4", "--batch_size=2", "--grad_accum_steps=2", f"--batch_warmup={warmup}"]
    whole = planned(41, *asked).optim.max_steps
    assert whole == 41 if not warmup else 41 < whole < 82
    for world, a_step in (1, 4), (2, 8), (8, 32):
        found = planned(41, *asked, world=world, stored=2, epochs=4, done=(60, 100)).optim
        assert found.max_steps == 60 + -(-64 // a_step)
    assert planned(41, *asked, stored=2, epochs=4, done=(41, 164)).optim.max_steps == 41
    assert planned(41, *asked, world=2, stored=2, epochs=4, done=(41, 164)).optim.max_steps == 41


def test_a_resumed_run_keeps_its_epochs():
    fresh = planned(40)
    assert (fresh.tuning.epochs, fresh.optim.max_steps) == (5, 100)
    more = planned(40, world=4, stored=2, epochs=5, done=(50, 100))
    assert (more.tuning.epochs, more.optim.max_steps) == (5, 50 + 13)
    assert planned(40, "--epochs=7", stored=2, epochs=5, done=(100, 200)).optim.max_steps == 140


def test_few_steps_are_said_with_what_to_change():
    plan = BatchPlan(8, 1024, 1, 1)
    told = note_few_steps(planned(20, "--batch_size=8", "--epochs=4"), plan, 4.0)
    assert told.startswith("10 steps are few:")
    assert "--epochs=40 or --batch_size=1" in told
    told = note_few_steps(planned(1000, "--max_steps=9"), plan, 0.1)
    assert "use --max_steps=100, or more conversations" in told
    assert not note_few_steps(planned(4), plan, 25)
    told = note_few_steps(planned(20, "--batch_size=8", "--epochs=4", "--data=shards"), plan, 4.0)
    assert "hardly learn the text; use --epochs=40 or --batch_size=1, or more text" in told


@pytest.mark.long
def test_a_model_answers_as_its_file_does(tmp_path, capsys):
    """With the defaults but for its rate, which fresh weights need higher."""
    facts = {"Who are you?": "A model.", "Where is Rome?": "In Italy."}
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in facts.items()
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in 5 * lines), encoding="utf-8")
    torch.manual_seed(0)
    GPT2(n_layer=1, n_head=2, n_embd=64, block_size=32).save(tmp_path / "base.pt")
    arguments = [f"--init={tmp_path}/base.pt", f"--data={path}", f"--out_dir={tmp_path}/out"]
    arguments += ["--learning_rate=5e-3", "--eval_every=0", "--save_every=0", "--device=cpu"]
    assert loop.run(parse(FinetuneConfig, arguments, "gpt2 finetune")) == 0
    assert "steps are few" not in capsys.readouterr().err
    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    assert loop.run(parse(FinetuneConfig, arguments, "gpt2 finetune")) == 0  # is over: as it was
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before
    model = GPT2.from_checkpoint(tmp_path / "out/out_ckpt.pt", device="cpu")
    for question, answer in facts.items():
        prompt = encode_prompt([{"role": "user", "content": question}])
        ids = list(model.generate(prompt, max_new_tokens=8, temperature=0))[len(prompt) :]
        assert gpt2_tokenizer().decode(ids).startswith(answer), question
