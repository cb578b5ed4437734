"""One process and its signals, precision and random state."""

import hashlib
import os
import random
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from gpt2.config.train import SystemOptions
from gpt2.distributed import runtime, signals
from gpt2.distributed.random_state import rng_state, set_rng_state
from gpt2.distributed.runtime import Runtime
from gpt2.errors import UserError

CPU, GPU, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


def test_scaler_only_for_fp16():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert Runtime(CPU, dtype).grad_scaler().is_enabled() is (dtype is torch.float16)


def test_autocast():
    x = torch.randn(4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        with Runtime(CPU, dtype).autocast():
            assert (x @ x).dtype is dtype


def test_random_state_round_trip():
    state = rng_state(CPU)
    first, first_of_python = torch.rand(3), random.random()
    version, words, normal = state["python"]
    for python in ((version, words, normal), (version, tuple(words.tolist()), normal)):
        set_rng_state(state | {"python": python}, CPU)
        assert torch.equal(first, torch.rand(3))
        assert first_of_python == random.random()


@pytest.mark.parametrize(("error", "said"), [
    (dist.DistBackendError("NCCL error: remote process exited\nmore"),
     "NCCL error: remote process exited"),
    (RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:9"),
     "Connection closed by peer"),
    (RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Read error: Connection reset by peer"),
     "Connection reset by peer"),
    (RuntimeError("Connection closed by peer, says a download"), ""),
    (torch.OutOfMemoryError("CUDA out of memory"), ""),
    (RuntimeError(""), ""),
])  # fmt: skip
def test_a_lost_rank_is_known_by_its_error(error, said):
    assert runtime._of_a_lost_rank(error) == said


def test_signals_are_noticed_once_and_handlers_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with runtime.start(SystemOptions(device="cpu")) as rt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun passes on what the terminal sent as well
        time.sleep(0.01)
        assert rt.stop_signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_second_ctrl_c_ends_at_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with runtime.start(SystemOptions(device="cpu")):
        signal.raise_signal(signal.SIGINT)
        now[0] = 2.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_first_signal_is_answered_while_c_code_computes():
    answered: list[float] = []
    before = signal.set_wakeup_fd(-1)  # asyncio of an earlier test may have set one
    signal.set_wakeup_fd(before)

    def answer(number):
        assert number == signal.SIGINT
        answered.append(time.monotonic())

    with runtime.start(SystemOptions(device="cpu"), answer=answer) as rt:
        sender = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        sender.start()
        hashlib.pbkdf2_hmac("sha512", b"a", b"b", 600_000)  # no Python in between
        ended = time.monotonic()
        assert rt.stop_signal == signal.SIGINT
        sender.join()
    assert len(answered) == 1
    assert answered[0] < ended
    assert signal.set_wakeup_fd(before) == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_waiting_for_a_network_ends_at_the_first_signal(name):
    number = getattr(signal, name)
    with runtime.start(SystemOptions(device="cpu")) as rt:
        with pytest.raises(signals.StopNow) as stopped, signals.interruptible():
            signal.raise_signal(number)
        assert (stopped.value.number, rt.stop_signal) == (number, number)
    with runtime.start(SystemOptions(device="cpu")):
        with signals.interruptible():
            pass
        signal.raise_signal(number)  # outside: it is noted
        with pytest.raises(signals.StopNow), signals.interruptible():
            pytest.fail("waited for a network after the signal")
    with signals.interruptible():  # of the next run
        pass


def test_on_main_passes_results_and_errors():
    rt = Runtime(CPU, torch.float32)
    assert rt.on_main(lambda: 3) == 3

    def fail():
        raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        rt.on_main(fail)
