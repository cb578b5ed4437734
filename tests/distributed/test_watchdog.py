"""A rank that hangs is named within the stated time, with real stopped processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from gpt2.checkpoint import training_state
from gpt2.distributed.watchdog import HUNG, Watchdog

from ..conftest import ROOT, TINY


class Shared:
    """The store of several watchdogs of one process."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def set(self, key, value):
        with self._changed:
            self._values[key] = value.encode()
            self._changed.notify_all()

    def get(self, key):
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, timeout=5)
            return self._values[key]


class Rank:
    def __init__(self, store, rank, size=2, seconds=0.5):
        self.told, self.left = [], threading.Event()
        self.dog = Watchdog(
            store, rank, size, seconds=seconds, log=self.told.append, leave=self.leave
        )

    def leave(self, code):
        assert code == HUNG
        self.left.set()
        self.dog.close()


@pytest.fixture
def ranks():
    store = Shared()
    made = [Rank(store, 0), Rank(store, 1)]
    yield made
    for rank in made:
        rank.dog.close()


def test_rank_that_is_behind_is_named(ranks):
    first, second = ranks
    for rank in ranks:
        rank.dog.reached(7)
    first.dog.beat()
    assert first.left.wait(5)
    assert len(first.told) == 1
    assert re.match(
        r"\[rank 0\] no progress for \d+ seconds after step 7: "
        rf"rank 1 \(pid {os.getpid()} on \S+\) has done step 7 and does not go on; "
        "this run ends here, and the same command goes on",
        first.told[0],
    )
    assert second.left.wait(5)  # which says nothing: one line is enough
    assert not second.told


def test_network_that_is_gone_is_no_ranks_fault(ranks):
    for rank in ranks:
        rank.dog.reached(3)
    assert ranks[0].left.wait(5)
    assert "all ranks wait at the same place" in ranks[0].told[0]


def test_progress_and_long_work_of_one_rank_are_no_hang(ranks):
    first, second = ranks
    for rank in ranks:
        rank.dog.reached(1)
    with second.dog.alone():
        time.sleep(1.5)  # three times the limit
    for _ in range(8):
        time.sleep(0.2)
        for rank in ranks:
            rank.dog.beat()
    assert not first.left.is_set()
    assert not second.left.is_set()


def test_nothing_is_said_before_the_first_step(ranks):
    time.sleep(1.2)
    assert not any(rank.left.is_set() for rank in ranks)


def test_store_that_is_gone_is_said():
    class Gone(Shared):
        def set(self, key, value):
            raise RuntimeError("connection reset by peer")

    rank = Rank(Gone(), 1, seconds=2.5)
    rank.dog.reached(4)
    assert rank.left.wait(5)
    assert "the machine that started the run, or the network to it, does not answer" in rank.told[0]


# ---- real ranks ---------------------------------------------------------------------------------


@pytest.fixture
def start_ranks(data_dir, tmp_path):
    """A function (arguments) -> two processes of one run, without a launcher between."""
    started = []

    def start(*arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(2):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            command = [sys.executable, "train_gpt2.py", f"--data_dir={data_dir}"]
            command += [f"--out_dir={tmp_path}", *TINY, "--hang_timeout_seconds=4", *arguments]
            started.append(
                subprocess.Popen(
                    command, env=environment, cwd=ROOT, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        for line in started[0].stdout:
            if line.startswith("step") and " 5/" in line:
                break
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.fault(21, "SIGSTOP to either of two ranks")
def test_stopped_rank_is_named(start_ranks, tmp_path, stopped):
    """SIGSTOP: the other ends within the limit and its tenths; what was saved is whole."""
    ranks = start_ranks("--max_steps=100000", "--save_every=2", "--eval_every=0")
    os.kill(ranks[stopped].pid, signal.SIGSTOP)
    began = time.monotonic()
    other = ranks[1 - stopped]
    text, _ = other.communicate(timeout=30)
    seconds = time.monotonic() - began
    assert other.returncode == HUNG, text
    assert 3.5 < seconds < 10
    if stopped == 1:
        told = re.search(
            r"error: \[rank 0\] no progress for \d+ seconds after step (\d+): rank 1 "
            rf"\(pid {ranks[1].pid} on \S+\) has given no sign of life for \d+ seconds "
            r"and had done step (\d+); its process or its machine is stopped",
            text,
        )
        assert told, text
        assert int(told[1]) - int(told[2]) in range(60)  # it publishes every 0.4 s
    else:  # rank 0 holds the store where no launcher does
        assert "[rank 1]" in text
        assert "the machine that started the run" in text or "rank 0 (pid" in text, text
    os.kill(ranks[stopped].pid, signal.SIGKILL)
    assert training_state.find_state(tmp_path, "auto")[0].step >= 2
