"""Runs every command for a GPU at true sizes for a few steps, and writes docs/gpu.md.

CI has no GPU, so what breaks on one stays unseen there. `make gpu-check` on a machine with one GPU
takes less than 8 minutes; on a machine with two GPUs or more it runs what several ranks do. Rows of
the page that a call does not run keep their earlier result, with its device, date and commit.

A training run passes if it ends with exit code 0, its first loss is that of fresh weights and the
losses are finite. Any other command passes if it ends with exit code 0.
"""

import argparse
import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.scaling_measure import visible_cards
from gpt2.data.random_tokens import write_random_shards

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gpu.md"
HEADER = "| what | result | device | torch | date | commit |"
STEPS = ["--max_steps=3", "--log_every=1", "--eval_tokens=65536", "--data_dir={work}/data"]
VOCABULARY = 50257
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node={ranks}"]


@dataclass(frozen=True)
class Check:
    """A command, of which {work} is the folder for data and results and {ranks} the GPUs."""

    name: str
    command: list[str]
    ranks: bool = False  # whether it wants several GPUs
    after: str = ""  # the check whose output it needs
    alone: bool = False  # whether it wants a card for itself
    gib: int = 12  # of memory that it takes on a card at most, estimated
    disk: int = 3  # GiB that it writes at most, estimated; 16 bytes a parameter
    seconds: int = 300  # limit; eight at once are slower than one
    keeps_state: bool = False  # else a run's training state is deleted when it is over


def train(name: str, *arguments: str, steps: list[str] = STEPS, **more: Any) -> Check:
    """A training run on one GPU."""
    out = "--out_dir={work}/" + re.sub(r"\W+", "_", name)
    return Check(name, ["train_gpt2.py", *steps, out, *arguments], **more)


def ranks(name: str, *arguments: str, **more: Any) -> Check:
    """A training run on all GPUs."""
    single = train(name, *arguments)
    return Check(name, [*TORCHRUN, *single.command], ranks=True, **more)


def gpt2(name: str, *arguments: str, after: str = "train", gib: int = 5, disk: int = 3) -> Check:
    """Another command of the package."""
    return Check(name, ["-m", "gpt2", *arguments], after=after, gib=gib, disk=disk)


def benchmark(name: str, *arguments: str) -> Check:
    """One of benchmarks/, whose numbers nobody reads: other programs slow it down."""
    return Check(name, ["-m", f"benchmarks.{name}", *arguments], gib=28)


def pytest(name: str, marked: str, *arguments: str, **more: Any) -> Check:
    """Tests with these marks."""
    quiet = ["-q", "-p", "no:cacheprovider"]
    return Check(name, ["-m", "pytest", *quiet, "-m", marked, *arguments], **more)


