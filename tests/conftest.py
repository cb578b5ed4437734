"""Shared by all tests: one thread, small shards, and ways to run the program."""

import os

# One thread per process: tests run side by side, and results must not depend on the core count.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# glibc keeps freed memory instead of handing it back to the kernel, which then clears it page by
# page at each step: a training step of TINY takes an eighth less. Read when a process starts.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 32))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 32))
# Images of Python for containers forbid bytecode: each process would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gpt2.data.shards import write_shard
from gpt2.prepare import fast_tokenizer
from gpt2.prepare.chosen_tokenizer import chosen_tokenizer, describe_tokenizer
from gpt2.tokenizer import gpt2_tokenizer

from . import forks, workers

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--block_size=32",
    "--batch_size=2",  # with GPT-2's vocabulary a step takes its time for the logits
    "--grad_accum_steps=2",
    "--eval_tokens=500",
    "--dtype=float32",
    "--device=cpu",
    "--learning_rate=1e-3",
    "--warmup_steps=2",
]


os.fsync = forks.no_fsync  # type: ignore[assignment]
# A script's `&` makes a program ignore Ctrl-C, and all that the program starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.dont_write_bytecode = False


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is not installed
def pytest_xdist_auto_num_workers():
    """One more than cores: many tests wait for a server, a time limit or a process."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    """Workers on this machine are forks of one process, which has collected the tests."""

    def collect():
        if forks.AVAILABLE and "not long" not in config.option.markexpr:
            forks.start(ROOT)  # for all workers
        config.pluginmanager.get_plugin("session").perform_collect()

    # A process that has looked for a GPU, as the tests do when they are collected, and found one
    # has no forks that can use it.
    if workers.AVAILABLE and not torch.cuda.is_available():
        workers.are_forks(specs, collect, forks.close)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference, relative to that of the exact tensor."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _precision_of_its_own():
    """Training allows tf32 in its process, on a GPU; no later test may inherit that."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


_lent: list[tuple[threading.Thread, object]] = []  # with the thread that has each


@pytest.fixture(autouse=True)
def _gigatoken_tokenizers_are_used_again(monkeypatch):
    """One takes 0.3 s to make; a thread gets that of another which has ended."""
    make = fast_tokenizer._gigatoken

    def lend():
        for i, (thread, tokenizer) in enumerate(_lent):
            if not thread.is_alive():
                _lent[i] = threading.current_thread(), tokenizer
                return tokenizer
        _lent.append((threading.current_thread(), make()))
        return _lent[-1][1]

    monkeypatch.setattr(fast_tokenizer, "_gigatoken", lend)


# Files most of whose tests train, compile, start processes or try many inputs; `make test-fast`
# leaves them out, with the tests of other files that are marked as slow or long.
LONG = {
    "checkpoint/test_async_writer",
    "checkpoint/test_state_schema",
    "checkpoint/test_weights",
    "commands/test_evaluate",
    "commands/test_export",
    "commands/test_profile_step",
    "commands/test_sweep",
    "data/test_conversations",
    "data/test_datasets",
    "evaluate/test_tasks",
    "generate/test_stream",
    "huggingface/test_downloads",
    "huggingface/test_hub",
    "interpret/test_html_page_browser",
    "model/test_modern_cache",
    "prepare/test_fast_tokenizer",
    "prepare/test_multi_machine",
    "prepare/test_run",
    "prepare/test_run_exact",
    "prepare/test_run_faults",
    "prepare/test_tokenize_rows",
    "report/test_plot",
    "serve/test_connections",
    "serve/test_docs_page",
    "serve/test_page",
    "serve/test_page_markdown",
    "serve/test_server",
    "serve/test_server_clients",
    "serve/test_server_page",
    "test_benchmark_before",
    "test_benchmark_libraries",
    "test_benchmarks",
    "test_cli",
    "test_cluster",
    "test_compat",
    "test_faults",
    "test_files",
    "test_forks",
    "test_fuzz",
    "test_gpu_check",
    "test_links",
    "test_mutations",
    "test_recipes",
    "test_scaling_measure",
    "test_workers",
    "train/test_loop",
    "train/test_loop_hellaswag",
    "train/test_run_tokenizer",
    "train/test_save",
    "train/test_validation",
}


