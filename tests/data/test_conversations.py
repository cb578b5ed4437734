"""Conversations as training data, and the loop on them: loss, packing, resume, two ranks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import cli
from gpt2.api import GPT2
from gpt2.checkpoint import model_file
from gpt2.config.command_line import parse
from gpt2.config.finetune import FinetuneConfig
from gpt2.config.model import IGNORE
from gpt2.data.chat_formats import messages_of
from gpt2.data.chat_template import encode_conversation, jinja_template
from gpt2.data.conversations import Conversations, is_chat, open_conversations, pack, was_chat
from gpt2.data.loader import eval_batches
from gpt2.errors import UserError
from gpt2.huggingface.model_format import to_hf
from gpt2.model.packed_documents import packed
from gpt2.report import metrics
from gpt2.tokenizer import gpt2_tokenizer
from gpt2.train import loop

from ..conftest import TORCHRUN, run_python
from ..models import reference

T = 48


def talk(n: int, words: int = 4) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"What follows {n}?"},
            {"role": "assistant", "content": " ".join(str(n + i) for i in range(1, words))},
        ]
    }


def write(path: Path, items: list) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    items = [talk(n, 3 + n % 9) for n in range(60)]
    return write(tmp_path_factory.mktemp("chat") / "chat.jsonl", items)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pt"
    torch.manual_seed(0)
    GPT2(n_layer=2, n_head=2, n_embd=32, block_size=T).save(path)
    return path


def arguments(base, data, out_dir, *more) -> list[str]:
    return [
        f"--init={base}",
        f"--data={data}",
        f"--out_dir={out_dir}",
        "--device=cpu",
        "--dtype=float32",
        "--batch_size=2",
        "--learning_rate=1e-2",
        *more,
    ]


def finetune(*args) -> int:
    return loop.run(parse(FinetuneConfig, arguments(*args), "gpt2 finetune"))


def losses(out_dir) -> list[float]:
    return [r["loss"] for r in metrics.read_metrics(Path(out_dir) / "metrics.jsonl") if "loss" in r]


@given(st.lists(st.integers(1, 20)), st.integers(20, 40))
def test_packing_holds_each_once_and_wastes_little(lengths, room):
    bins = pack(lengths, room)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in items) for items in bins]
    assert all(0 < s <= room for s in sums)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // room) * 2 + 1
    assert sum(2 * s <= room for s in sums) <= 1  # two such bins would have been one


def test_the_loss_is_that_of_transformers_with_labels_of_minus_100(chats):
    """Each conversation alone there, packed here."""
    model = reference(block_size=T).double()
    ours = GPT2(n_layer=2, n_head=2, n_embd=32, block_size=T).double().eval()
    theirs = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    want = ours.state_dict()
    for name, tensor in theirs.items():
        if want[name].shape != tensor.shape or "attn.c_proj.weight" in name:
            theirs[name] = tensor.t()
    ours.load_state_dict(theirs)
    for name, tensor in to_hf(ours.state_dict()).items():  # the same network
        torch.testing.assert_close(tensor, model.state_dict()[name])
    nats = count = 0
    encoded = [encode_conversation(messages_of(json.loads(s))) for s in chats.open()]
    for ids, learned in encoded:
        labels = [i if own else -100 for i, own in zip(ids, learned, strict=True)]
        loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        nats, count = nats + loss.item() * sum(learned), count + sum(learned)
    shard = Conversations(chats, encoded, T)
    assert len(shard.packed) < len(encoded)
    batches = list(eval_batches([shard], block_size=T, batch_size=3, eval_tokens=10**6))
    with torch.no_grad():
        summed = sum(
            ours(x, y, reduction="sum", cache=packed(begins)).item() for x, y, begins in batches
        )
    assert sum((y != IGNORE).sum().item() for _, y, _ in batches) == count
    assert summed == pytest.approx(nats, rel=1e-6)


MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant"]),
        "content": st.text("ab \n", max_size=60),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(MESSAGE, min_size=1, max_size=5), min_size=2, max_size=12))
def test_no_row_is_without_targets_and_all_are_accounted_for(tmp_path_factory, conversations):
    path = tmp_path_factory.mktemp("x") / "x.jsonl"
    write(path, [{"messages": messages} for messages in conversations])
    try:
        (dataset,), (line,) = open_conversations(str(path), 16, 0.2)
    except UserError:  # hardly any of them can be learned from
        return
    kept = 0
    for shard in (*dataset.train, *dataset.val):
        kept += sum(map(len, shard.packed))
        for row in range(len(shard.packed)):
            x, y, begins = shard.sequence(row * 16, 16)
            assert (y != IGNORE).any()
            assert (begins <= np.arange(16)).all()
            assert ((y == IGNORE) | (y < 50257)).all()
            assert len(x) == 16
    assert f"{len(conversations) - kept:,} left out" in line


def test_what_is_too_long_is_counted_and_cut(tmp_path):
    long = talk(1, 100)
    buried = {"messages": [{"role": "user", "content": "why " * 99}, long["messages"][1]]}
    silent = {"messages": long["messages"][:1]}
    path = write(tmp_path / "x.jsonl", [talk(1), talk(2), long, buried, silent])
    (dataset,), (line,) = open_conversations(str(path), T, 0.01)
    assert "1 truncated, 2 left out" in line
    assert sum(len(row) for shard in (*dataset.train, *dataset.val) for row in shard.packed) == 3


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "gives 0 conversations"),
        ("{", "row 1 is not JSON"),
        ("[1]", "row 1 is not a JSON object"),
        (json.dumps(talk(1)) + '\n{"messages": [{"role": "user"}]}', "row 2: message 1 has no"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "row 1: message 1: role 'robot'"),
        (json.dumps(talk(1)), "need at least one each: use a file with more"),
    ],
)
def test_wrong_files_are_told_in_one_line(tmp_path, content, told):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        open_conversations(str(path), T, 0.05)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("block_size", [1, 3])
def test_a_context_that_no_answer_fits_into_is_named(tmp_path, block_size):
    """More conversations would not help."""
    silent = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": ""}]
    path = write(tmp_path / "x.jsonl", [*(talk(n) for n in range(9)), {"messages": silent}])
    with pytest.raises(UserError) as told:
        open_conversations(str(path), block_size, 0.05)
    said = "gives 0 conversations: in 9 the assistant's text begins behind the context of block_s"
    assert said in str(told.value)
    assert f"block_size={block_size} tokens; use a larger --block_size=" in str(told.value)
    write(path, [{"messages": silent}] * 9)
    with pytest.raises(UserError, match=r"\(9 have nothing to learn from\).* use a file with more"):
        open_conversations(str(path), block_size, 0.05)


def test_alpacas_list_is_read_like_lines(tmp_path):
    items = [{"instruction": f"Say {n}", "input": "", "output": str(n)} for n in range(9)]
    (tmp_path / "a.json").write_text(json.dumps(items, indent=1))
    write(tmp_path / "a.jsonl", items)
    one, two = (open_conversations(str(tmp_path / n), T, 0.2)[0][0] for n in ("a.json", "a.jsonl"))
    assert one.train[0].fingerprint() == two.train[0].fingerprint()


def test_held_out_conversations_that_are_trained_on_are_counted(tmp_path):
    """They stay where they are: the split of a file goes by places, and old runs resume."""
    several = [talk(n) for n in range(20)]
    path = write(tmp_path / "a.jsonl", several)
    (dataset,), (line,) = open_conversations(str(path), T, 0.2)
    assert "trained on" not in line
    split = dataset.val[0].fingerprint()
    (_,), (line,) = open_conversations(str(write(tmp_path / "b.jsonl", [talk(7)] * 40)), T, 0.05)
    told = "; 2 of those for validation are trained on as well, so its loss is too low: leave dup"
    assert told in line
    order = np.argsort(np.random.Philox(key=[0, 0]).random_raw(20), kind="stable")
    several[order[-1]] = several[order[0]]  # one of the four that are held out
    (dataset,), (line,) = open_conversations(str(write(path, several)), T, 0.2)
    assert "; 1 of those for validation are trained on as well" in line
    assert dataset.val[0].fingerprint() == split


def test_files_folders_and_texts_are_told_apart(tmp_path):
    assert is_chat("a.jsonl.xz:0.5,b.parquet:0.5")
    assert not is_chat(str(tmp_path))
    with pytest.raises(UserError, match="do not mix"):
        is_chat(f"a.jsonl:0.5,{tmp_path}:0.5")
    with pytest.raises(UserError, match="gpt2 prepare"):
        is_chat("book.txt")


def test_what_is_no_file_of_conversations_is_said(tmp_path):
    """A spreadsheet, another packing, and a folder of files in the place of the file."""
    for name in ("a.csv", "a.jsonl.zip", "a.ndjson", "x_train_000001.bin"):
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=r"read from \.jsonl and \.json"):
            is_chat(str(tmp_path / name))
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats/b.jsonl.gz").write_text("")
    with pytest.raises(UserError, match=r"named as files, --data=.*b\.jsonl\.gz; text becomes"):
        is_chat(str(tmp_path / "chats"))
    assert not is_chat(str(tmp_path))  # shards are there, whatever lies beside them


def test_it_learns_and_epochs_become_steps(chats, base, tmp_path, capsys):
    assert finetune(base, chats, tmp_path, "--epochs=5") == 0
    said = capsys.readouterr().out
    assert "57 conversations in" in said
    assert 5 <= float(said.split("steps are ")[1].split()[0]) < 5.1
    falling = losses(tmp_path)
    assert falling[-1] < 0.5 * falling[0]


def test_epochs_count_the_smaller_steps_at_first(chats, base, tmp_path, capsys):
    more = ["--grad_accum_steps=8", "--batch_warmup=0.9"]
    assert finetune(base, chats, tmp_path, "--epochs=5", *more) == 0
    said = capsys.readouterr().out
    epochs = float(said.split("steps are ")[1].split()[0])
    assert 5 <= epochs < 7.5  # 11 rows, and steps of up to 16
    assert len(losses(tmp_path)) > 4  # which would do without the warm-up


def test_a_continued_run_is_the_same_bit_for_bit(chats, base, tmp_path):
    rank = "--lora_rank=2"
    assert finetune(base, chats, tmp_path / "one", rank, "--max_steps=6", "--save_every=3") == 0
    state = tmp_path / "one" / "state" / "step_00000003"
    argv = [base, chats, tmp_path / "two", rank, "--max_steps=6", f"--resume={state}"]
    assert finetune(*argv) == 0
    one, two = (model_file.load_model(tmp_path / n / "out_ckpt.pt")[1] for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_eval_finds_the_conversations_that_were_held_out(chats, base, tmp_path, capsys):
    assert finetune(base, chats, tmp_path / "out", "--max_steps=2") == 0
    records = metrics.read_metrics(tmp_path / "out" / "metrics.jsonl")
    wanted = [record["val_loss"] for record in records if "val_loss" in record][-1]
    result = tmp_path / "r.json"
    argv = ["eval", str(tmp_path / "out" / "out_ckpt.pt"), "--device=cpu", f"--json={result}"]
    assert cli.main(argv) == 0
    assert json.loads(result.read_text())["val_loss"] == pytest.approx(wanted, rel=1e-5)
    argv = ["eval", str(base), f"--data={chats}", "--device=cpu"]
    assert cli.main(argv) == 2
    assert "stands in the config.toml" in capsys.readouterr().err


def test_eval_takes_all_conversations_of_another_file(chats, base, tmp_path, capsys):
    """And of the run's file those that were held out, also where it has moved to another name."""
    out, result = tmp_path / "out", tmp_path / "r.json"
    assert finetune(base, chats, out, "--max_steps=2") == 0
    talks = [talk(n) for n in range(40, 47)]
    other = write(tmp_path / "other.jsonl", talks)
    moved = Path(shutil.copy(chats, tmp_path / "moved.jsonl"))

    def evaluated(data, *more):
        capsys.readouterr()
        argv = ["eval", str(out), f"--data={data}", "--device=cpu", f"--json={result}", *more]
        assert cli.main(argv) == 0
        return capsys.readouterr().out.splitlines()[0], json.loads(result.read_text())

    count = len(chats.read_text().splitlines())
    of_run, by_name = evaluated(chats)
    assert of_run.startswith(f"{chats.name}: ")
    assert of_run.endswith(f" of {count} conversations, held out by the run")
    said, by_tokens = evaluated(moved)
    assert said == of_run.replace(chats.name, moved.name)
    assert by_tokens["val_loss"] == by_name["val_loss"]
    said, whole = evaluated(other)
    assert said == "other.jsonl: 7 of 7 conversations, none of them of the run"
    learned = [encode_conversation(messages_of(t))[1] for t in talks]
    assert whole["val_tokens"] == sum(sum(marks[1:]) for marks in learned)
    assert evaluated(other, "--block_size=16")[1]["val_tokens"] > 0  # cut as is asked, not as then