PARALLEL = "tests/test_gpu_parallel.py"
ONE_GPU = ["tests", f"--ignore={PARALLEL}", "--continue-on-collection-errors"]
MODEL = "{work}/train/out_ckpt.pt"
AGAIN, LARGE = "--activation_checkpointing=True", "--grad_accum_steps=2"
MLP_AGAIN = "--activation_checkpointing=mlp"
MODERN, FP8 = "--config=configs/speedrun.toml", "--fp8=head"
XL = ["--size=gpt2-xl", AGAIN, LARGE]
CHECKS = [
    pytest(
        "pytest -m gpu -n 4", "gpu and not alone", *ONE_GPU, "-n", "4", gib=36, disk=6, seconds=600
    ),
    train(
        "train",
        "--compile_model=True",
        "--dtype=bfloat16",
        "--grad_accum_steps=8",
        keeps_state=True,
    ),
    train("xl, activation checkpointing", *XL, "--batch_size=4", gib=36, disk=26),
    train(
        "xl, activation_checkpointing=mlp",
        "--size=gpt2-xl",
        MLP_AGAIN,
        LARGE,
        "--batch_size=4",
        gib=40,
        disk=26,
    ),
    train("large", "--size=gpt2-large", LARGE, "--batch_size=4", gib=26, disk=13),
    train(
        "large, uncompiled",
        "--size=gpt2-large",
        LARGE,
        "--batch_size=4",
        AGAIN,
        "--compile_model=False",
        gib=26,
        disk=13,
    ),
    train("speedrun.toml, fp8 head", MODERN, FP8, gib=28),
    train(
        "speedrun.toml, the whole softmax, windows that grow",
        MODERN,
        "--loss=cross_entropy",
        "--window_warmup=0.5",
        gib=28,
    ),
    train("speedrun.toml, activation checkpointing", MODERN, AGAIN, gib=28),
    train("medium, fp8 head, activation checkpointing", "--size=gpt2-medium", FP8, AGAIN, LARGE),
    train("defaults"),
    train("batch 64, fp8 head", "--batch_size=64", FP8, gib=28),
    train("uncompiled", "--compile_model=False", "--batch_size=16"),
    train("muon", "--optimizer=muon", "--batch_size=16"),
    train("float16", "--dtype=float16", "--batch_size=16"),
    train("float32", "--dtype=float32", "--batch_size=8", LARGE),
    train("gpt2_124m.toml", "--config=configs/gpt2_124m.toml", "--learning_rate=1e-3", gib=28),
    train(
        "speedrun.toml with other switches",
        MODERN,
        "--mlp=swiglu",
        "--norm=rmsnorm",
        "--zero_init=True",
        "--window=256",
        "--document_mask=True",
        gib=32,
    ),
    train(
        "resume",
        "--compile_model=True",
        "--dtype=bfloat16",
        "--grad_accum_steps=8",
        "--out_dir={work}/train",
        after="train",
        steps=["--max_steps=5", *STEPS[1:]],
    ),
    train("from weights", f"--init={MODEL}", "--learning_rate=3e-5", LARGE, after="train"),
    gpt2(
        "finetune, LoRA",
        "finetune",
        f"--init={MODEL}",
        "--data={work}/chats.jsonl",
        "--lora_rank=8",
        "--max_steps=3",
        "--out_dir={work}/finetuned",
    ),
    gpt2(
        "finetune, all weights of large",
        "finetune",
        "--init={work}/large/out_ckpt.pt",
        "--data={work}/chats.jsonl",
        "--max_steps=3",
        AGAIN,
        "--out_dir={work}/full",
        after="large",
        gib=20,
        disk=13,
    ),
    gpt2("sample", "sample", MODEL, "--prompt=Hello world,", "--max_new_tokens=200"),
    gpt2("sample in bf16", "sample", MODEL, "--prompt=Hello world,", "--dtype=bfloat16"),
    gpt2(
        "sample of adapters",
        "sample",
        "{work}/finetuned/out_ckpt.pt",
        "--prompt=Hello",
        after="finetune, LoRA",
    ),
    gpt2(
        "sample of the modern network",
        "sample",
        "{work}/speedrun_toml_fp8_head/out_ckpt.pt",
        "--prompt=Hello",
        after="speedrun.toml, fp8 head",
    ),
    gpt2("eval", "eval", MODEL, "--data_dir={work}/data", "--eval_tokens=65536"),
    gpt2(
        "inspect, patching",
        "inspect",
        MODEL,
        "The capital of France is the city of",
        "--patch=The capital of Italy is the city of",
        "--out={work}/inspect.html",
    ),
    gpt2("profile", "profile", "--batch_size=64", "--grad_accum_steps=1", after="", gib=28),
    Check("serve", ["-m", "tests.gpu_check", "--serve={work}/train/out_ckpt.pt"], after="train"),
    pytest(
        "pytest -m gpu, tests that want the card for themselves",
        "gpu and alone",
        *ONE_GPU,
        alone=True,
    ),
    benchmark("throughput", "--steps=10", "--warmup=5"),
    benchmark("generate", "--calls=2"),
    benchmark("memory", "--sizes=gpt2", "--batch_sizes=8"),
    benchmark("masks"),
    benchmark(
        "scaling", "--measure", "--only=524,288", "--seconds=140", "--out_dir={work}/scaling"
    ),
    *(
        Check(
            f"compute-sanitizer, {tool}",
            ["-m", "tests.gpu_check", f"--sanitizer={tool}"],
        )
        for tool in ("memcheck", "racecheck", "initcheck")
    ),
    # Several GPUs.
    ranks("ranks: ddp", "--batch_size=64", gib=28),
    ranks("ranks: ddp, uncompiled", "--batch_size=16", "--compile_model=False"),
    ranks("ranks: ddp, muon, fp8 head", "--optimizer=muon", FP8, "--batch_size=16"),
    ranks("ranks: ddp, speedrun.toml", MODERN, FP8, "--batch_size=4"),  # 65,536 tokens a step
    ranks(
        "ranks: fsdp, xl, activation checkpointing",
        *XL,
        "--parallel=fsdp",
        "--batch_size=16",
        gib=60,
        disk=26,
    ),
    ranks(
        "ranks: fsdp, large",
        "--size=gpt2-large",
        LARGE,
        "--parallel=fsdp",
        "--batch_size=4",
        gib=26,
        disk=13,
    ),
    ranks(
        "ranks: fsdp, large, activation_checkpointing=mlp",
        "--size=gpt2-large",
        LARGE,
        "--parallel=fsdp",
        "--batch_size=4",
        MLP_AGAIN,
        gib=26,
        disk=13,
    ),
    ranks(
        "ranks: fsdp, large, uncompiled",
        "--size=gpt2-large",
        LARGE,
        "--parallel=fsdp",
        "--batch_size=4",
        "--compile_model=False",
        gib=26,
        disk=13,
    ),
    ranks(
        "ranks: fsdp, medium, muon, fp8 head",
        "--size=gpt2-medium",
        LARGE,
        "--parallel=fsdp",
        "--optimizer=muon",
        FP8,
    ),
    ranks(
        "ranks: fsdp, speedrun.toml",
        MODERN,
        "--parallel=fsdp",
        "--total_batch_tokens=0",
        LARGE,
        gib=40,
    ),
    Check(
        "ranks: all-reduce",
        [*TORCHRUN, "-m", "benchmarks.all_reduce"],
        ranks=True,
        alone=True,
    ),
    Check(
        "ranks: scaling",
        ["-m", "benchmarks.scaling", "--measure", "--seconds=190", "--out_dir={work}/scaling"],
        ranks=True,
        alone=True,
        seconds=240,
    ),
    pytest(
        "ranks: pytest tests/test_gpu_parallel.py",
        "gpu",
        PARALLEL,
        "-n",
        "3",
        ranks=True,
        seconds=600,
    ),
]


