"""What `make gpu-check` does around its commands; the commands themselves need a GPU."""

import json
import re
import shlex
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gpt2.config.command_line import parse
from gpt2.config.train import TrainConfig

from . import gpu_check
from .conftest import run_python
from .gpu_check import CHECKS, Check
from .test_readme import commands

LIMITS = (
    "--max_steps",
    "--out_dir",
    "--data_dir",
    "--eval_every",
    "--save_every",
    "--batch_size",
    "--max_new_tokens",
    "--seed",
    "--prompt",
    "--init",
    "--data",
    "--out",
    "--size",
    "--name",
    "--learning_rate",
    "--grad_accum_steps",
    "--nproc_per_node",
    "--standalone",
    "--json",
    "--text",
    "--hellaswag",
    "--lambada",
    "--steps",
    "--nanogpt",
    "--build_nanogpt",
    "--seconds",
    "--only",
)
# Commands of README and docs that no check runs, and why.
ELSEWHERE = {
    "gpt2 chat": "needs somebody who types; `sample` and `serve` run what it runs",
    "gpt2 train": "`python train_gpt2.py` is this command",
    "gpt2 lm_eval": "downloads its tasks",
    "torchrun --nnodes": "needs several machines",
    "--out_dir=out/small": "for a computer without a GPU",
    "--plugin=my_idea.py": "code of one's own; the loop calls it where it calls the built-in parts",
    "benchmarks.finetune": "minutes; the finetune checks run its paths",
    "benchmarks.sprint": "minutes; the speedrun check runs its path",
    "benchmarks.saving": "writes gigabytes for minutes; every training check saves",
    "--before=REV": "needs the repository's earlier revisions; the checks without it run the rest",
    "benchmarks.prepare": "uses no GPU",
    "benchmarks.loader": "minutes; every training check loads",
}
OF_A_GPU = (
    r"python train_gpt2|torchrun|python -m benchmarks|gpt2 (train|finetune|sample|chat|serve|"
)
OF_A_GPU += r"eval|lm_eval|inspect|profile)"


def options(command: list[str]) -> set[str]:
    """Options that choose what runs, without those for places and amounts."""
    words = {word for word in command if word.startswith("--")}
    return {w for w in words if w.split("=")[0] not in LIMITS}


@pytest.mark.parametrize("command", [c for c in commands() if re.match(OF_A_GPU, c)])
def test_every_command_for_a_gpu_is_checked(command):
    words = shlex.split(command.replace("\\\n", " "))
    program = re.search(OF_A_GPU + r"|benchmarks\.\w+", command)[0]
    if any(command.startswith(name) or name in command for name in ELSEWHERE):
        return
    if program.startswith("python -m"):
        program = words[2]
    subcommand = {"python train_gpt2": "train_gpt2.py", "torchrun": "train_gpt2.py"}.get(
        program, program.removeprefix("gpt2 ")
    )
    if "-m" in words and program == "torchrun":
        subcommand = words[words.index("-m") + 1]
    found = [
        check
        for check in CHECKS
        if any(
            w in {subcommand, f"--{subcommand}={{work}}/train/out_ckpt.pt"} for w in check.command
        )
        if options(words) <= options(check.command)
        if check.ranks == (program == "torchrun")
    ]
    assert found, f"no check runs {command}; add one to tests/gpu_check.py"


def test_reasons_are_about_commands_that_there_are():
    everything = "\n".join(commands())
    assert [name for name in ELSEWHERE if name not in everything] == []


@pytest.mark.parametrize("check", [c for c in CHECKS if "train_gpt2.py" in c.command])
def test_options_of_training_are_valid(check):
    arguments = check.command[check.command.index("train_gpt2.py") + 1 :]
    config = parse(TrainConfig, arguments, "gpt2 train")
    assert config.optim.max_steps <= 5