def test_eval_refuses_a_file_whose_held_out_conversations_changed(base, tmp_path, capsys):
    """They are chosen by their places in the file: others would be some that were learned."""
    talks = [talk(n) for n in range(30)]
    path, out = write(tmp_path / "chat.jsonl", talks), tmp_path / "out"
    assert finetune(base, path, out, "--max_steps=1") == 0
    write(path, talks[1:])
    capsys.readouterr()
    assert cli.main(["eval", str(out), "--device=cpu"]) == 2
    said = capsys.readouterr().err
    assert "has changed since the run: its validation tokens are others" in said
    assert f"use --data_dir={path} to evaluate on these tokens in any case" in said
    assert said.count("\n") == 1
    assert cli.main(["eval", str(out), "--device=cpu", f"--data_dir={path}"]) == 0
    order = np.argsort(np.random.Philox(key=[0, 0]).random_raw(30), kind="stable")
    talks[order[-1]] = talk(90)  # which the model learned: what is held out stays
    write(path, talks)
    assert cli.main(["eval", str(out), "--device=cpu"]) == 0
    (out / "history.jsonl").unlink()  # a run of an earlier version does not tell
    write(path, talks[1:])
    assert cli.main(["eval", str(out), "--device=cpu"]) == 0


def test_a_changed_file_is_refused(base, tmp_path):
    path = write(tmp_path / "chat.jsonl", [talk(n) for n in range(30)])
    assert finetune(base, path, tmp_path / "out", "--max_steps=1") == 0
    write(path, [talk(n) for n in range(29)] + [talk(90)])
    with pytest.raises(UserError, match="holds other tokens"):
        finetune(base, path, tmp_path / "out", "--max_steps=2")


