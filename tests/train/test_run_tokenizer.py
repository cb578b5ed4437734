"""From a text in another language to a model that other programs read: with its own tokenizer."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2 import GPT2, cli
from gpt2.checkpoint import weights
from gpt2.config.command_line import parse
from gpt2.config.finetune import FinetuneConfig
from gpt2.config.train import TrainConfig
from gpt2.data.sequence_order import document_sequences
from gpt2.data.shards import find_shards, write_shard
from gpt2.errors import UserError
from gpt2.train import loop, setup

VERSES = [
    f"O rei {n} não sabia ler, mas à noite contava {n * 7} histórias de água e pão."
    for n in range(400)
]
SMALL = (
    *("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=64", "--batch_size=4"),
    *("--grad_accum_steps=1", "--eval_tokens=200", "--dtype=float32", "--device=cpu"),
    *("--learning_rate=1e-2", "--warmup_steps=1", "--compile_model=False", "--save_every=0"),
)
END = "<|fim|>"


def train_tokenizer(path, vocab_size=1000):
    """A byte-level BPE, trained as docs/languages.md says; token 0 ends a text."""
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        VERSES,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return path


def train(*arguments, kind=TrainConfig):
    return loop.run(parse(kind, [*SMALL, *map(str, arguments)], "gpt2 train"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """tok: a tokenizer. data: shards. out: a run of 8 steps on them."""
    home = tmp_path_factory.mktemp("home")
    train_tokenizer(home / "tok", 600)
    lines = "".join(json.dumps({"text": verse}) + "\n" for verse in VERSES)
    (home / "texts.jsonl").write_text(lines, encoding="utf-8")
    source = [f"--source={home / 'texts.jsonl'}", "--num_workers=1"]
    for data, more in (("data", [f"--tokenizer={home / 'tok'}"]), ("gpt2", ["--max_shards=2"])):
        asked = [*source, f"--out_dir={home / data}", "--shard_tokens=4000", *more]
        assert cli.main(["prepare", *asked]) == 0
    asked = [f"--data_dir={home / 'data'}", f"--out_dir={home / 'out'}", "--max_steps=8"]
    assert train(*asked) == 0
    return home


def vocab_size(home):
    return Library.from_file(str(home / "tok/tokenizer.json")).get_vocab_size()


def test_from_the_tokenizer_to_transformers(home, tmp_path, capsys):
    ours = GPT2().from_checkpoint(home / "out", "cpu")
    assert ours.config.vocab_size == vocab_size(home)
    assert cli.main(["export", str(home / "out"), str(tmp_path / "hf")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = VERSES[3] + " À meia-noite…"
    ids = their_tokenizer.encode(text)
    assert ids == ours.tokenizer.encode(text)
    assert (their_tokenizer.eos_token, their_tokenizer.eos_token_id) == (END, 0)
    assert theirs.config.eos_token_id == 0
    window = torch.tensor([ids[:16]])
    with torch.no_grad():
        loss = ours(window[:, :-1], window[:, 1:])
        assert loss.item() == pytest.approx(theirs(window, labels=window).loss.item(), rel=1e-5)
    written = theirs.generate(window[:, :6], max_new_tokens=9, do_sample=False)[0].tolist()
    mine = ours.generate(window[0, :6].tolist(), 9, temperature=0)
    assert mine == [i for i in written if i]
    text = their_tokenizer.decode(written, skip_special_tokens=True)
    assert ours.generate(their_tokenizer.decode(window[0, :6]), 9, temperature=0) == text


def test_the_run_knows_its_tokenizer(home, capsys):
    lines = [json.loads(line) for line in (home / "out/metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], next(x for x in reversed(lines) if "val_bpb" in x)
    assert first["loss"] == pytest.approx(np.log(vocab_size(home)), abs=0.1)
    theirs = Library.from_file(str(home / "tok/tokenizer.json"))
    shard = find_shards(home / "data", "val")[0]
    ids = shard.read(0, shard.tokens)
    text = "".join(theirs.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == 0)))
    size = len(text.encode()) * last["val_tokens"] / (len(ids) - 1)  # bytes that were predicted
    bits = last["val_loss"] * last["val_tokens"] / np.log(2)
    assert last["val_bpb"] == pytest.approx(bits / size, rel=0.05)
    assert cli.main(["sample", str(home / "out"), "--prompt=O rei", "--max_new_tokens=5"]) == 0
    assert capsys.readouterr().out.startswith("O rei")
    data = [f"--data_dir={home / 'data'}", "--eval_tokens=200"]
    assert cli.main(["eval", str(home / "out"), *data, "--device=cpu", "--dtype=float32"]) == 0
    assert f"{last['val_loss']:.4f}" in capsys.readouterr().out
    assert cli.main(["eval", str(home / "out"), f"--data_dir={home / 'gpt2'}"]) == 2
    assert "has GPT-2's vocabulary of 50257, and" in capsys.readouterr().err


def test_it_goes_on_to_the_same_weights(home, tmp_path):
    asked = [f"--data_dir={home / 'data'}", f"--out_dir={tmp_path / 'out'}"]
    more = ["--save_every=4", "--max_steps=8"]
    assert train(*asked, *more) == 0
    shutil.rmtree(tmp_path / "out/state/step_00000008")
    (tmp_path / "out/out_ckpt.pt").unlink()
    assert train(*asked, *more) == 0
    again, whole = (weights.load(folder / "out") for folder in (tmp_path, home))
    assert all(torch.equal(again.state[name], whole.state[name]) for name in whole.state)
    assert again.tokenizer.sha256 == whole.tokenizer.sha256
    assert cli.main(["average", str(tmp_path / "out"), "--last=2"]) == 0
    mean = weights.load(tmp_path / "out/mean.pt")
    assert mean.tokenizer.sha256 == whole.tokenizer.sha256


def test_shards_of_another_tokenizer_are_one_line(home, tmp_path):
    out = f"--out_dir={home / 'out'}"
    with pytest.raises(UserError, match=r"was trained with the vocabulary of .*GPT-2's vocabulary"):
        train(f"--data_dir={home / 'gpt2'}", out, "--max_steps=9")
    mix = f"--data_dir={home / 'gpt2'}:1,{home / 'data'}:1"
    with pytest.raises(UserError, match="a run reads shards of one tokenizer"):
        train(mix, f"--out_dir={tmp_path}")
    for data, size in (("data", 999), ("gpt2", 50304)):
        with pytest.raises(UserError, match=f"vocab_size={size}: .*; leave it out"):
            train(f"--data_dir={home / data}", f"--out_dir={tmp_path}", f"--vocab_size={size}")
    shutil.copytree(home / "data", tmp_path / "data")
    (tmp_path / "data/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: .*only byte-level BPE is read"):
        train(f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}")
    init = f"--init={home / 'out/out_ckpt.pt'}"
    asked = [*SMALL[4:], init, f"--data_dir={home / 'gpt2'}", f"--out_dir={tmp_path / 'o'}"]
    with pytest.raises(UserError, match="prepare the text with `gpt2 prepare --tokenizer=`"):
        loop.run(parse(TrainConfig, asked, "gpt2 train"))


def test_an_id_beyond_the_vocabulary_is_found(home, tmp_path):
    shutil.copytree(home / "data", tmp_path / "data")
    shard = find_shards(tmp_path / "data", "train")[0]
    tokens = shard.read(0, shard.tokens).copy()
    tokens[5] = vocab_size(home)
    write_shard(shard.path, tokens)
    with pytest.raises(UserError, match=r"offset 5 is outside the vocabulary of \d+ tokens"):
        find_shards(tmp_path / "data", "train")[0].read(0, 10)


def test_sequences_and_masks_begin_at_its_documents(home, tmp_path):
    asked = [f"--data_dir={home / 'data'}", f"--out_dir={tmp_path / 'out'}", "--max_steps=2"]
    switches = ["--sequence_start=document", "--document_mask=True"]
    assert train(*asked, *switches) == 0
    shard = find_shards(home / "data", "train")[0]
    starts = document_sequences(shard, 64).tolist()  # no document is longer than that
    assert all(shard.read(start, 1)[0] == 0 for start in starts[1:])
    assert len(starts) > 50
    model = GPT2.from_checkpoint(tmp_path / "out", "cpu")
    with torch.no_grad():
        a, b = (model(torch.tensor([[0, first, 9, 0, 7, 8]])) for first in (5, 6))
    assert torch.equal(a[:, 3:], b[:, 3:])  # nothing is seen of the document before
    assert not torch.equal(a[:, 1:3], b[:, 1:3])
    config = parse(TrainConfig, [*SMALL, *asked, *switches, "--vocab_size=0"], "gpt2 train")
    with pytest.raises(UserError, match="and the network 50257 rows; use --vocab_size="):
        setup.build(config, loop.runtime.Runtime(torch.device("cpu"), torch.float32), None)


def test_conversations_are_learned_in_it(home, tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": verse[:9]},
                          {"role": "assistant", "content": verse[9:30]}]}
            for verse in VERSES[:30]]  # fmt: skip
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = [f"--init={home / 'out/out_ckpt.pt'}", f"--data={path}", f"--out_dir={tmp_path / 'o'}"]
    common = [*SMALL[5:], *asked, "--max_steps=3", "--lora_rank=2"]
    assert loop.run(parse(FinetuneConfig, common, "gpt2 finetune")) == 0
    found = weights.load(tmp_path / "o")
    assert found.tokenizer.encode(VERSES[0]) == weights.load(home / "out").tokenizer.encode(
        VERSES[0]
    )
    assert weights.load(tmp_path / "o/out_adapter").tokenizer.sha256 == found.tokenizer.sha256
    common[-2] = "--max_steps=5"
    assert loop.run(parse(FinetuneConfig, common, "gpt2 finetune")) == 0
    assert "continuing from" in capsys.readouterr().out
    assert cli.main(["eval", str(tmp_path / "o/out_ckpt.pt"), "--device=cpu"]) == 0
    more = ["--vocab_size=7", "--resume=never"]
    with pytest.raises(UserError, match=r"vocab_size=7: .*; leave it out"):
        loop.run(parse(FinetuneConfig, [*common, *more], "gpt2 finetune"))