def prepare(work: Path) -> None:
    """Shards of random tokens, and conversations."""
    (work / "data").mkdir(parents=True)
    write_random_shards(work / "data", 4_000_000, VOCABULARY)
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = {"role": "assistant", "content": "Paris, on the Seine. " * 20}
    talk = {"messages": [question, answer]}
    (work / "chats.jsonl").write_text(f"{json.dumps(talk)}\n" * 200, encoding="utf-8")


def run(check: Check, work: Path, cards: list[str]) -> str:
    """Runs a check on some GPUs; "passed …", or why it did not."""
    words = {"work": str(work), "ranks": len(cards)}
    command = [word.format(**words) for word in check.command]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(cards)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    log, started = work / f"{re.sub(r'[^a-z0-9]+', '_', check.name)}.log", time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(check.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return f"FAILED: not over after {check.seconds} s"
    tidy(check, work, {word.rpartition("/")[2] for word in command})
    text = log.read_text("utf-8", errors="replace")
    text = text.replace(f"{ROOT}{os.sep}", "")  # the page is about any clone
    seconds = time.monotonic() - started
    if code:
        lines = [line for line in text.splitlines() if line.strip()]
        tests = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        errors = [line for line in lines if "Error" in line]
        why = "; ".join(tests) or (errors or lines or ["no output"])[-1].strip()[:200]
        return f"FAILED: exit code {code}: {why[:600]}"
    problem = problem_of_training(text) if "train_gpt2.py" in command else ""
    passed = f"passed in {seconds:.0f} s{result_of(text)}{peak_of(command)}"
    return f"FAILED: {problem}" if problem else passed


def tidy(check: Check, work: Path, folders: set[str]) -> None:
    """Deletes what a check left in folders and no other check reads: gigabytes, of every run."""
    if not check.keeps_state:
        for state in work.glob("*/state"):
            if state.parent.name in folders:
                shutil.rmtree(state)
    if check.name not in {other.after for other in CHECKS}:
        for model in work.glob("*/*.pt"):
            if model.parent.name in folders:
                model.unlink()


def problem_of_training(text: str) -> str:
    """What is wrong with the output of a training run; empty: nothing."""
    losses = [float(x) for x in re.findall(r"^step .*\| loss +(\S+)", text, re.MULTILINE)]
    if not losses or not all(map(math.isfinite, losses)):
        return f"losses {losses}"
    fresh = re.search(r"^(first loss .*)$", text, re.MULTILINE)
    if fresh and "as expected" not in fresh[1] and "of the weights of" not in fresh[1]:
        return fresh[1]
    return ""


def result_of(text: str) -> str:
    """The losses of a training run, or the last line of pytest."""
    losses = re.findall(r"^step .*\| loss +(\S+)", text, re.MULTILINE)
    if losses:
        return f": loss {losses[0]} to {losses[-1]}"
    counts = re.findall(r"(\d+ passed.*?) in [\d.:]+", text)
    return f": {counts[-1]}" if counts else ""


def longest_first(checks: list[Check], rows: dict[str, str]) -> list[Check]:
    """The checks in the order in which they should begin.

    What counts is a check's own time with the longest of those that wait for it. Times are those
    of the page's rows; a check without one counts as 120 s.
    """

    def to_come(check: Check) -> int:
        found = re.search(r"passed in (\d+) s", rows.get(check.name, ""))
        behind = [to_come(other) for other in checks if other.after == check.name]
        return (int(found[1]) if found else 120) + max(behind, default=0)

    return sorted(checks, key=to_come, reverse=True)


def peak_of(command: list[str]) -> str:
    """The most memory that tensors of a training run took on a card of rank 0, by its last line."""
    folders = [Path(w.removeprefix("--out_dir=")) for w in command if w.startswith("--out_dir=")]
    files = [folder / "metrics.jsonl" for folder in folders]
    lines = [line for file in files if file.exists() for line in file.open(encoding="utf-8")]
    peaks = [found for line in lines if (found := json.loads(line).get("peak_gib"))]
    return f", {peaks[-1]:.1f} GiB" if peaks else ""


class Waiting:
    """Checks that have not begun, for threads that run them.

    Those that run at once fit into `room`, the free memory of a card in GiB, and into `disk`, the
    free GiB there; one that is larger runs when no other does.
    """

    def __init__(self, checks: list[Check], room: float, disk: float, done: "Results"):
        self.checks = longest_first(checks, done.rows)
        self.names = {check.name for check in checks}
        self.running: list[Check] = []
        self.room, self.disk, self.done = room, disk, done
        self.lock = threading.Condition()

    def _next(self) -> Check | None:
        free = self.room - sum(check.gib for check in self.running)
        on_disk = self.disk - sum(check.disk for check in self.running)
        for check in self.checks:
            ready = check.after not in self.names or check.after in self.done.found
            fits = check.gib <= free and check.disk <= on_disk
            if ready and (fits or not self.running):
                return check
        return None

    def take(self) -> Check | None:
        """The next check as soon as it may begin; None if all have begun."""
        with self.lock:
            while self.checks and not (check := self._next()):
                self.lock.wait()
            if not self.checks:
                return None
            self.checks.remove(check)
            self.running.append(check)
            return check

    def end(self, check: Check, result: str) -> None:
        """Notes the result and lets others begin."""
        with self.lock:
            self.running.remove(check)
            self.done.add(check, result)
            self.lock.notify_all()


def run_all(checks: list[Check], work: Path, jobs: int, room: float, done: "Results") -> None:
    """Runs the checks, each on all cards if it has ranks: several at once, then those alone."""
    cards = visible_cards()
    disk = shutil.disk_usage(work).free / 2**30
    waiting = Waiting([check for check in checks if not check.alone], room, disk, done)

    def worker() -> None:
        while check := waiting.take():
            try:
                result = run(check, work, cards if check.ranks else cards[:1])
            except Exception as error:  # noqa: BLE001 - the others must go on
                result = f"FAILED: {type(error).__name__}: {error}"
            waiting.end(check, result)

    threads = [threading.Thread(target=worker) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for check in checks:
        if check.alone:
            done.add(check, run(check, work, cards if check.ranks else cards[:1]))


class Results:
    """Results by name of a check; each is printed and written to the page as it comes."""

    def __init__(self, page: Path, count: int = 1):
        self.page = page
        self.count, self.started = count, time.monotonic()
        self.found: dict[str, str] = {}
        self.rows = earlier_rows(page)

    def add(self, check: Check, result: str) -> None:
        """Notes a result."""
        self.found[check.name] = result
        passed = time.monotonic() - self.started
        print(
            f"[{len(self.found)}/{self.count}, {passed:.0f} s] {check.name}: {result}", flush=True
        )
        count, card = torch.cuda.device_count(), torch.cuda.get_device_name()
        device = f"{count} × {card}" if check.ranks else card
        today = str(datetime.datetime.now(datetime.UTC).date())
        cells = [check.name, result.replace("|", "/"), device, torch.__version__, today, commit()]
        self.rows[check.name] = f"| {' | '.join(cells)} |"
        write(self.page, self.rows)


def earlier_rows(page: Path) -> dict[str, str]:
    """Rows of the page by the name of their check."""
    lines = page.read_text("utf-8").splitlines() if page.exists() else []
    rows = [line for line in lines if line.startswith("| ") and line != HEADER]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


TITLE = """\
# What has run on GPUs

Written by `make gpu-check`; do not edit. Every command for a GPU runs at its true size for a
few steps, several at once, so that the seconds are no measurement of speed. Rows that begin with
`ranks` use all GPUs of the machine. A row is as old as its date.
"""


def write(page: Path, rows: dict[str, str]) -> None:
    """Writes the page: a row for every check, "not run" where it never was."""
    lines = [rows.get(c.name, f"| {c.name} | not run | | | | |") for c in CHECKS]
    page.write_text("\n".join([TITLE, HEADER, "|---" * 6 + "|", *lines, ""]), encoding="utf-8")


def commit() -> str:
    """HEAD, with a + if files differ from it; without git, the variable GPT2_COMMIT."""
    given = os.environ.get("GPT2_COMMIT", "")
    done = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return given or done.stdout.strip() or "unknown"


def serve(model: str) -> int:
    """Starts the server with a model, asks it for a text and stops it."""
    import signal
    import socket
    import urllib.request

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "gpt2", "serve", model, f"--port={port}"])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            time.sleep(0.3)
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()
                break
            except OSError:
                if process.poll() is not None:
                    return 1  # its last line says why
        body = json.dumps({"prompt": "Hello", "max_tokens": 20}).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{address}/v1/completions", body, headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["text"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    return 0