def test_shards_of_text_are_tuned_on_as_well(gpt2_data_dir, base, tmp_path):
    assert finetune(base, gpt2_data_dir, tmp_path, "--max_steps=2", "--eval_tokens=200") == 0
    assert (tmp_path / "out_ckpt.pt").exists()


def test_options_that_mean_nothing_are_refused(chats, gpt2_data_dir, base, tmp_path):
    for name in ("sequence_start", "window_start"):  # the second is the older one
        said = "^--sequence_start=document is for text; conversations are always whole"
        with pytest.raises(UserError, match=said):
            finetune(base, chats, tmp_path, f"--{name}=document")
    said = r"--loss=cross_entropy\+second is for text, .* conversations take --loss=cross_entropy$"
    with pytest.raises(UserError, match=said):
        finetune(base, chats, tmp_path, "--loss=cross_entropy+second")
    with pytest.raises(UserError, match="eval_tokens=5"):
        finetune(base, chats, tmp_path, "--eval_tokens=5")
    with pytest.raises(UserError, match=r"--val_share=0\.1 is for conversations; .* leave it out"):
        finetune(base, gpt2_data_dir, tmp_path, "--val_share=0.1", "--max_steps=1")


@pytest.mark.slow
def test_two_ranks_are_one_with_twice_the_accumulation(chats, base, tmp_path):
    common = ["--max_steps=4", "--log_every=1"]
    assert finetune(base, chats, tmp_path / "one", *common, "--grad_accum_steps=2") == 0
    argv = [*arguments(base, chats, tmp_path / "two"), *common, "--grad_accum_steps=1"]
    run_python(*TORCHRUN, "--nproc_per_node=2", "-m", "gpt2", "finetune", *argv)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5)


def test_the_current_folder_is_a_model(tmp_path, monkeypatch):
    """`gpt2 chat .` in an exported folder; "." has no name of its own."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert not was_chat(Path())
    (tmp_path / "run/config.toml").write_text('data_dir = "chats.jsonl"')
    assert was_chat(Path())


def test_an_exported_folder_says_by_its_template_that_it_learned_conversations(tmp_path):
    assert not was_chat(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    assert not was_chat(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert not was_chat(tmp_path)
    template = {"chat_template": jinja_template(gpt2_tokenizer())}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(template))
    assert was_chat(tmp_path)
    assert was_chat(tmp_path / "model.safetensors")
    for other in ("[]", '"{{ messages }}"'):  # of strangers: the tokenizer has it
        (tmp_path / "tokenizer_config.json").write_text(f'{{"chat_template": {other}}}')
        assert not was_chat(tmp_path)
    several = [{"name": "default", "template": template["chat_template"]}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert was_chat(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text(template["chat_template"])  # transformers 5
    assert was_chat(tmp_path)
