"""LayerNorm by a kernel equals LayerNorm by PyTorch."""

import copy

import pytest
import torch

from gpt2.kernels import layer_norm
from gpt2.kernels.layer_norm import LayerNorm

from ..conftest import error

GPU = pytest.mark.gpu


def call(layer, x, upstream):
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream.to(y.dtype))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("width", [1032, 1280, 1600])
def test_as_exact_as_pytorch_in_bf16(width, device, monkeypatch):
    """On a CPU the same autograd function, around PyTorch's LayerNorm; rows far from 0."""
    torch.manual_seed(0)
    layer = LayerNorm(width).to(device)
    for p in layer.parameters():
        p.data.normal_(1, 0.1)
    x = (2 * torch.randn(3, 50, width, device=device) + 3).bfloat16().requires_grad_()
    upstream = torch.randn(3, 50, width, device=device).bfloat16()
    in_double = x.detach().double().requires_grad_()
    exact = call(copy.deepcopy(layer).double(), in_double, upstream.double())
    functions = [call, torch.compile(call)] if device == "cuda" else [call]
    found = []
    with torch.autocast(device, torch.bfloat16):
        for ours in (True, False):
            monkeypatch.setattr(layer_norm, "_wide_in_bf16", lambda _, ours=ours: ours)
            found.append([function(layer, x, upstream) for function in functions])
    for parts in zip(*found[0], *found[1], exact, strict=True):
        *own, right = [error(part, parts[-1]) for part in parts]
        assert right == 0
        half = len(functions)
        assert max(own[:half]) < 1.1 * max(own[half:]) + 4e-3  # y is rounded to bf16 at once
    assert found[0][0][0].dtype is torch.bfloat16


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_get_no_gradient(frozen, monkeypatch):
    monkeypatch.setattr(layer_norm, "_wide_in_bf16", lambda _: True)
    layer = LayerNorm(16)
    getattr(layer, frozen).requires_grad_(requires_grad=False)
    layer(torch.randn(2, 16)).sum().backward()
    given = {name: p.grad is not None for name, p in layer.named_parameters()}
    assert given == {"weight": frozen != "weight", "bias": frozen != "bias"}


@GPU
def test_the_kernel_is_for_training_of_wide_rows_in_bf16():
    x = torch.randn(2, 1600, device="cuda").bfloat16()
    layer = LayerNorm(1600).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
        assert layer(x.float()).dtype is torch.float32
        assert LayerNorm(1024).cuda()(x[:, :1024]).dtype is torch.float32
        assert layer.eval()(x).dtype is torch.float32


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True)])
def test_backward_without_the_operator(wanted):
    x, dy = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    weight, bias = torch.randn(2, 16, dtype=torch.float64)
    _, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, 1e-5)
    given = dy, x, weight.shape, mean, rstd, weight, bias, wanted
    for found, theirs, asked in zip(
        layer_norm.layer_norm_backward(*given),
        torch.ops.aten.native_layer_norm_backward(*given),
        wanted,
        strict=True,
    ):
        if asked:
            torch.testing.assert_close(found, theirs)
        else:
            assert found is None


def test_the_plain_backward_takes_the_place_of_the_operator(monkeypatch):
    layer = LayerNorm(16)
    x, upstream = torch.randn(2, 3, 16, requires_grad=True).unbind()
    monkeypatch.setattr(layer_norm, "_wide_in_bf16", lambda _: True)
    by_operator = call(layer, x, upstream.detach())
    monkeypatch.setattr(layer_norm, "_backward", layer_norm.layer_norm_backward)
    for found, wanted in zip(call(layer, x, upstream.detach()), by_operator, strict=True):
        torch.testing.assert_close(found, wanted)