def test_names_are_different_and_what_they_build_on_exists():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert {check.after for check in CHECKS} - {""} <= set(names)
    alone = {check.name for check in CHECKS if check.alone}  # they run when all others have
    assert not alone & {check.after for check in CHECKS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run_python("-m", "tests.gpu_check", check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "no CUDA device: these checks need one"


def test_a_failure_is_told_with_its_reason(tmp_path):
    def result(code, seconds=60):
        return gpu_check.run(Check("a name", ["-c", code], seconds=seconds), tmp_path, ["0"])

    assert re.fullmatch(r"passed in \d+ s", result("print('fine')"))
    assert result("raise ValueError('too hot')") == "FAILED: exit code 1: ValueError: too hot"
    in_clone = f"raise ValueError({str(gpu_check.PAGE)!r})"
    assert result(in_clone) == f"FAILED: exit code 1: ValueError: {Path('docs/gpu.md')}"
    assert result("import time; time.sleep(60)", 1) == "FAILED: not over after 1 s"
    summary = "FAILED test_a.py::test_b - AssertionError\nERROR test_c.py\n2 failed"
    expected = "FAILED test_a.py::test_b - AssertionError; ERROR test_c.py"
    assert result(f"print({summary!r}); exit(1)") == f"FAILED: exit code 1: {expected}"


def test_a_server_that_does_not_start_says_why():
    done = run_python("-m", "tests.gpu_check", "--serve=no/such.pt", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "gpt2: error: no/such.pt: no such checkpoint"


def test_estimates_of_memory_hold_what_was_measured():
    """Too low an estimate lets checks at once run out of memory; CUDA takes some beside tensors."""
    rows = gpu_check.earlier_rows(gpu_check.PAGE)
    peaks = {c.name: re.findall(r"([\d.]+) GiB", rows.get(c.name, "")) for c in CHECKS}
    assert any(peaks.values())
    low = [c.name for c in CHECKS if any(float(peak) + 1 > c.gib for peak in peaks[c.name])]
    assert not low


@dataclass
class Free:
    """What `shutil.disk_usage` answers."""

    free: int


class Done:
    """Results without a page."""

    def __init__(self, **rows):
        self.found, self.rows = {}, rows

    def add(self, check, result):
        self.found[check.name] = result


def test_checks_at_once_fit_into_the_card(tmp_path, monkeypatch):
    running, most, lock = [], [], threading.Lock()

    def run(check, work, cards):
        with lock:
            running.append(check.gib)
            most.append(sum(running))
        time.sleep(0.02)
        with lock:
            running.remove(check.gib)
        return "passed"

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    checks = [Check(str(n), [], gib=gib) for n, gib in enumerate([30, 30, 40, 10, 10, 90, 30, 10])]
    done = Done()
    gpu_check.run_all(checks, tmp_path, 8, 70, done)
    assert len(done.found) == len(checks)
    assert max(most) == 90  # which ran when no other did
    assert max(m for m in most if m != 90) == 70


def test_checks_at_once_fit_onto_the_disk(tmp_path, monkeypatch):
    running, most, lock = [], [], threading.Lock()

    def run(check, work, cards):
        with lock:
            running.append(check.disk)
            most.append(sum(running))
        time.sleep(0.02)
        with lock:
            running.remove(check.disk)
        return "passed"

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check.shutil, "disk_usage", lambda path: Free(50 * 2**30))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    checks = [Check(str(n), [], gib=1, disk=gib) for n, gib in enumerate([26, 26, 13, 3, 3, 60])]
    done = Done()
    gpu_check.run_all(checks, tmp_path, 8, 140, done)
    assert len(done.found) == len(checks)
    assert max(most) == 60  # which ran when no other did
    assert max(m for m in most if m != 60) <= 50


def test_only_what_another_check_reads_stays_on_the_disk(tmp_path):
    folders = [tmp_path / name for name in ("train", "large", "muon", "other")]
    for folder in folders:
        (folder / "state").mkdir(parents=True)
        (folder / "out_ckpt.pt").touch()
    for check in CHECKS:
        gpu_check.tidy(check, tmp_path, {check.name} - {"other"})
    left = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.glob("*/*"))]
    assert left == [
        "large/out_ckpt.pt",
        "other/out_ckpt.pt",
        "other/state",
        "train/out_ckpt.pt",
        "train/state",
    ]