def kernels() -> int:
    """Launches each Triton kernel on small inputs beside its plain form."""
    from gpt2.kernels.triton_layer_norm import add_layer_norm_backward, layer_norm
    from gpt2.kernels.triton_training import cross_entropy_, cross_entropy_fp8, quantize

    from .generate.test_few_token_pass import compare_kernels
    from .kernels.test_one_token import compare_small, hopper
    from .kernels.test_triton_training import compare_gradients

    compare_kernels("cuda")
    if hopper():
        compare_small()
    x, weight, bias = torch.randn(5, 1160).bfloat16(), torch.randn(1160), torch.randn(1160)
    found, mean, rstd = layer_norm(x.cuda(), weight.cuda(), bias.cuda(), 1e-5)
    leaf = x.float().requires_grad_()
    expected = torch.nn.functional.layer_norm(leaf, (1160,), weight, bias)
    assert (found.cpu().float() - expected).norm() < 1e-2 * expected.norm()
    (expected.square().sum() / 2).backward()
    found, _ = add_layer_norm_backward(x.cuda(), found, x.cuda(), weight.cuda(), mean, rstd, 4)
    assert (found.cpu().float() - x.float() - leaf.grad).norm() < 2e-2 * leaf.grad.norm()
    # Logits come from a kernel of torch itself: under racecheck cuBLAS ends the process, and
    # initcheck does not see what it writes.
    targets = torch.arange(128, device="cuda")
    for cap in (0.0, 15.0):
        logits = torch.randn(128, 384, device="cuda").bfloat16()
        capped = cap * torch.tanh(logits.float() / cap) if cap else logits.float()
        exact = torch.nn.functional.cross_entropy(capped[:, :300], targets, reduction="sum")
        found = [cross_entropy_fp8(logits, targets, 300, cap)[0]]
        found.append(cross_entropy_(logits, targets, 300, True, cap))
        for loss in found:
            assert abs(loss.item() / exact.item() - 1) < 0.02, (cap, loss, exact)
    compare_gradients("cuda", torch.bfloat16)
    quantized, transposed, scale = quantize(x := torch.randn(64, 128, device="cuda").bfloat16())
    assert (quantized.float() * scale - x.float()).abs().max() < 0.1 * x.abs().max()
    assert torch.equal(transposed.float().t(), quantized.float())
    return 0


