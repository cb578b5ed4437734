"""One process and its signals, precision and random state."""

import os
import signal
import time

import pytest
import torch

from gpt2.config.model import GPT2Config
from gpt2.config.train import SystemOptions
from gpt2.distributed import runtime
from gpt2.distributed.runtime import Runtime
from gpt2.errors import UserError
from gpt2.model.gpt import GPT

CPU, GPU, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


def test_scaler_only_for_fp16():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert Runtime(CPU, dtype).grad_scaler().is_enabled() is (dtype is torch.float16)


def test_autocast():
    x = torch.randn(4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        with Runtime(CPU, dtype).autocast():
            assert (x @ x).dtype is dtype


@pytest.mark.parametrize("layers", [2, 48])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_are_compiled_apart_if_many_or_computed_twice(checkpointing, layers):
    """PyTorch 2.11 would else keep what it should drop (`pytest -m gpu` measures it)."""
    model = GPT(GPT2Config(n_layer=layers, n_head=2, n_embd=8, block_size=8, vocab_size=9))
    model.checkpoint_activations = checkpointing
    Runtime(CPU, torch.float32).compile(model)
    apart = checkpointing or layers == 48
    assert (model._compiled_call_impl is None) == apart
    for block in model.transformer.h:
        assert (block._compiled_call_impl is not None) == apart


def test_random_state_round_trip():
    rt = Runtime(CPU, torch.float32)
    state = rt.rng_state()
    first = torch.rand(3)
    rt.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


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
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    with runtime.start(SystemOptions(device="cpu")):
        signal.raise_signal(signal.SIGINT)
        now[0] = 2.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_on_main_passes_results_and_errors():
    rt = Runtime(CPU, torch.float32)
    assert rt.on_main(lambda: 3) == 3

    def fail():
        raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        rt.on_main(fail)
