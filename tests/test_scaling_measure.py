"""`benchmarks.scaling --measure`: its rows, how they are run and ended, and what is made of them.

Here small programs stand for training runs; one test trains tiny networks on CPUs.
"""

import contextlib
import json
import os
import signal
import sys
import time

import pytest
import torch

from benchmarks import scaling, scaling_measure
from benchmarks.scaling_measure import Running, chosen, run_all
from benchmarks.scaling_report import corrected, on_paper, read, share_of_ideal, table
from benchmarks.scaling_rows import Row, rows
from gpt2.config.command_line import parse
from gpt2.config.train import TrainConfig, plan_batch
from gpt2.errors import UserError

from .conftest import run_python

TRAINS = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[1])
time.sleep(0.2)  # until the first step
out.mkdir()
with open(out / "metrics.jsonl", "w") as log:
    for step in range(1, 20):
        line = {"step": step, "tokens_per_second": 100.0 + step, "seconds": step, "peak_gib": 7.5}
        log.write(json.dumps(line) + chr(10))
time.sleep(60)
"""
RUNS_OUT = "import time; print('gpt2: error: out of GPU memory', flush=True); time.sleep(60)"
BREAKS = "print('before'); raise ValueError('too hot')"
WAITS = "import time; time.sleep(60)"
WITHOUT_GRAPH = "print('going on without a graph: out of memory'); raise ValueError('cold')"


def row(label: str, gpus: int = 1, **more) -> Row:
    return Row(label=label, gpus=gpus, tiny=True, block_size=8, batch_size=1, **more)


@pytest.fixture
def programs(monkeypatch):
    """Rows run the program that their label names; gives the list of all that were started."""
    started = []
    code = {"trains": TRAINS, "runs out": RUNS_OUT, "breaks": BREAKS, "waits": WAITS}
    code["no graph"] = WITHOUT_GRAPH
    monkeypatch.setattr(
        scaling_measure,
        "command",
        lambda row, data, out: [sys.executable, "-SE", "-c", code[row.label], str(out)],
    )
    original = Running.__init__

    def init(self, *arguments):
        original(self, *arguments)
        started.append(self)

    monkeypatch.setattr(Running, "__init__", init)
    monkeypatch.setattr(scaling_measure, "POLL", 0.01)
    return started


def results(plan, tmp_path, cards=("0",), seconds=30.0) -> list[tuple[str, str]]:
    found = run_all(plan, cards, tmp_path, time.monotonic() + seconds)
    return [(line["label"], line["result"]) for line in found]


# ---- the rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_rows_are_valid_runs_of_what_was_asked(gpus):
    found = rows(gpus)
    recipe = {(r.gpus, r.tokens_per_step, r.parallel) for r in found if r.label == "124M"}
    counts = [n for n in (1, 2, 4, 8) if n <= gpus]
    assert recipe >= {(n, tokens, "ddp") for n in counts for tokens in (524_288, 1_048_576)}
    assert ((gpus, 524_288, "fsdp") in recipe) == (gpus > 1)
    of_all = {r.label: r for r in found if r.gpus == gpus}
    assert of_all.keys() >= {"medium", "XL", "XL, activation checkpointing", "speedrun.toml"}
    assert of_all["XL"].parallel == ("fsdp" if gpus > 1 else "ddp")
    for each in found:
        if each.reduces:
            continue
        config = parse(TrainConfig, each.arguments(), "test")
        plan = plan_batch(config.data, config.model.block_size, each.gpus)
        assert plan.tokens_per_step == each.tokens_per_step, each
        assert config.system.activation_checkpointing == str(each.checkpointing)


def test_every_row_of_several_gpus_has_a_row_of_one_beside_it():
    for gpus, tiny in ((8, False), (2, False), (2, True)):
        found = rows(gpus, tiny)
        ones = {(r.label, r.tokens_per_step) for r in found if r.gpus == 1}
        wanted = {
            (r.label, r.facts()["ideal_tokens"]) for r in found if r.gpus > 1 and not r.reduces
        }
        assert wanted <= ones


def test_what_a_machine_of_eight_needs_fits_into_eight_minutes():
    """As if rows filled the GPUs without a gap; the seconds of a row are rough."""
    busy = sum(r.seconds * r.gpus for r in rows(8)) / 8
    assert busy < scaling_measure.SECONDS - scaling_measure.RESERVE


# ---- running them --------------------------------------------------------------------------------


def test_a_row_that_fails_costs_no_other(programs, tmp_path):
    labels = ("runs out", "breaks", "no graph", "trains")
    found = results([row(label) for label in labels], tmp_path)
    assert found == [
        ("runs out", "out of memory"),
        ("breaks", "failed: exit code 1: ValueError: too hot"),
        ("no graph", "failed: exit code 1: ValueError: cold"),
        ("trains", "measured"),
    ]
    ended = [-each._process.poll() for each in programs]
    assert ended == [signal.SIGQUIT, -1, -1, signal.SIGQUIT]


def test_rows_end_also_behind_an_ampersand(programs, tmp_path):
    """There a shell has commands ignore the signal by which rows are ended."""
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    try:
        assert results([row("trains")], tmp_path) == [("trains", "measured")]
    finally:
        signal.signal(signal.SIGQUIT, before)
    assert programs[0]._process.poll() == -signal.SIGQUIT


def test_the_numbers_are_those_of_the_steady_steps(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_measure, "TINY_STEPS", (4, 10, 3.0))
    (line,) = run_all([row("trains")], ["0"], tmp_path, time.monotonic() + 30)
    assert line["steps"] == 15
    assert line["tokens_per_second"] == 112  # of the steps 5 to 19
    assert line["peak_gib"] == 7.5
    assert 0.2 <= line["first_step_seconds"] < 30


def test_rows_run_side_by_side_where_there_are_gpus(programs, tmp_path):
    plan = [row("trains", card=1), row("trains"), row("trains", gpus=2), row("trains")]
    lines = list(run_all(plan, ["6", "7"], tmp_path, time.monotonic() + 30))
    assert [each.cards for each in programs] == [["7"], ["6"], ["6", "7"], ["6"]]
    assert [line["result"] for line in lines] == ["measured"] * 4
    assert programs[2]._began > programs[1]._ending > 0
    assert programs[1]._began < programs[0]._ending


def test_rows_that_do_not_fit_are_named(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(Row, "seconds", property(lambda self: 99.0 * (self.label == "trains")))
    found = results([row("waits"), row("trains"), row("breaks")], tmp_path, ["0", "1"], 0.5)
    assert sorted(found)[1:] == [
        ("trains", "skipped: does not fit in the time left"),
        ("waits", "out of time"),
    ]
    assert programs[0]._process.poll() == -signal.SIGQUIT


def options(out_dir, *more):
    return scaling.parser().parse_args(["--measure", f"--out_dir={out_dir}", *more])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_there(programs, tmp_path, monkeypatch, capsys, number):
    """Also behind `&`, where a shell has commands ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    plan = [row("trains"), row("waits", card=1), row("waits")]
    monkeypatch.setattr(scaling_measure, "find_cards", lambda device: ["0", "1"])
    monkeypatch.setattr(scaling_measure, "chosen", lambda cards, options: plan)
    monkeypatch.setattr(scaling_measure, "told", lambda line: signal.raise_signal(number))
    monkeypatch.setattr(scaling_measure, "make_data", lambda folder: None)
    try:
        assert scaling_measure.measure(options(tmp_path)) == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    (line,) = map(json.loads, (tmp_path / "scaling.jsonl").open())
    assert line["name"] == "trains, 1 GPU, 8 tokens"
    assert line["result"] == "measured"
    said = capsys.readouterr().out
    assert "| waits, 1 GPU, 8 tokens | skipped: stopped before |" in said
    assert said.strip() == (tmp_path / "scaling.md").read_text().strip()
    assert all(each._process.poll() == -signal.SIGQUIT for each in programs)
    for each in programs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each._process.pid, 0)
            pytest.fail("a row runs on")
    with pytest.raises(UserError, match="holds another measurement"):
        scaling_measure.measure(options(tmp_path))