def sanitizer(tool: str) -> int:
    """`kernels` under a tool of compute-sanitizer; faults outside of our kernels do not count."""
    names = [
        "_small_linear",
        "_cached_attention",
        "_join_shares",
        "_layer_norm",  # and the backward kernel, which has it in its name
        "_quantize",
        "_cross_entropy",
        "_gradient_fp8",
        "_embed",
        "_linear",
        "_attend",
        "_project",
        "_head",
        "_choose",
    ]
    # A filter hides what other kernels write, which initcheck must see.
    used = [] if tool == "initcheck" else names
    filters = ["--show-backtrace=no", *(f"--kernel-name=kernel_substring={name}" for name in used)]
    if tool == "racecheck":
        filters.append("--racecheck-report=all")  # with the values of both writes
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *filters]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(
        [*command, sys.executable, "-m", "tests.gpu_check", "--kernels"],
        cwd=ROOT,
        env=environment,
        check=False,
    ).returncode


def main() -> int:
    """Runs the checks; 1 if one failed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", action="append", help="checks whose name has this part; several")
    jobs = max(1, min(8, (os.cpu_count() or 2) // 2))  # compilation is what takes time
    options.add_argument("--jobs", type=int, default=jobs, help=f"checks at once (here {jobs})")
    options.add_argument("--page", type=Path, default=PAGE, help="where to write the table")
    options.add_argument("--work", type=Path, help="keep data, results and logs in this new folder")
    options.add_argument("--serve", default="", help=argparse.SUPPRESS)
    options.add_argument("--sanitizer", default="", help=argparse.SUPPRESS)
    options.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.kernels:
        return kernels()
    if given.serve or given.sanitizer:
        return serve(given.serve) if given.serve else sanitizer(given.sanitizer)
    count = torch.cuda.device_count()
    if not count:
        print("no CUDA device: these checks need one", file=sys.stderr)
        return 2
    parts = given.only or [""]
    checks = [c for c in CHECKS if c.ranks == (count > 1) and any(part in c.name for part in parts)]
    done = Results(given.page, len(checks))
    with TemporaryDirectory() as temporary:
        work = given.work or Path(temporary) / "work"
        prepare(work)
        run_all(checks, work, given.jobs, torch.cuda.mem_get_info()[0] / 2**30, done)
    failed = [name for name, result in done.found.items() if not result.startswith("passed")]
    print(f"{len(done.found) - len(failed)} of {len(done.found)} passed; wrote {given.page}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
