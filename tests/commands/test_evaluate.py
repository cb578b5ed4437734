"""`gpt2 eval` as a person meets it: table, JSON, mistakes, two ranks."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from gpt2 import cli
from gpt2.commands import evaluate as module
from gpt2.commands.evaluate import TokensInMemory, run
from gpt2.config.commands import EvalConfig, PrepareConfig
from gpt2.data.loader import eval_batches
from gpt2.data.shards import find_shards, write_shard
from gpt2.errors import UserError
from gpt2.evaluate.loss import evaluate
from gpt2.prepare.run import run as prepare

from ..conftest import ROOT, TINY, TORCHRUN, run_python
from ..evaluate.test_tasks import RT, hellaswag_items, lambada_items, write_jsonl
from ..train.test_loop import metrics


@pytest.fixture(scope="session")
def data_dir(gpt2_data_dir):
    """Shards of the vocabulary that texts are prepared with by default."""
    return gpt2_data_dir


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A run of three steps, evaluated by the training loop at the end."""
    out = tmp_path_factory.mktemp("run")
    run_python(
        "train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={out}", *TINY, "--max_steps=3"
    )
    return out / "out_ckpt.pt"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    return [
        f"--hellaswag={write_jsonl(folder / 'h.jsonl', hellaswag_items(37))}",
        f"--lambada={write_jsonl(folder / 'l.jsonl', lambada_items(23))}",
    ]


def test_everything_at_once(trained, files, data_dir, tmp_path, capsys):
    target = tmp_path / "results.json"
    arguments = [f"--data_dir={data_dir}", "--eval_tokens=500", *files, f"--json={target}"]
    assert cli.main(["eval", str(trained), *arguments, "--device=cpu", "--dtype=float32"]) == 0
    found, shown = json.loads(target.read_text()), capsys.readouterr().out
    assert found["val_loss"] == pytest.approx(metrics(trained.parent, "val_loss")[3], abs=1e-6)
    assert math.log(found["val_perplexity"]) == pytest.approx(found["val_loss"])
    assert (found["step"], found["val_tokens"], found["val_source"]) == (3, 500, str(data_dir))
    assert (found["hellaswag_items"], found["lambada_items"]) == (37, 23)
    assert found["hellaswag_source"] == files[0].partition("=")[2]
    assert (found["device"], found["dtype"], found["ranks"]) == ("cpu", "float32", 1)
    for label, number in (
        ("validation loss", f"{found['val_loss']:.4f}  over 500 tokens"),
        ("HellaSwag acc_norm", f"{found['hellaswag_acc_norm']:.4f}  over 37 items"),
        ("LAMBADA perplexity", f"{found['lambada_perplexity']:,.2f}  over 23 items"),
    ):
        line = next(line for line in shown.splitlines() if label in line)
        assert line.endswith(number)
    assert "step 3, " in shown


@pytest.mark.parametrize("source", ["out_ckpt.pt", "the folder", "."])
def test_without_options_the_data_of_the_run(source, trained, data_dir, tmp_path, monkeypatch):
    target = tmp_path / "results.json"
    config = EvalConfig(json=str(target), device="cpu", dtype="float32")
    if source == ".":
        monkeypatch.chdir(trained.parent)
    names = {"out_ckpt.pt": str(trained), "the folder": str(trained.parent), ".": "."}
    assert run(names[source], config) == 0
    found = json.loads(target.read_text())
    assert found["val_loss"] == pytest.approx(metrics(trained.parent, "val_loss")[3], abs=1e-6)
    assert found["val_source"] == str(data_dir)
    assert "hellaswag_items" not in found


def test_shards_of_the_run_that_hold_other_tokens_are_refused(trained, data_dir, tmp_path, capsys):
    run_folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(trained.parent, run_folder)
    shutil.copytree(data_dir, data)
    settings = (run_folder / "config.toml").read_text().replace(str(data_dir), str(data))
    (run_folder / "config.toml").write_text(settings)
    arguments = ["eval", str(run_folder), "--device=cpu", "--dtype=float32"]
    assert cli.main(arguments) == 0  # the folder's name does not count
    (shard,) = find_shards(data, "val")
    write_shard(shard.path, np.roll(shard.read(0, shard.tokens), 100))
    assert cli.main(arguments) == 2
    assert f"{data} has changed since the run" in capsys.readouterr().err
    assert cli.main([*arguments, f"--data_dir={data}"]) == 0


def test_few_tokens_are_not_padded_to_a_full_batch(trained, data_dir, tmp_path, monkeypatch):
    """Of 77 tokens, three sequences of 32; a full batch on a CPU has 4,096 tokens."""
    shapes, make = [], module.eval_batches

    def batches(*args, **kwargs):
        for batch in make(*args, **kwargs):
            shapes.append(tuple(batch[0].shape))
            yield batch

    monkeypatch.setattr(module, "eval_batches", batches)
    settings = EvalConfig(data_dir=str(data_dir), eval_tokens=77, device="cpu")
    assert run(str(trained), settings) == 0
    assert shapes == [(3, 32)]


