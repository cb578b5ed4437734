"""The benchmarks run, with small numbers; what they measure is in dev/LOG.md."""

import functools
import gc
import json
import os
import re
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import memory, sprint, sprint_report
from benchmarks.sprint import ablations
from benchmarks.throughput import fastest, make_data
from gpt2.api import GPT2
from gpt2.cli import main
from gpt2.config.command_line import parse
from gpt2.config.options import flatten
from gpt2.config.train import OptimOptions, TrainConfig
from gpt2.errors import UserError
from gpt2.model.gpt import LanguageModel
from gpt2.model.modern import Modern
from gpt2.train import step as step_module
from gpt2.train.time_budget import shares_of_ends

from .conftest import ROOT, run_python

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--dtype=float32"]  # of ours
TINY = ["--n_layer=1", "--n_embd=16", "--n_head=1", "--block_size=32", "--batch_size=2"]  # sprints
TINY += ["--total_batch_tokens=64", "--compile_model=False", "--dtype=float32"]
CLONE = """
import torch
from torch import nn
from dataclasses import dataclass
from helper import nothing  # a neighbour that only the script needs

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.table.weight, 0.0, 0.02)

    def forward(self, idx, targets):
        logits = self.table(idx) @ self.table.weight.t()
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)

raise SystemExit("this was run as a script")
"""


@pytest.mark.slow
def test_throughput_beside_a_clone(tmp_path):
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/model.py").write_text(CLONE)
    (tmp_path / "clone/helper.py").write_text("nothing = None")
    arguments = ["--size=gpt2-tiny", *SMALL, "--block_size=16", "--steps=2", "--warmup=0"]
    arguments += [f"--nanogpt={tmp_path}/clone", f"--out_dir={tmp_path}/out", "--device=cpu"]
    done = run_python("-m", "benchmarks.throughput", *arguments)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/throughput.jsonl").open()]
    assert [row["name"] for row in rows] == ["ours", "nanoGPT"]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert 10 < row["first_loss"] < 11.5
    assert "2 × 16 tokens a step" in rows[0]["setting"]
    assert (tmp_path / "out/throughput.png").stat().st_size > 5000


@pytest.mark.slow
def test_throughput_of_several_batch_sizes(tmp_path):
    arguments = ["--size=gpt2-tiny", *SMALL, "--block_size=16", "--steps=1", "--warmup=0"]
    arguments += ["--batch_sizes=1,8", "--activation_checkpointing=True", "--device=cpu"]
    done = run_python("-m", "benchmarks.throughput", *arguments, f"--out_dir={tmp_path}")
    rows = [json.loads(line) for line in (tmp_path / "throughput.jsonl").open()]
    assert [row["batch_size"] for row in rows] == [1, 8]
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("ours ")]
    best = max(rows, key=lambda row: row["tokens_per_second"])
    assert [line[1] for line in table] == [str(best["batch_size"])]


def test_fastest_leaves_out_what_did_not_fit():
    rows = [
        {"name": "a", "batch_size": 8, "tokens_per_second": 5},
        {"name": "a", "batch_size": 16, "tokens_per_second": 7},
        {"name": "a", "batch_size": 32, "out_of_memory": True},
        {"name": "b", "batch_size": 8, "out_of_memory": True},
    ]
    assert fastest(rows) == [rows[1]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resident size is asked for as on Unix")
def test_memory_table(tmp_path):
    arguments = ["--sizes=gpt2-tiny,gpt2-mini", *SMALL, "--block_size=16", "--device=cpu"]
    arguments += ["--batch_sizes=1,2", f"--out_dir={tmp_path}"]
    done = run_python("-m", "benchmarks.memory", *arguments)
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").open()]
    assert [(r["size"], r["activation_checkpointing"], r["batch_size"]) for r in rows] == [
        (size, again, batch)
        for size in ("gpt2-tiny", "gpt2-mini")
        for again in (False, True)
        for batch in (1, 2)
    ]
    # Weights, gradients and two moments of each parameter are there in float32.
    assert all(r["allocated_gib"] > 16 * r["parameters"] / 2**30 for r in rows)
    assert (tmp_path / "memory.md").read_text() in done.stdout
    assert "| batch_size | gpt2-tiny | gpt2-mini |" in done.stdout


def test_memory_goes_on_after_what_does_not_fit(tmp_path, monkeypatch):
    """The optimizer runs out half-way at batch size 2; the next measurement is whole."""
    make_data(tmp_path)
    argv = ["--sizes=gpt2-tiny", "--only=gpt2-tiny", "--batch_sizes=1,2,4", "--block_size=16"]
    options, options.extra = memory.parser().parse_known_args([*argv, "--device=cpu"])
    options.extra = SMALL
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        batch_size = current[-1]["batch_size"], current[-1]["activation_checkpointing"]
        if batch_size == (2, False):
            next(iter(self.state.values())).pop("exp_avg")
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, *arguments)

    measure, current = memory.measure, []
    monkeypatch.setattr(memory, "measure", lambda *a: current.append(dict(a[-1])) or measure(*a))
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    rows = list(memory.measure_size(options, tmp_path))
    found = [(r["activation_checkpointing"], r["batch_size"], r["result"]) for r in rows]
    assert found == [
        (False, 1, "fits"),
        (False, 2, "out of memory"),
        *((True, batch, "fits") for batch in (1, 2, 4)),
    ]


