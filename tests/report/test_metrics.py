import errno
import io
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2.errors import UserError
from gpt2.report import console, metrics, throughput, trackers
from gpt2.report.console import console_line, eval_line, format_count, format_seconds
from gpt2.report.metrics import join, measured, open_run, read_metrics
from gpt2.report.throughput import Throughput, peak_flops


def open_log(folder, **changes):
    given = {"config": {"lr": 1e-3}, "sinks": "", "run_name": "", "resume_step": None}
    return open_run(folder, **(given | {"is_main": True} | changes))


def write_steps(folder, last, **changes):
    with open_log(folder, **changes) as log:
        for step in range(1, last + 1):
            log.record(step, loss=10.0 / step)


# Messages


def test_messages_go_to_their_streams(capsys):
    console.log("a\nb")
    console.warn("two\n lines")
    console.error("wrong")
    out, err = capsys.readouterr()
    assert out == "a\nb\n"
    assert err == "warning: two lines\nerror: wrong\n"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "8 ? 2"), ("cp1252", "8 × 2")])
def test_a_poor_console_does_not_crash(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    console.log("8 × 2 \N{ALMOST EQUAL TO} 16")
    assert stream.buffer.getvalue().decode(encoding) == f"{shown} ? 16\n"


def test_lines_that_nobody_reads_are_dropped_until_the_end(monkeypatch, capsys):
    called = []

    class Unread(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def work():
        with console.unread(lambda: called.append(1)):
            console.log("a")
            console.log("b")
            console.warn("c")
            called.append(2)

    work()
    assert called == [2]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Unread())
        with pytest.raises(BrokenPipeError):
            work()
        with pytest.raises(BrokenPipeError):  # outside of a block at once
            console.log("d")
    assert called == [2, 1, 2]
    work()
    assert capsys.readouterr() == ("a\nb\n" * 2, "warning: c\n" * 3)


# metrics.jsonl


def test_lines_are_on_disk_at_once_in_the_order_given(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with open_log(path.parent) as log:
        log.record(1, loss=2.5, lr=np.float32(0.5), mfu=None, tokens=np.int64(7))
        assert path.read_bytes() == b'{"step": 1, "loss": 2.5, "lr": 0.5, "tokens": 7}\n'
        log.record(2, val_loss=np.float64(1) / 3)
    assert read_metrics(path)[1] == {"step": 2, "val_loss": 1 / 3}  # every digit is kept


def test_tensors_are_accepted(tmp_path):
    import torch

    with open_log(tmp_path) as log:
        log.record(1, loss=torch.tensor(1.5), grad_norm=torch.tensor(float("inf")))
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.5, "nonfinite": ["grad_norm"]}
    ]


def test_nan_becomes_a_name_and_the_file_stays_json(tmp_path):
    with open_log(tmp_path) as log:
        log.record(3, loss=float("nan"), lr=0.1, grad_norm=float("-inf"))
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {"step": 3, "lr": 0.1, "nonfinite": ["loss", "grad_norm"]}
    assert [str(measured(line, name)) for name in ("loss", "lr", "mfu")] == ["nan", "0.1", "None"]


def test_lines_of_a_step_keep_what_was_not_finite():
    found = {}
    join(found, {"step": 1, "loss": 1.0, "nonfinite": ["grad_norm"]})
    join(found, {"step": 1, "nonfinite": ["val_loss", 3, []]})
    assert found == {"step": 1, "loss": 1.0, "nonfinite": ["grad_norm", "val_loss"]}
    join(found, {"step": 1, "val_loss": 2.0, "nonfinite": ["loss"]})  # the later line counts
    join(found, {"step": 1, "grad_norm": 2.0, "nonfinite": "odd"})
    assert found == {"step": 1, "val_loss": 2.0, "grad_norm": 2.0, "nonfinite": ["loss"]}


