"""Attention within a window: the plain form on a CPU, cuDNN on a GPU."""

import pytest
import torch

from gpt2.kernels import window_attention as window_attention_module
from gpt2.kernels.attention import visible_attention
from gpt2.kernels.cudnn_attention import frontend
from gpt2.kernels.cudnn_choice import takes
from gpt2.kernels.window_attention import describe_windows, window_attention

from ..conftest import error

WINDOWS = (1, 256), (100, 1024), (128, 2048), (200, 300)


def compared(window: int, T: int, attend, dtype: torch.dtype, device: str) -> list[float]:
    """Errors of the result and of three gradients against a dense mask in float64.

    Relative to the values and the upstream gradient: with a window of one, gradients of q are 0.
    """
    torch.manual_seed(0)
    width = 64 if device == "cpu" else 128
    parts = torch.randn(3, 2, T, 3, width, device=device, dtype=dtype).transpose(2, 3).unbind()
    upstream = torch.randn(2, T, 3, width, device=device, dtype=dtype).transpose(1, 2)
    at = torch.arange(T, device=device)
    distance = at[:, None] - at
    seen = ((distance >= 0) & (distance < window))[None, None]
    both = []
    for function, last, kind in ((attend, window, dtype), (visible_attention, seen, torch.float64)):
        inputs = [part.detach().to(kind).requires_grad_() for part in parts]
        y = function(*inputs, last)
        both.append([y, *torch.autograd.grad(y, inputs, upstream.to(kind))])
    return [
        ((found.double() - exact).norm() / upstream.double().norm()).item()
        for found, exact in zip(*both, strict=True)
    ]


@pytest.mark.parametrize(("window", "T"), [(1, 20), (7, 20), (20, 20), (99, 20)])
def test_the_plain_form_equals_a_mask(window, T):
    assert max(compared(window, T, window_attention, torch.float32, "cpu")) < 1e-5


@pytest.mark.slow
def test_it_compiles_as_an_operator():
    compiled = torch.compile(window_attention, fullgraph=True)
    assert max(compared(7, 20, compiled, torch.float32, "cpu")) < 1e-5


def test_only_a_gpu_takes():
    cpu = torch.device("cpu")
    assert not takes(cpu, 128, True)
    said = describe_windows(cpu, 128, torch.bfloat16)
    assert said == "attention windows: FlexAttention where it is compiled"


@pytest.mark.parametrize("there", [False, True])
def test_the_note_says_what_to_install(there, monkeypatch):
    monkeypatch.setattr(window_attention_module, "fits", lambda *_: True)
    monkeypatch.setattr(window_attention_module, "frontend", lambda: there or None)
    on = torch.device("cuda"), 128, torch.bfloat16
    said = describe_windows(*on)
    assert said == "attention windows: cuDNN" if there else said.endswith('[cudnn]"')
    assert describe_windows(*on, alone=False).endswith("FlexAttention where it is compiled")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("window", "T"), WINDOWS)
def test_windows_by_cudnn_equal_a_mask(window, T, compiled):
    if frontend() is None:
        pytest.skip("needs nvidia-cudnn-frontend")
    cuda = torch.device("cuda")
    assert takes(cuda, 128, True)
    assert not takes(cuda, 136, True)
    assert not takes(cuda, 128, False)
    assert describe_windows(cuda, 128, torch.bfloat16).endswith("cuDNN")
    attend = torch.compile(window_attention) if compiled else window_attention
    assert max(compared(window, T, attend, torch.bfloat16, "cuda")) < 1e-2


@pytest.mark.gpu
def test_a_cuda_graph_records_it():
    if frontend() is None:
        pytest.skip("needs nvidia-cudnn-frontend")
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 512, 3, 64, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
    inputs = [part.detach().requires_grad_() for part in qkv.unbind()]

    def results():
        y = window_attention(*inputs, 128)
        return y, *torch.autograd.grad(y.float().square().sum(), inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = results()
    with torch.no_grad():
        for part in inputs:
            part.copy_(torch.randn_like(part))
    graph.replay()
    for found, wanted in zip(recorded, results(), strict=True):
        assert error(found.double(), wanted.double()) < 1e-3