@pytest.mark.parametrize("gib_of_others", [0, 20])
def test_memory_under_a_limit_is_not_that_of_other_programs(gib_of_others, tmp_path, monkeypatch):
    make_data(tmp_path)
    argv = ["--sizes=gpt2-tiny", "--only=gpt2-tiny", "--batch_sizes=1", "--block_size=16"]
    options, options.extra = memory.parser().parse_known_args(
        [*argv, "--device=cpu", "--limit_gib=0.01"]
    )
    options.extra = SMALL
    monkeypatch.setattr(memory, "limit_memory", lambda _: 2**29)
    monkeypatch.setattr(memory, "cuda_itself", lambda: 2**29 + 2**28 + gib_of_others * 2**30)
    if gib_of_others:
        with pytest.raises(SystemExit, match=r"other programs have taken 20\.2 GiB"):
            list(memory.measure_size(options, tmp_path))
    else:
        rows = list(memory.measure_size(options, tmp_path))
        assert [row["result"] for row in rows] == ["out of memory"] * 2


@pytest.mark.gpu
@pytest.mark.alone
def test_memory_under_a_limit(tmp_path):
    """A small network fits into 1.5 GiB, and the batch that does not ends the series.

    The limit is that of a whole card. What CUDA takes of it differs between cards, and other
    processes count, of which this one is one.
    """
    gc.collect()
    torch.cuda.empty_cache()
    code = "import torch; torch.zeros(1).cuda(); from benchmarks import memory as m; "
    taken = int(run_python("-c", code + "print(m.cuda_itself())", cwd=ROOT).stdout)
    limit = taken / 2**30 + 1.5
    arguments = ["--sizes=gpt2-mini", "--batch_sizes=1,1024", f"--limit_gib={limit}"]
    run_python("-m", "benchmarks.memory", *arguments, f"--out_dir={tmp_path}")
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").open()]
    assert [row["result"] for row in rows] == ["fits", "out of memory"] * 2
    for row in rows[::2]:
        assert row["allocated_gib"] <= row["reserved_gib"] <= 1.5
        assert row["reserved_gib"] < row["device_gib"] <= limit + 0.1