def test_mistakes_get_one_line(monkeypatch, tmp_path, capsys):
    file = tmp_path / "other.jsonl"
    file.write_text('{"loss": 1}\n')
    mistakes = {
        ("--seconds=9",): "--seconds is for --measure",
        ("--out_dir=x",): "--out_dir is for --measure and --report",
        ("--measure", "--seconds=0"): "use a number above 0",
        ("--measure", "--seconds=-1"): "--seconds=-1: use a number above 0",
        ("--measure", "--device=cpu", "--only=9 GPUs"): "no row has this in its name; rows: 124M,",
        ("--report", "nothing.jsonl"): "--measure writes such a file",
        ("--report", str(file)): "it is another file",
    }
    if not torch.cuda.is_available():
        mistakes["--measure",] = "no CUDA device: --measure needs NVIDIA GPUs"
    for given, wanted in mistakes.items():
        monkeypatch.setattr(sys, "argv", ["scaling", *given])
        assert scaling.main() == 2, given
        said = capsys.readouterr().err
        assert wanted in said
        assert said.count("\n") == 1


def test_three_gpus_count_as_two(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert scaling_measure.find_cards("cuda") == ["4", "5"]
    assert "3 GPUs, of which 2 are used" in capsys.readouterr().out
    plan = chosen(["4", "5"], options("x", "--only=FSDP", "--only=all-reduce"))
    assert {each.parallel for each in plan if not each.reduces} == {"fsdp"}
    assert len(plan) == 1 + 1 + 4


@pytest.mark.slow
def test_measures_tiny_networks_by_gloo(tmp_path):
    """One rank on each "GPU", two ranks, all-reduces; then the table."""
    only = ("1 GPU, 64 tokens", "DDP, 2 GPUs, 64 tokens", "all-reduce")
    done = run_python(
        "-m", "benchmarks.scaling", "--measure", "--device=cpu", f"--out_dir={tmp_path}",
        *(f"--only={part}" for part in only),
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "scaling.jsonl").open()]
    assert [line["result"] for line in lines] == ["measured"] * 5
    two, bandwidths = lines[2], [line for line in lines if "bytes" in line]
    assert two["name"] == "124M, DDP, 2 GPUs, 64 tokens"
    alone = sum(line["tokens_per_second"] for line in lines[:2])
    assert two["share_of_ideal"] == pytest.approx(two["tokens_per_second"] / alone, abs=1e-4)
    assert two["first_step_seconds"] > 0
    assert [line["bytes"] for line in bandwidths] == [4, 65_536]
    assert all(line["bus_bandwidth"] == line["bytes"] / line["seconds"] for line in bandwidths)
    assert "No prediction: it needs" in done.stdout
    assert done.stdout.count("tiny networks stand for those of the names") == 2
    assert (tmp_path / "scaling.md").read_text() in done.stdout
    assert (tmp_path / "scaling.png").stat().st_size > 5000


