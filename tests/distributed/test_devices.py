"""Decisions about device, precision and compilation, on faked machines."""

import contextlib

import pytest
import torch

from gpt2.distributed import devices
from gpt2.distributed.devices import allow_fp8, choose_compile, choose_device, choose_dtype
from gpt2.errors import UserError

CPU, GPU, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU that says what a T4 says: bf16 yes, if emulation counts."""

    def make(native_bf16: bool, capability=(7, 5)):
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: including_emulation or native_bf16,
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    return make


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_gpu_dtype(fake_gpu, native, dtype):
    fake_gpu(native)
    chosen, reason = choose_dtype("auto", GPU)
    assert chosen is dtype
    assert "bf16" in reason


@pytest.mark.parametrize("fast", [True, False])
def test_cpu_dtype(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_dtype("auto", CPU)[0] is (torch.bfloat16 if fast else torch.float32)


def test_other_dtypes():
    assert choose_dtype("auto", MPS)[0] is torch.float32
    assert choose_dtype("bfloat16", MPS) == (torch.bfloat16, "as asked")
    assert choose_dtype("float32", GPU)[0] is torch.float32
    with pytest.raises(UserError, match="loss scaling"):
        choose_dtype("float16", MPS)


def test_device_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(UserError, match="no Apple GPU"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == MPS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert choose_device("cuda:0", local_rank=1) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="GPU number 2 is not there, this machine shows 2"):
        choose_device("auto", local_rank=2)


def test_compile_is_off_where_it_does_not_pay():
    assert choose_compile("auto", CPU)[0] is False
    assert choose_compile("False", GPU) == (False, "as asked")


def test_compile_problems_have_reasons(monkeypatch, fake_gpu):
    fake_gpu(False, capability=(6, 1))
    assert "7.0" in choose_compile("True", GPU)[1]
    monkeypatch.setattr(devices.shutil, "which", lambda _: None)
    assert "compiler" in choose_compile("True", CPU)[1]
    monkeypatch.undo()

    def broken(_):
        raise RuntimeError("no triton here\nsecond line")

    monkeypatch.setattr(torch, "compile", broken)
    on, reason = choose_compile("True", CPU)
    assert on is False
    assert reason == "torch.compile does not work here (no triton here); going on without"


def test_fp8_needs_a_new_gpu_and_bf16(fake_gpu, monkeypatch):
    monkeypatch.setattr(devices, "describe", str)
    assert allow_fp8("none", CPU, torch.float32) is False
    fake_gpu(True, capability=(8, 9))
    assert allow_fp8("head", GPU, torch.bfloat16) is True
    with pytest.raises(UserError, match="not float16 on cuda:0; leave it out"):
        allow_fp8("head", GPU, torch.float16)
    fake_gpu(True, capability=(8, 0))
    with pytest.raises(UserError, match=r"compute capability 8\.9"):
        allow_fp8("head", GPU, torch.bfloat16)
    with pytest.raises(UserError, match="on cpu"):
        allow_fp8("head", CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("device", "compiled", "sharded", "expected"),
    [
        ("cuda", True, False, True),
        ("cuda", False, False, False),
        ("cuda", True, True, False),
        ("cpu", True, False, False),
        ("mps", True, False, False),
    ],
)
def test_graphs_are_for_compiled_gpus(device, compiled, sharded, expected):
    chosen, reason = devices.choose_graph(torch.device(device), compiled, sharded)
    assert chosen is expected
    assert reason


@pytest.mark.parametrize(
    ("ranks", "here", "peers", "expected"),
    [(4, 4, {1, 2, 3}, True), (4, 4, {1, 2}, False), (8, 4, {1, 2, 3}, False)],
)
def test_graphs_of_several_ranks_need_gpus_that_reach_each_other(
    ranks, here, peers, expected, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda _, other: other in peers)
    chosen, reason = devices.choose_graph(torch.device("cuda:0"), True, False)
    assert chosen is expected
    assert reason