def test_a_deleted_file_comes_back(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with open_log(path.parent) as log:
        log.record(1, loss=1.0)
        path.unlink()
        path.parent.rmdir()
        log.record(2, loss=2.0)
    assert [row["step"] for row in read_metrics(path)] == [2]


def test_a_log_that_cannot_be_written_does_not_stop_training(tmp_path, capsys):
    with open_log(tmp_path) as log:
        (tmp_path / "metrics.jsonl").mkdir()  # stands in for a full disk
        log.record(1, loss=1.0)
        log.record(2, loss=1.0)
        (tmp_path / "metrics.jsonl").rmdir()
        log.record(3, loss=1.0)
    assert capsys.readouterr().err.count("warning: ") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3]


def test_resume_drops_later_steps_and_a_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, 8)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + b'{"step": 3, "lo\xc3')
    with open_log(tmp_path, resume_step=5) as log:
        assert path.read_bytes() == b"".join(whole[:5])  # bit for bit what was there
        log.record(6, loss=0.5)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_resume_with_a_log_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: .*; the log stays as it was"):
        open_log(tmp_path, resume_step=1).__enter__()


def test_recorded_joins_the_lines_of_a_step(tmp_path):
    with open_log(tmp_path) as log:
        log.record(1, loss=2.0)
        log.record(2, loss=1.5)
        log.record(2, val_loss=1.6)
        assert log.recorded(2) == {"step": 2, "loss": 1.5, "val_loss": 1.6}
        assert log.recorded(3) == {}
    with open_log(tmp_path, is_main=False) as log:
        assert log.recorded(2) == {}


def test_resume_at_step_0_and_without_a_file(tmp_path):
    write_steps(tmp_path, 2)
    with open_log(tmp_path, resume_step=0):
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    write_steps(tmp_path / "other", 2, resume_step=7)
    assert len(read_metrics(tmp_path / "other" / "metrics.jsonl")) == 2


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    write_steps(tmp_path, 2)
    with pytest.raises(UserError, match="holds another run"), open_log(tmp_path):
        pass
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    write_steps(tmp_path, 1)


def test_other_ranks_write_nothing(tmp_path):
    folder = tmp_path / "run"
    with open_log(folder, is_main=False, sinks="tensorboard") as log:
        log.record(1, loss=1.0)
    assert not folder.exists()


# Sinks


class FakeSink:
    notice = "open"
    fails_in = ""

    def __init__(self, out_dir, config, run_name, resume_step):
        self.calls = []
        FakeSink.last = self
        self._do("init", run_name, resume_step, config)

    def log(self, step, values):
        self._do("log", step, values)

    def close(self, failed):
        self._do("close", failed)

    def _do(self, *call):
        self.calls.append(call)
        if call[0] == self.fails_in:
            raise ConnectionError("the service is away")


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(trackers.SINKS, "wandb", FakeSink)
    monkeypatch.setattr(FakeSink, "fails_in", "")
    return FakeSink


def test_sinks_get_the_finite_numbers(tmp_path, fake, capsys):
    with open_log(tmp_path / "nice", sinks=" wandb,,wandb ") as log:
        log.record(1, loss=1.0, mfu=None, lr=float("nan"), note="text")
    assert fake.last.calls == [
        ("init", "nice", None, {"lr": 1e-3}),
        ("log", 1, {"loss": 1.0}),
        ("close", False),
    ]
    assert capsys.readouterr().out == "open\n"


def test_a_failed_run_is_marked(tmp_path, fake):
    with pytest.raises(KeyboardInterrupt), open_log(tmp_path, sinks="wandb", run_name="x"):
        raise KeyboardInterrupt
    assert fake.last.calls == [("init", "x", None, {"lr": 1e-3}), ("close", True)]


@pytest.mark.parametrize("where", ["init", "log", "close"])
def test_a_failing_sink_does_not_kill_the_run(tmp_path, fake, monkeypatch, capsys, where):
    monkeypatch.setattr(fake, "fails_in", where)
    write_steps(tmp_path, 3, sinks="wandb")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1
    assert "--log_to=wandb failed" in err
    assert "ConnectionError: the service is away" in err
    assert (
        len([call for call in fake.last.calls if call[0] == "log"])
        == {
            "init": 0,
            "log": 1,
            "close": 3,
        }[where]
    )