# ---- what is made of them ------------------------------------------------------------------------


def line(one: Row, rate: float, **more) -> dict:
    """A measured row."""
    own = {"result": "measured", "tokens_per_second": rate, "peak_gib": 9.0, "recorded": True}
    return one.facts() | own | {"first_step_seconds": 30.0, "device": "X", "torch": "2"} | more


def test_shares_and_predictions_are_plain_arithmetic():
    """A machine of eight: 10 ms all-reduce and 5 ms rest beside the share of one GPU."""
    shares = {n: scaling.BATCH_TOKENS // n for n in (8, 16, 32, 64)}
    plan = [each for each in rows(8) if each.label == "124M" and each.gpus == 1]
    rates = {t: t / (0.1 * 8 / n) for n, t in shares.items()} | {524_288: 600_000.0}
    found = [line(e, rates[e.tokens_per_step]) for e in plan if e.tokens_per_step in rates]
    eight = next(e for e in rows(8) if e.gpus == 8 and e.tokens_per_step == 524_288)
    of_eight = line(eight, 524_288 / 0.115)
    assert share_of_ideal(of_eight, found) == pytest.approx(524_288 / 0.115 / 8 / 600_000)
    sent = scaling.ring_bytes(4e8, 8)
    reduced = Row(label="all-reduce", gpus=8).facts() | {
        "result": "measured", "bytes": int(4e8), "seconds": 0.010, "bus_bandwidth": sent / 0.010,
    }  # fmt: skip
    said = corrected([*found, of_eight, reduced])
    assert (
        "115.0 ms = 100.0 ms of one GPU with its share + 10.0 ms all-reduce + 5.0 ms rest"
        in said[0]
    )
    # 16 GPUs: half of the share; 4e8 · 2 · 15/16 bytes by 70 GB/s, and 8 hops of 12 µs
    step = 0.05 + 4e8 * 2 * 15 / 16 / 70e9 + 8 * 12e-6 + 0.005
    assert said[4].startswith("| 16 GPUs | 50.0 ms | 10.8 ms | 5.0 ms | ")
    assert f"| {524_288 / step / 1e6:.2f}M |" in said[4]
    assert said[4].endswith("| 9.03M |")
    assert corrected(found) == ["No prediction: no all-reduce was measured."]


def test_the_model_on_paper_is_beside_every_row():
    found = [line(each, 500e3) for each in rows(8) if not each.reduces]
    papers = {one["name"]: on_paper(one, found) for one in found}
    assert papers["124M, DDP, 8 GPUs, 524,288 tokens"] == pytest.approx(4.71e6, rel=1e-3)
    assert papers["124M, 1 GPU, 65,536 tokens"] == pytest.approx(593e3, rel=1e-3)
    assert papers["XL, FSDP, 8 GPUs, 131,072 tokens"] < 8 * 50.7e3
    assert papers["124M, FSDP, 8 GPUs, 524,288 tokens"] < 8 * 593.4e3
    assert all(0 < one["gpus"] * 0.5 * 35e3 < papers[one["name"]] for one in found)


def test_tables_of_several_files(tmp_path):
    """Half a line of what was killed is left out; a later measurement replaces a skipped row."""
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    alone = [line(Row(label="XL", gpus=1, size="gpt2-xl"), rate) for rate in (40e3, 60e3)]
    skipped = Row(label="XL", gpus=2, parallel="fsdp", size="gpt2-xl", ideal_tokens=65_536)
    lost = skipped.facts() | {"result": "skipped: does not fit in the time left"}
    oom = Row(label="medium", gpus=2).facts() | {"result": "out of memory"}
    one.write_text("".join(json.dumps(each) + "\n" for each in (*alone, lost, oom)) + '{"na')
    other.write_text(json.dumps(line(skipped, 90e3)))
    first, second, third = table(read([one, other]))[2:]
    assert first == "| XL, 1 GPU, 65,536 tokens | 50.0k (40.0k to 60.0k) |  | 50.7k | 9.0 | 30 s |"
    assert second.startswith("| XL, FSDP, 2 GPUs, 131,072 tokens | 90.0k | 90.0% | ")
    assert third == "| medium, DDP, 2 GPUs, 131,072 tokens | out of memory | | | | |"


def test_the_report_of_a_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "scaling.jsonl"
    file.write_text(json.dumps(line(rows(1)[0], 600e3)))
    monkeypatch.setattr(sys, "argv", ["scaling", "--report", str(file), f"--out_dir={tmp_path}/x"])
    assert scaling.main() == 0
    assert "| 124M, 1 GPU, 524,288 tokens | 600.0k | " in capsys.readouterr().out
    assert (tmp_path / "x/scaling.png").stat().st_size > 5000