def is_long(path: Path) -> bool:
    """Whether a file of tests is in LONG."""
    return path.relative_to(TESTS).with_suffix("").as_posix() in LONG


def pytest_ignore_collect(collection_path, config):
    """Without long tests their files are not imported: openai and others take seconds."""
    return True if "not long" in config.option.markexpr and is_long(collection_path) else None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Marks tests by file and by device; those with a time limit of their own begin.

    They are the longest, and no worker is to end with one.
    """
    for item in items:
        if is_long(item.path):
            item.add_marker(pytest.mark.long)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=lambda item: -limit(item))


@pytest.hookimpl(tryfirst=True)
def pytest_collection():
    """Importing makes objects, but no garbage."""
    gc.disable()


def pytest_collection_finish():
    """The millions of objects that were imported are looked at by no collection of garbage.

    One would take most of a second: nearly all of the time of a test of benchmarks that collect.
    """
    gc.freeze()
    gc.enable()


def limit(item: pytest.Item) -> float:
    """The seconds of a test's own time limit; 0 without one."""
    marker = item.get_closest_marker("timeout")
    return marker.args[0] if marker else 0


@pytest.fixture(scope="session")
def text() -> str:
    """Real text that comes with Python: documentation topics and the source of two modules."""
    import argparse
    import subprocess as module

    return Path(argparse.__file__).read_text("utf-8") + Path(module.__file__).read_text("utf-8")


def write_shards(folder: Path, ids: list[int]) -> Path:
    """Shards of about 86,000 training and 4,000 validation tokens."""
    tokens = np.resize(np.array(ids, dtype=np.uint16), 90_000)
    write_shard(folder / "text_val_000000.bin", tokens[:4000])
    write_shard(folder / "text_train_000001.bin", tokens[4000:45_000])
    write_shard(folder / "text_train_000002.bin", tokens[45_000:])
    return folder


@pytest.fixture(scope="session")
def gpt2_data_dir(tmp_path_factory, text) -> Path:
    """Shards of the text in GPT-2's vocabulary."""
    return write_shards(tmp_path_factory.mktemp("gpt2_data"), gpt2_tokenizer().encode(text))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, text) -> Path:
    """Shards of the text in a vocabulary of 512 tokens.

    With GPT-2's 50,257 a training step of TINY takes five times as long, nearly all for logits.
    """
    folder = tmp_path_factory.mktemp("data")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    described = describe_tokenizer(chosen_tokenizer(str(folder / "tokenizer.json")))
    manifest = {"shards": [], "tokenizer": described}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return write_shards(folder, made.encode(text).ids)


@pytest.fixture(scope="session", autouse=True)
def _forks_end_with_the_tests():
    yield
    forks.close()


TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


def start_python(*arguments) -> subprocess.Popen | forks.Fork:
    """Starts `python ARGUMENTS` in the repository, by a fork; its stdout is read by the test."""
    words = [str(argument) for argument in arguments]
    if forks.AVAILABLE:
        return forks.popen(words, package=ROOT, cwd=ROOT)
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def run_python(
    *arguments, timeout=280, check=True, real=False, package=ROOT, **kwargs
) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` in the repository; fails the test with its output if it fails.

    By a fork (tests/forks.py) of the folder `package`, and torchrun on one machine by one for each
    rank, unless it is to be `real`.
    """
    words = [str(argument) for argument in arguments]
    kwargs = {"cwd": ROOT, "timeout": timeout, **kwargs}
    if real or not forks.AVAILABLE:
        kwargs |= {"capture_output": True, "text": True, "encoding": "utf-8"}
        done = subprocess.run([sys.executable, *words], check=False, **kwargs)
    else:
        if words[:3] == TORCHRUN:
            kwargs["ranks"] = int(words[3].removeprefix("--nproc_per_node="))
            del words[:4]
        done = forks.run(words, package=package, **kwargs)
    if check and done.returncode:
        pytest.fail(f"{arguments} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