@pytest.mark.slow
def test_generate_beside_transformers(tmp_path):
    arguments = ["--size=gpt2-tiny", "--new_tokens=20", "--prompt_tokens=5", "--calls=1"]
    arguments += ["--batch_sizes=1,3", f"--out_dir={tmp_path}", "--device=cpu"]
    done = run_python("-m", "benchmarks.generate", *arguments)
    rows = [json.loads(line) for line in (tmp_path / "generate.jsonl").open()]
    assert [(row["name"], row["batch_size"]) for row in rows] == [
        ("ours", 1), ("transformers", 1), ("ours", 3), ("transformers", 3),
    ]  # fmt: skip
    assert [row["same_tokens"] for row in rows[1::2]] == ["20 of 20", "60 of 60"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert "transformers" in done.stdout
    assert (tmp_path / "generate.png").stat().st_size > 5000


@pytest.mark.slow
def test_finetune_trains_all_weights_and_then_adapters(tmp_path):
    arguments = ["--sizes=gpt2-tiny", "--batch_sizes=2", "--block_size=32", "--rank=2", *SMALL]
    arguments += ["--steps=2", "--warmup=1", "--device=cpu", f"--out_dir={tmp_path}"]
    done = run_python("-m", "benchmarks.finetune", *arguments)
    full, adapters = (json.loads(line) for line in (tmp_path / "finetune.jsonl").open())
    of_block = 4 * 32 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
    assert full["trained_parameters"] == 50257 * 32 + 32 * 32 + of_block + 2 * 32
    assert adapters["trained_parameters"] == 2 * (4 * 32 + 2 * 32 + 2 * (32 + 128))
    for row in (full, adapters):  # two moments in float32, and a count for each tensor
        moments = 8 * row["trained_parameters"]
        assert moments <= row["optimizer_bytes"] <= moments + 200
        assert row["tokens_per_second"] > 0
        assert 5 < row["loss"] < 12
    assert "| gpt2-tiny, 2 × 32 | LoRA, rank 2 | 1,024 |" in done.stdout


def test_loader(tmp_path):
    arguments = ["--shard_tokens=100000", "--batch_size=2", "--block_size=1024", "--seconds=0.2"]
    done = run_python("-m", "benchmarks.loader", *arguments)
    cold, warm, step = done.stdout.splitlines()
    for line in (cold, warm):
        rates = re.findall(r"([\d.]+)M", line)
        assert len(rates) == 2
        assert all(float(rate) > 0.001 for rate in rates)
    assert step.startswith("a step of 3.4 ms waits")


def test_masks():
    """Each mask once; without a GPU none in blocks."""
    sizes = ["--batch_size=2", "--block_size=128", "--n_layer=2", "--n_head=2", "--window=32"]
    done = run_python("-m", "benchmarks.masks", *sizes, "--repeats=2", "--device=cpu")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    names = ["all earlier", "window", "documents", "window and documents"]
    assert [row["mask"] for row in rows] == names
    assert [row["way"] for row in rows] == ["causal", *["table"] * 3]
    assert all(row["ms"] > 0 for row in rows)
    assert "| all earlier | causal |" in done.stdout


@pytest.mark.slow
def test_cost_of_saving():
    arguments = ["--size=gpt2-tiny", *SMALL, "--block_size=16", "--steps=2", "--rows=2"]
    done = run_python("-m", "benchmarks.saving", *arguments, "--device=cpu")
    (row,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {kind: len(seconds) for kind, seconds in row["row_seconds"].items()} == {
        "none": 2, "later": 2, "at once": 2,
    }  # fmt: skip
    assert row["state_bytes"] > 12 * row["parameters"]
    assert row["stall_seconds"] > 0
    assert "of 250 steps" in done.stdout


def test_recipes_without_each_of_their_switches_are_valid():
    """The speedrun without one switch is a recipe, and differs in that switch."""
    path = ROOT / "configs/speedrun.toml"
    found = ablations(path)
    assert {"speedrun", "without skips", "without optimizer", "without softcap"} <= found.keys()
    assert "without muon_lr" not in found
    whole = flatten(parse(TrainConfig, found.pop("speedrun"), "test"))
    for name, argv in found.items():
        config = flatten(parse(TrainConfig, argv, "test"))
        assert config[name.removeprefix("without ")] != whole[name.removeprefix("without ")]


def test_sprint(tmp_path, data_dir):
    """Two recipes for 0.4 seconds each: the clock, the table, the picture."""
    recipe = "configs/sprint_gpt2_adamw.toml"
    done = run_python(
        "-m", "benchmarks.sprint", recipe, f"hot = {recipe} --learning_rate=0.01", *TINY,
        f"--data_dir={data_dir}", "--seconds=0.4", "--evaluations=2", "--val_tokens=500",
        f"--out_dir={tmp_path}", "--devices=cpu", "--save",
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "sprint.jsonl").read_text().splitlines()]
    ends = {row["name"]: row for row in rows}
    assert set(ends) == {"sprint_gpt2_adamw", "hot"}
    for row in ends.values():
        assert row["tokens"] == row["step"] * 64
        assert row["step"] <= row["max_steps"]
        assert row["step"] == row["max_steps"] or row["seconds"] >= 0.4
        assert row["val_tokens"] == 500
        assert (tmp_path / f"{row['name']}-1337" / "out_ckpt.pt").exists()
    model, found = tmp_path / "hot-1337/out_ckpt.pt", tmp_path / "eval.json"
    asked = [f"--data_dir={data_dir}", "--eval_tokens=500", "--device=cpu", "--dtype=float32"]
    assert main(["eval", str(model), *asked, f"--json={found}"]) == 0
    told, hot = json.loads(found.read_text()), ends["hot"]
    assert told["val_loss"] == pytest.approx(hot["val_loss"], rel=1e-4)
    assert told["val_bpb"] == pytest.approx(hot["bits_per_byte"], rel=1e-3)  # of this tokenizer
    assert "| hot |" in done.stdout
    difference = ends["hot"]["val_loss"] - ends["sprint_gpt2_adamw"]["val_loss"]
    first, second, _, said = (tmp_path / "sprint.md").read_text().splitlines()[2:]
    assert "ran with one seed, whose spread nobody knows" in said
    assert first.endswith("|  |  |")
    assert f"| {difference:+.4f} | " in second and second.endswith("% |")  # noqa: PT018
    assert (tmp_path / "sprint.png").stat().st_size > 5000


def sprint_options(*argv: str):
    options, options.extra = sprint.parser().parse_known_args(["--data_dir=d", *argv])
    return options


def sprint_of(data_dir, *more) -> list[dict]:
    """The rows of some tenths of a second of training, in this process."""
    argv = ["--only=x", "--seeds=1", "--device=cpu", f"--data_dir={data_dir}", "--seconds=0.3"]
    argv += ["--evaluations=1", "--val_tokens=500", *TINY, "--n_layer=2"]
    return list(sprint.sprint(sprint_options(*argv, *more)))


def test_seeds_of_a_recipe_share_what_is_compiled(data_dir, tmp_path, monkeypatch):
    """In one process they train as in two, each is saved, and the second one compiles nothing."""
    monkeypatch.setattr(sprint, "calibrate", lambda state, config, *_: (config, 1.0))
    monkeypatch.setattr(sprint, "recalibrate", lambda config, *_: config)
    compiling = functools.partialmethod(torch.nn.Module.compile, backend="eager")  # Dynamo alone
    monkeypatch.setattr(LanguageModel, "compile", compiling)
    more = ["--max_steps=6", "--seconds=100", "--compile_model=True", f"--out_dir={tmp_path}"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    (apart,) = sprint_of(data_dir, *more, "--seeds=2")
    compiled = graphs["unique_graphs"]
    first, second = sprint_of(data_dir, *more, "--seeds=1,2", "--save", "--val_block_size=8")
    assert graphs["unique_graphs"] == compiled > 0
    assert (first["seed"], second["seed"]) == (1, 2)
    assert second["val_loss"] == apart["val_loss"] != first["val_loss"]
    first, second = (GPT2.from_checkpoint(tmp_path / f"x-{i}" / "out_ckpt.pt") for i in (1, 2))
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_seeds_share_a_process_where_no_device_waits():
    def jobs(devices: str) -> list[tuple[int, ...]]:
        path = ROOT / "configs/speedrun.toml"
        recipes = [f"a = {path}", f"b = {path}", "--seeds=1,2", f"--devices={devices}"]
        return [job.seeds for job in sprint.recipes(sprint_options(*recipes))]

    assert jobs("cuda:0") == jobs("cuda:0,cuda:1") == [(1, 2), (1, 2)]
    assert jobs("cuda:0,cuda:1,cuda:2") == [(1,), (2,), (1,), (2,)]


def test_a_sprint_refuses_what_it_would_ignore(monkeypatch, capsys, data_dir):
    for given, said in (
        (["a = x.toml --seed=7"], "a: --seeds is one for all recipes; take it out of this one"),
        (["a = x.toml --seed 7"], "a: --seeds is one for all recipes; take it out of this one"),
        (["a = x.toml", "--evaluations=0"], "--evaluations=0: use 1 or more"),
        (["a = x.toml"], "a: --config=x.toml: No such file"),
        ([f"a = {ROOT / 'configs/speedrun.toml'} --window=4096"], "a: window=4096 is the whole"),
        ([f"{ROOT / 'configs/speedrun.toml'}", "--secnds=2"], "unknown option --secnds; did you"),
    ):
        monkeypatch.setattr(sys, "argv", ["sprint", *given, "--data_dir=x"])
        assert sprint.main() == 2
        assert said in capsys.readouterr().err
    for size in (64, -1):
        with pytest.raises(UserError, match=f"val_block_size={size}: use 0 to 32, the context"):
            sprint_of(data_dir, f"--val_block_size={size}")


def test_a_signal_ends_all_seeds_and_keeps_no_model(data_dir, tmp_path, monkeypatch):
    """What a stopped seed had reached is no result, and no further seed begins."""
    done, original = [], sprint.validate

    def validate(state, *given):
        done.append(state.step)
        if state.step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(state, *given)

    monkeypatch.setattr(sprint, "validate", validate)
    with pytest.raises(sprint.Stopped):
        sprint_of(data_dir, "--seeds=1,2", "--save", f"--out_dir={tmp_path}", "--evaluations=2")
    assert len(done) == 2
    assert not list(tmp_path.rglob("*.pt"))


def test_a_model_that_cannot_be_saved_is_reported(data_dir, tmp_path):
    (tmp_path / "sprint_gpt2_adamw-1" / "out_ckpt.pt" / "x").mkdir(parents=True)
    done = run_python(
        "-m", "benchmarks.sprint", "configs/sprint_gpt2_adamw.toml", *TINY, "--seconds=0.2",
        f"--data_dir={data_dir}", "--evaluations=1", "--val_tokens=500", f"--out_dir={tmp_path}",
        "--devices=cpu", "--seeds=1,2", "--save", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "sprint_gpt2_adamw (seed 1): failed" in done.stdout
    assert "not written" in done.stderr


def test_a_seed_that_failed_counts_nowhere(tmp_path):
    def row(name: str, seed: int, loss: float) -> dict:
        row = {"name": name, "seed": seed, "val_loss": loss, "seconds": 1.0, "step": 1}
        return row | {"tokens_per_second": 1.0, "peak_gib": None, "device": "x"}

    rows = [row("a", seed, 4.0 + seed / 100) for seed in (1, 2, 3)]
    rows += [row("b", seed, 3.9 + seed / 100) for seed in (1, 2, 3)]
    rows += [row("b", 4, 9.0), {"name": "b", "seed": 4, "failed": 1}]
    said = sprint_report.report(rows)
    assert "| b | 3.92" in said and "-0.1000" in said  # noqa: PT018
    assert "b` is 0.1000 nats below" in said
    sprint_report.draw(rows, tmp_path / "x.png")


def test_recipes_of_other_contexts_compare_in_equal_windows():
    """A longer context lowers the loss by itself."""

    def rows(context: int, loss: float, there: float | None) -> list[dict]:
        row = {"name": f"c{context}", "block_size": context, "device": "x", "peak_gib": None}
        more = {"val_block_size": 8, "val_loss_there": there} if there else {}
        numbers = {"tokens_per_second": 1.0}
        return [
            row | more | numbers | {"seed": n, "val_loss": loss + n / 100, "seconds": n, "step": n}
            for n in (1, 3)
        ]

    alone = sprint_report.report(rows(16, 4.0, None) + rows(32, 3.0, None))
    assert "Contexts of 16, 32 tokens" in alone
    earlier = [{k: v for k, v in row.items() if k != "block_size"} for row in rows(32, 3.0, None)]
    assert "of 16 tokens and of rows that do not name it:" in sprint_report.report(
        rows(16, 4.0, None) + earlier
    )
    assert alone.endswith("do not compare; use --val_block_size=.\n")
    assert "| 2 | 2.0 | 2 |" in alone  # two seeds: means of their seconds and steps
    assert "-1.0000" not in alone
    both = sprint_report.report(rows(16, 4.0, 4.5) + rows(32, 3.0, 4.5))
    assert "In windows of 8:" in both
    assert "`c16` and `c32` have equal losses" in both
    equal = sprint_report.report(rows(16, 4.0, None))
    assert "Contexts" not in equal


def test_losses_in_shorter_windows(gpt2_data_dir, tmp_path):
    (row,) = sprint_of(gpt2_data_dir, "--val_block_size=8", f"--out_dir={tmp_path}", "--save")
    saved = tmp_path / "x-1" / "out_ckpt.pt"
    argv = [str(saved), f"--data_dir={gpt2_data_dir}", "--block_size=8"]
    assert GPT2.from_checkpoint(saved).config.block_size == 32
    found, on = tmp_path / "found.json", ["--device=cpu", "--dtype=float32"]
    assert main(["eval", *argv, "--eval_tokens=500", f"--json={found}", *on]) == 0
    there = json.loads(found.read_text())["val_loss"]
    assert row["val_loss_there"] == pytest.approx(there, abs=1e-5)
    assert row["val_loss_there"] != row["val_loss"]


@pytest.mark.parametrize("first", [0.01, 0.2])  # seconds of the first step
@pytest.mark.parametrize("expected", [0.008, 0.02])  # of a step, by the measurement before
def test_a_sprint_fills_its_time(data_dir, monkeypatch, first, expected):
    """A clock by which a step takes 10 ms."""
    now, launch = [0.0], step_module.train_step

    def train_step(state, config, rt):
        now[0] += 0.01 if state.step else first
        return launch(state, config, rt)

    def calibrate(state, config, *_):
        optim = replace(config.optim, max_steps=int(0.985 / expected))
        return replace(config, optim=optim), expected / 64

    monkeypatch.setattr(sprint, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(sprint, "step_module", SimpleNamespace(train_step=train_step))
    monkeypatch.setattr(sprint, "calibrate", calibrate)
    rows = sprint_of(data_dir, "--seconds=1", "--evaluations=4")
    assert [row["ended"] for row in rows] == [False, False, False, True]
    assert rows[-1]["step"] == rows[-1]["max_steps"]
    assert 0.97 < rows[-1]["seconds"] <= 1


def test_the_clock_of_a_sprint_knows_that_windows_grow(data_dir, monkeypatch):
    """The speed is measured at both ends; then training begins with the narrow ones."""
    assert shares_of_ends(OptimOptions(), 64) == {64: 1.0}
    shares = shares_of_ends(OptimOptions(window_warmup=0.5), 64)
    # 8, 16 … 56 over half of the run, 64 over the rest
    assert sum(width * share for width, share in shares.items()) == pytest.approx(48, abs=0.1)
    assert shares.keys() == {8, 64}
    seen, limit = [], Modern.limit_attention_window

    def watched(self, positions):
        seen.append(positions)
        limit(self, positions)

    monkeypatch.setattr(Modern, "limit_attention_window", watched)
    switches = ["--window_pattern=SL", "--window=16", "--window_warmup=0.5"]
    (row,) = sprint_of(data_dir, *switches)
    assert seen[:2] == [4, 32]  # nothing else while the speed is measured
    assert seen[2] == 4 and sorted(seen[2:]) == seen[2:]  # noqa: PT018
    assert seen[-1] == 32 or row["step"] <= 0.5 * row["max_steps"] + 1


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.alone
def test_the_gib_of_a_sprint_are_those_of_a_recorded_step_too(data_dir):
    """Replays allocate nothing, so a counter that is cleared after recording would not see them."""
    sizes = ["--n_layer=16", "--n_embd=256", "--n_head=4", "--block_size=256", "--batch_size=64"]
    sizes += ["--total_batch_tokens=16384", "--device=cuda:0", "--dtype=bfloat16"]
    torch.cuda.reset_peak_memory_stats()
    (row,) = sprint_of(data_dir, *sizes, "--seconds=1", "--compile_model=True")
    lasting = 16 * row["parameters"]  # weights, gradients, two moments, in float32
    assert row["peak_gib"] * 2**30 > 2 * lasting


def test_a_sprint_begins_with_given_weights(gpt2_data_dir, tmp_path):
    model = GPT2(n_layer=2, n_head=1, n_embd=16, block_size=32)
    for p in model.parameters():
        p.data.mul_(20)
    model.save(tmp_path / "m.pt")
    sizes = [f"--init={tmp_path / 'm.pt'}", "--learning_rate=0"]
    (row,) = sprint_of(gpt2_data_dir, "--seconds=1", *sizes)
    assert row["val_loss"] > 12


def test_a_sprint_of_several_recipes_has_no_single_seed_or_device(monkeypatch, capsys):
    for option in ("--seed=7", "--device=cpu"):
        given = ["sprint", "configs/speedrun.toml", "--data_dir=x", option]
        monkeypatch.setattr(sys, "argv", given)
        assert sprint.main() == 2
        assert "use --seeds and --devices" in capsys.readouterr().err