def test_mix_tells_each_loss(trained, data_dir, tmp_path, capsys):
    shutil.copytree(data_dir, tmp_path / "other")
    target = tmp_path / "results.json"
    mix = f"{data_dir}:0.5,{tmp_path / 'other'}:0.5"
    run(str(trained), EvalConfig(data_dir=mix, eval_tokens=400, json=str(target), device="cpu"))
    found = json.loads(target.read_text())
    assert found["val_loss_other"] == pytest.approx(found[f"val_loss_{data_dir.name}"])
    assert found["val_loss"] == pytest.approx(found["val_loss_other"])
    said = capsys.readouterr()
    line = rf"  loss on other +{found['val_loss_other']:.4f}  over 200 tokens\n"
    assert re.search(line, said.out)
    assert "counts" not in said.err
    run(str(trained), EvalConfig(data_dir=mix.replace("0.5", "0.9", 1), device="cpu"))
    name = data_dir.name
    assert f"{name} counts 50% of it where the mix has 64%; other counts" in capsys.readouterr().err


def test_text_equals_its_shards(trained, text, tmp_path):
    """The loss on a file is that on the shards which `gpt2 prepare` makes of it."""
    items = [{"text": text[i : i + 900]} for i in range(0, 9000, 900)]
    source = write_jsonl(tmp_path / "t.jsonl", items)
    prepare(PrepareConfig(source=str(source), out_dir=str(tmp_path / "s"), shard_tokens=100_000))
    # a source of one shard gives its end to validation
    shards = [*find_shards(tmp_path / "s", "train"), *find_shards(tmp_path / "s", "val")]
    ids = np.concatenate([shard.read(0, shard.tokens) for shard in shards])
    target = tmp_path / "results.json"
    run(str(trained), EvalConfig(text=str(source), json=str(target), device="cpu", dtype="float32"))
    found = json.loads(target.read_text())
    from gpt2.api import GPT2

    batches = eval_batches([TokensInMemory(ids)], block_size=32, batch_size=8, eval_tokens=10**6)
    wanted = evaluate(GPT2.from_checkpoint(trained, "cpu"), batches, RT)
    assert found["text_tokens"] == wanted.tokens == len(ids) - 1
    assert found["text_loss"] == pytest.approx(wanted.loss, rel=1e-6)
    assert found["text_bpb"] == pytest.approx(wanted.bits_per_byte, rel=1e-6)
    run(str(trained), EvalConfig(text=str(source), eval_tokens=77, json=str(target), device="cpu"))
    assert json.loads(target.read_text())["text_tokens"] == 77


def test_rows_without_a_text_are_counted(trained, text, tmp_path, capsys):
    source, target = tmp_path / "t.jsonl", tmp_path / "r.json"
    good = json.dumps({"text": text[:900]})
    rows = [good, '{"content": "no"}', good[:50], '{"text": 5}', '{"text": null}', ""]
    source.write_text("\n".join([*rows, good]), encoding="utf-8")
    config = EvalConfig(text=str(source), json=str(target), device="cpu", eval_tokens=10**6)
    run(str(trained), config)
    said = f"--text={source}: 3 of 6 rows are left out; line 2: no `text` that is a string"
    assert said in capsys.readouterr().err
    tokens = json.loads(target.read_text())["text_tokens"]
    source.write_text(f"{good}\n{good}\n", encoding="utf-8")
    run(str(trained), config)
    assert json.loads(target.read_text())["text_tokens"] == tokens
    assert "left out" not in capsys.readouterr().err
    source.write_text("\n".join([*rows, good]), encoding="utf-8")
    run(str(trained), replace(config, eval_tokens=20))  # the first row is enough
    assert "left out" not in capsys.readouterr().err
    with pytest.raises(UserError, match="no such file; standard input is not read"):
        run(str(trained), replace(config, text="-"))