@pytest.mark.parametrize("is_main", [True, False])
def test_wrong_names_are_explained_on_every_rank(tmp_path, monkeypatch, is_main):
    with pytest.raises(UserError, match="did you mean wandb"):
        open_log(tmp_path, sinks="wandbb", is_main=is_main).__enter__()
    with pytest.raises(UserError, match="use wandb, tensorboard, trackio"):
        open_log(tmp_path, sinks="neptune", is_main=is_main).__enter__()
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    with pytest.raises(UserError, match=r'trackio; run: pip install -e "\.\[track\]"'):
        open_log(tmp_path, sinks="tensorboard,trackio", is_main=is_main).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_back_equal_values_also_after_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_steps(tmp_path, 5, sinks="tensorboard")
    with open_log(tmp_path, sinks="tensorboard", resume_step=3) as log:
        log.record(4, loss=40.0, val_loss=4.5)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(1, 10.0), (2, 5.0), (3, 10 / 3), (4, 40.0)]  # 4 and 5 of the first run are gone
    assert [step for step, _ in read] == [step for step, _ in expected]
    assert [v for _, v in read] == [float(np.float32(v)) for _, v in expected]
    assert [(event.step, event.value) for event in events.Scalars("val_loss")] == [(4, 4.5)]


def run_apart(folder, sink, **env):
    """Logs two steps, resumes at 1 and logs step 2 again, in a process with its own variables."""
    code = f"""
from pathlib import Path
from gpt2.report.metrics import open_run
for resume, steps in ((None, (1, 2)), (1, (2,))):
    with open_run(Path({str(folder)!r}), config={{"lr": 0.5}}, sinks={sink!r}, run_name="demo",
                  resume_step=resume, is_main=True) as log:
        for step in steps:
            log.record(step, loss=10.0 / step)
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TRACKIO_"))}
    home = {"HOME": str(folder), "USERPROFILE": str(folder), "NETRC": str(folder / "none")}
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | home | {"PYTHONIOENCODING": "utf-8"} | env,
        cwd=Path(metrics.__file__).parents[2],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "warning: " not in process.stderr, process.stderr
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    return process.stdout


@pytest.mark.slow
def test_wandb_without_an_account_stays_offline_and_resumes(tmp_path):
    pytest.importorskip("wandb")
    out = run_apart(tmp_path, "wandb")
    assert "no API key" in out
    run_id = (tmp_path / "wandb_id.txt").read_text(encoding="utf-8")
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"))
    folders = [p for p in (tmp_path / "wandb").iterdir() if p.name.startswith("offline-run")]
    assert len(files) == len(folders) == 2  # both parts belong to one run
    assert all(b"loss" in file.read_bytes() for file in files)


@pytest.mark.slow
def test_wandb_mode_of_the_user_counts(tmp_path):
    pytest.importorskip("wandb")
    assert "no API key" not in run_apart(tmp_path, "wandb", WANDB_MODE="disabled")
    assert not list(tmp_path.glob("wandb/*run-*"))
    assert not (tmp_path / "wandb_id.txt").exists()


@pytest.mark.slow
def test_trackio_keeps_one_local_run(tmp_path):
    pytest.importorskip("trackio")
    run_apart(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "db"))
    (file,) = (tmp_path / "db").glob("*.db")
    connection = sqlite3.connect(file)
    there = {column[1] for column in connection.execute("pragma table_info(metrics)")}
    run = "run_id" if "run_id" in there else "run_name"  # by which trackio 0.20 knows a run
    rows = connection.execute(f"select {run}, run_name, step, metrics from metrics order by id")
    rows = rows.fetchall()
    connection.close()
    assert len({row[0] for row in rows}) == 1
    assert [(row[1], row[2], json.loads(row[3])["loss"]) for row in rows] == [
        ("demo", 1, 10.0),
        ("demo", 2, 5.0),
        ("demo", 2, 5.0),  # written again after the resume; trackio cannot take back
    ]


# Console


def test_console_line_shows_everything_aligned():
    values = {"step": 120, "loss": 6.12345, "lr": 3e-4, "grad_norm": 1.2344}
    values |= {"tokens_per_second": 1_250_000.0, "mfu": 0.4512}
    line = console_line(values, max_steps=19_073, seconds_left=4980)
    for part in ("120/19,073", "0.6%", "loss  6.1235", "lr 3.00e-04", "norm  1.234"):
        assert part in line
    for part in ("1.25M tok/s", "MFU 45.1%", "1h23m left"):
        assert part in line
    first = {"step": 1, "loss": 10.9, "lr": 3e-7, "grad_norm": 22.0, "tokens_per_second": 950.0}
    other = console_line(first, max_steps=19_073, seconds_left=None)
    assert "MFU   n/a" in other
    assert "n/a left" in other
    assert [i for i, c in enumerate(line) if c == "|"] == [
        i for i, c in enumerate(other) if c == "|"
    ]


def test_console_line_survives_a_diverged_step():
    values = {"step": 2, "loss": float("nan"), "grad_norm": float("inf"), "mfu": None}
    line = console_line(values, max_steps=2, seconds_left=float("inf"))
    assert "loss     nan" in line
    assert "norm    inf" in line
    assert "100.0%" in line


def test_eval_line():
    assert eval_line(1250, 3.28125, 26.6089, 0.98765, 10_485_760) == (
        "step 1,250 | val loss 3.2812 | perplexity 26.61 | 0.9877 bits per byte | over 10.5M tokens"
    )
    assert "bits" not in eval_line(1, 3.0, 20.0, None, 100)


@pytest.mark.parametrize(
    ("seconds", "text"),
    list(
        zip(
            (0, 59.4, 59.6, 245, 3599.6, 4980, 86_399, 273_600, float("inf")),
            ("0s", "59s", "1m00s", "4m05s", "1h00m", "1h23m", "23h59m", "3d04h", "inf"),
            strict=True,
        )
    ),
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    list(
        zip(
            (0, 950, 999.6, 12_345, 99_960, 999_600, 1_250_000, 9_997_000_000, 5e12),
            ("0", "950", "1.00k", "12.3k", "100k", "1.00M", "1.25M", "10.0B", "5000B"),
            strict=True,
        )
    ),
)
def test_format_count(count, text):
    assert format_count(count) == text


# Throughput


class FakeClock:
    now = 100.0

    def __call__(self):
        return self.now


def test_throughput_leaves_pauses_out():
    clock = FakeClock()
    meter = Throughput(clock)
    meter.start(seconds_before=50.0)
    assert meter.seconds_left(10) is None
    clock.now += 2
    meter.step(30)
    with meter.pause():
        clock.now += 1000
    clock.now += 1
    meter.step(30)
    assert meter.seconds() == 53.0  # also before the line of the lap, for a checkpoint
    assert meter.lap() == (20.0, 53.0)
    clock.now += 2
    meter.step(10)
    assert meter.lap() == (5.0, 55.0)


def test_a_lap_ends_when_the_device_was_done_not_when_somebody_asked():
    """Launching step n + 1 may keep the CPU busy until it is nearly over; the last step is alone.

    Timed by when the losses are read, the laps of steps of one second would take 1.9, 1 and 0.1.
    """
    clock = FakeClock()
    meter = Throughput(clock)
    rates = []
    for finished, asked in ((101, 101.9), (102, 102.9), (103, 103)):
        clock.now = asked
        meter.step(10, finished_at=finished)
        rates.append(meter.lap()[0])
    assert rates == [10.0, 10.0, 10.0]
    with meter.pause():
        clock.now += 7
    clock.now += 2
    meter.step(10)
    assert meter.lap() == (5.0, 5.0)


def test_the_first_step_and_pauses_are_outside_the_seconds_that_count():
    clock = FakeClock()
    meter = Throughput(clock)
    meter.start(seconds_before=50.0, first_steps=20.0)
    clock.now += 60  # compilation
    meter.step(10)
    assert (meter.counted(), meter.first_steps) == (30.0, 80.0)
    for _ in range(2):
        clock.now += 4
        meter.step(10)
        with meter.pause():
            clock.now += 1000
    assert meter.counted() == 38.0
    meter.lap()
    assert meter.counted() == 38.0
    assert [meter.next_is_last(limit) for limit in (0, 45.9, 46, 47)] == [False, True, False, False]


def test_a_failed_evaluation_is_a_pause_too():
    clock = FakeClock()
    meter = Throughput(clock)

    def evaluate():
        with meter.pause():
            clock.now += 9
            raise RuntimeError

    with pytest.raises(RuntimeError):
        evaluate()
    clock.now += 1
    meter.step(5)
    assert meter.lap() == (5.0, 1.0)


def test_compilation_does_not_spoil_the_time_left():
    clock = FakeClock()
    meter = Throughput(clock)

    def lap(seconds):
        clock.now += seconds
        meter.step(10)
        meter.lap()

    lap(60)  # compilation
    assert meter.seconds_left(100) == pytest.approx(600)  # nothing better is known yet
    lap(1)
    assert meter.seconds_left(100) == pytest.approx(10)
    lap(1)
    lap(45)  # a step that recompiles, or waits for a disk
    assert meter.seconds_left(100) == pytest.approx(10)
    for _ in range(150):
        lap(2)  # from here on the machine is slower
    assert meter.seconds_left(100) == pytest.approx(20)


def test_a_lap_without_steps_is_harmless():
    clock = FakeClock()
    meter = Throughput(clock)
    assert meter.lap() == (0.0, pytest.approx(0, abs=1e-6))
    assert meter.seconds_left(5) is None


# Peak FLOP/s


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H200 NVL", "bfloat16", 835.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H100 NVL", "float16", 835.5),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5),
        ("NVIDIA A100-PCIE-40GB", "float16", 312),
        ("NVIDIA A800-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A10G", "bfloat16", 70),
        ("NVIDIA A40", "bfloat16", 149.7),
        ("NVIDIA RTX A6000", "bfloat16", 154.8),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40", "bfloat16", 181),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla T4", "float16", 65),
        ("Tesla T4", "float32", 8.1),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-PCIE-32GB", "float16", 112),
        ("Tesla P100-PCIE-16GB", "float32", 9.3),
        ("NVIDIA GeForce RTX 2080 Ti", "float16", 53.8),
        ("NVIDIA GeForce RTX 3060", "bfloat16", 25.5),
        ("NVIDIA GeForce RTX 3080", "bfloat16", 59.5),
        ("NVIDIA GeForce RTX 3090", "bfloat16", 71),
        ("NVIDIA GeForce RTX 4070", "bfloat16", 58.3),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 4090", "float32", 82.6),
        ("NVIDIA GeForce RTX 5090", "float16", 209.5),
    ],
)
def test_peak_of_known_cards(name, dtype, tflops):
    assert peak_flops(name, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Tesla T4", "bfloat16"),  # emulated there
        ("Tesla V100-SXM2-16GB", "bfloat16"),
        ("Tesla P100-PCIE-16GB", "bfloat16"),
        ("NVIDIA GeForce RTX 2080 Ti", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
        ("NVIDIA GeForce RTX 2080", "float16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"),
        ("NVIDIA H20", "bfloat16"),
        ("NVIDIA A100X", "bfloat16"),
        ("NVIDIA A1000", "bfloat16"),
        ("AMD Instinct MI300X", "bfloat16"),
        ("Intel(R) Xeon(R) Processor", "float32"),
        ("cpu", "float32"),
        ("", "float32"),
        ("NVIDIA H200", "float64"),
    ],
)
def test_peak_of_anything_else_is_not_guessed(name, dtype):
    assert peak_flops(name, dtype) is None


def test_the_table_is_plausible():
    for name, (half, single) in throughput._PEAK_TFLOPS.items():
        assert 1.9 < half / single < 31, name  # tensor cores against ordinary ones
        assert peak_flops(name, "float32") == single * 1e12


def test_a_name_that_is_not_utf8_is_logged(tmp_path):
    """Python keeps the bytes of such a file name as lone surrogates."""
    log = metrics.RunLog(tmp_path / "metrics.jsonl")
    log.started(3, changed={"data_dir": ["a", "\udcff"]})
    log.record(3, text="é")
    assert (tmp_path / "metrics.jsonl").read_text("utf-8") == '{"step": 3, "text": "é"}\n'
    (row,) = read_metrics(tmp_path / "history.jsonl")
    assert row == {"step": 3, "changed": {"data_dir": ["a", "\udcff"]}}