def test_an_error_of_ours_is_a_failure_and_the_others_go_on(tmp_path, monkeypatch):
    def run(check, work, cards):
        if check.name == "a":
            raise OSError(28, "No space left on device")
        return "passed"

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    done = Done()
    gpu_check.run_all([Check("a", [], gib=60), Check("b", [], gib=40)], tmp_path, 2, 70, done)
    assert done.found == {
        "a": "FAILED: OSError: [Errno 28] No space left on device",
        "b": "passed",
    }


def test_what_takes_longest_begins_first(tmp_path):
    rows = {
        name: f"| {name} | passed in {s} s | x |" for name, s in [("a", 9), ("b", 60), ("d", 55)]
    }
    checks = [Check("a", []), Check("b", []), Check("c", [], after="a"), Check("d", [])]
    first = gpu_check.longest_first(checks, rows)
    assert [check.name for check in first] == ["a", "c", "b", "d"]  # c never ran: 120 s


def test_memory_of_a_run_is_told(tmp_path):
    command = ["train_gpt2.py", f"--out_dir={tmp_path}"]
    assert gpu_check.peak_of(command) == ""  # no run
    lines = [{"step": 1, "peak_gib": 7.24}, {"step": 2, "peak_gib": 7.28}, {"val_loss": 5.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert gpu_check.peak_of(command) == ", 7.3 GiB"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "peak_gib": None}))
    assert gpu_check.peak_of(command) == ""


def test_checks_run_several_at_once_on_the_cards_they_want(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    both, cards = threading.Barrier(2), {}

    def run(check, work, given):
        if check.name in "ab":
            both.wait(30)
        cards[check.name] = given
        return "passed"

    done = Done()
    monkeypatch.setattr(gpu_check, "run", run)
    checks = [Check("a", [], ranks=True), Check("b", [], ranks=True), Check("c", [], after="b")]
    checks.append(Check("d", [], ranks=True, alone=True))
    gpu_check.run_all(checks, tmp_path, 4, 70, done)
    assert list(done.found)[-1] == "d"
    two = ["3", "GPU-5"]
    assert cards == {"a": two, "b": two, "c": two[:1], "d": two}


def test_without_a_choice_all_cards_are_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_check.visible_cards() == ["0", "1"]


def test_losses_decide_about_training():
    good = "first loss 10.98; fresh weights should give 10.98: as expected\n"
    step = "step 1/3  33.3% | loss 10.9813 | lr 6e-04\nstep 2/3  66.7% | loss  {} | lr 5e-04\n"
    assert gpu_check.problem_of_training(good + step.format("9.5")) == ""
    assert gpu_check.result_of(step.format("9.5")) == ": loss 10.9813 to 9.5"
    assert "nan" in gpu_check.problem_of_training(good + step.format("nan"))
    assert gpu_check.problem_of_training("") == "losses []"
    odd = "first loss 12.00; fresh weights should give 10.98: check the data\n"
    assert gpu_check.problem_of_training(odd + step.format("9.5")) == odd.strip()


def test_the_page_keeps_earlier_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setenv("GPT2_COMMIT", "abc1234")
    page = tmp_path / "gpu.md"
    gpu_check.Results(page).add(CHECKS[0], "passed in 1 s")
    gpu_check.Results(page).add(CHECKS[-1], "FAILED: a | b")
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(CHECKS)
    assert rows[0].startswith(
        f"| {CHECKS[0].name} | passed in 1 s | Some GPU | {torch.__version__}"
    )
    assert rows[0].endswith("| abc1234 |")
    assert rows[-1].startswith(f"| {CHECKS[-1].name} | FAILED: a / b | 2 × Some GPU |")
    assert rows[1] == f"| {CHECKS[1].name} | not run | | | | |"


def test_the_shards_and_conversations_are_valid(tmp_path):
    gpu_check.prepare(tmp_path / "work")
    done = run_python("-m", "gpt2", "shards", "info", str(tmp_path / "work/data"))
    assert "4,000,000" in done.stdout or "4.0M" in done.stdout