def test_shorter_windows_see_less_text(trained, text, tmp_path):
    source, target = write_jsonl(tmp_path / "t.jsonl", [{"text": text[:900]}]), tmp_path / "r.json"
    config = EvalConfig(text=str(source), json=str(target), device="cpu", dtype="float32")
    run(str(trained), replace(config, block_size=8))
    found = json.loads(target.read_text())
    model = module.GPT2.from_checkpoint(trained, "cpu")
    ids = TokensInMemory(module._encode(source, 10**6, model.tokenizer))
    wanted = evaluate(model, eval_batches([ids], block_size=8, batch_size=3, eval_tokens=10**6), RT)
    assert (found["block_size"], found["text_tokens"]) == (8, wanted.tokens)
    assert found["text_loss"] == pytest.approx(wanted.loss, rel=1e-6)
    with pytest.raises(UserError, match="--block_size=33: use at most the context, 32"):
        run(str(trained), replace(config, block_size=33))
    run(str(trained), config)
    whole = json.loads(target.read_text())
    assert (whole["block_size"], whole["text_tokens"]) == (32, wanted.tokens)
    assert whole["text_loss"] != found["text_loss"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv on Windows")
def test_two_ranks_count_every_item_once(trained, files, data_dir, tmp_path):
    """37 and 23 items, of which no batch holds all, on one rank and on two."""
    arguments = [trained, f"--data_dir={data_dir}", "--eval_tokens=500", *files,
                 "--device=cpu", "--dtype=float32"]  # fmt: skip
    shown = []
    for ranks in (1, 2):
        command = ["-m", "gpt2", "eval"]
        if ranks > 1:
            command = [*TORCHRUN, f"--nproc_per_node={ranks}", *command]
        done = run_python(*command, *arguments, f"--json={tmp_path / str(ranks)}")
        shown.append([re.sub(r"[\d.,]+", "#", line) for line in done.stdout.splitlines()[1:]])
    one, two = (json.loads((tmp_path / name).read_text()) for name in "12")
    assert two["ranks"] == 2
    assert list(one) == list(two)
    for name in set(one) - {"seconds", "ranks"}:
        same = pytest.approx(one[name], rel=1e-6) if isinstance(one[name], float) else one[name]
        assert two[name] == same, name
    assert shown[0] == shown[1]  # one rank speaks; the numbers are those of the JSON, rounded


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ on Windows")
def test_ctrl_c_ends_at_once(trained, tmp_path):
    items = write_jsonl(tmp_path / "h.jsonl", hellaswag_items(20_000))
    process = subprocess.Popen(
        [sys.executable, "-c", "from gpt2 import cli; from gpt2.report import console\n"
         "from gpt2.evaluate import tasks\n"
         "ask = tasks.score\n"
         "def told(*a): console.log('asked'); return ask(*a)\n"
         "tasks.score = told\n"
         f"raise SystemExit(cli.main(['eval', {str(trained)!r}, '--hellaswag={items}',"
         " '--device=cpu']))"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == ""
    assert process.returncode == 130


def test_a_folder_without_a_run_has_nothing_to_evaluate_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        run(".", EvalConfig(device="cpu"))


@pytest.mark.parametrize(
    ("data", "missing"),
    [("oa.jsonl", "oa.jsonl"), ("there:0.5,gone:0.5", "gone"), ("fineweb", "fineweb")],
)
def test_a_run_whose_data_are_gone_says_which(tmp_path, monkeypatch, capsys, data, missing):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "ad").mkdir()
    (tmp_path / "ad/config.toml").write_text(f'data_dir = "{data}"\nout_dir = "ad"\n')
    (tmp_path / "ad/out_ckpt.pt").touch()
    for source in ("ad", "ad/out_ckpt.pt"):
        assert cli.main(["eval", source]) == 2
        said = capsys.readouterr().err
        assert f"{missing} is not here, and the run in " in said
        assert "name its new place by --data_dir=" in said
        assert said.count("\n") == 1
    assert cli.main(["eval", "ad", "--text=nowhere.txt"]) == 2  # other data need none of the run's
    assert "--text=nowhere.txt: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models"], "nothing to evaluate on; give one or more of --data_dir=FOLDER, --text="),
        (["nothing.pt"], "nothing.pt: no such checkpoint"),
        (["nope"], "nope: no such file or folder here; models of the Hub are named OWNER/NAME, or"),
        (["nothing.pt", "--text=README.md"], "nothing.pt: no such checkpoint"),
        (["box-chat"], "nothing to evaluate on"),
        ([f"{ROOT}/models/box-chat"], "nothing to evaluate on"),
        (["nothing.pt", "--data_dir=/nowhere"], "no data folder /nowhere"),
        (["nothing.pt", "--hellaswag=/nowhere.jsonl"], "/nowhere.jsonl: No such file"),
        (["nothing.pt", "--text=/nowhere.txt"], "--text=/nowhere.txt: no such file"),
        (["nothing.pt", "--text=."], "--text=.: a folder; name a file"),
        (["nothing.pt", "--text=README.md", "--json=/nowhere/x"], "--json=/nowhere/x: no such fol"),
        (["nothing.pt", "--text=README.md", "--json=/proc/x"], "--json="),  # root cannot either
        (["nothing.pt", "--helaswag=x"], "did you mean --hellaswag?"),
        (["x.pt", "--lambada=hub", "--block_size=8"], "--block_size=8: for the losses of --data_"),
        (["x.pt", "--hellaswag=hub", "--eval_tokens=9"], "--eval_tokens=9: for the losses of --da"),
        ([], "checkpoint"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert cli.main(["eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["x.csv", "x.TSV.gz", "x.xlsx"])
def test_the_text_of_a_table_is_not_its_bytes(tmp_path, capsys, name):
    (tmp_path / name).write_text("text\nHello\n")
    assert cli.main(["eval", "models", f"--text={tmp_path / name}"]) == 2
    assert f"{name}: a table, whose text is in a column; give plain" in capsys.readouterr().err
