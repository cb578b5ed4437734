"""LayerNorm by a kernel equals LayerNorm by PyTorch."""

import copy

import pytest
import torch

from gpt2.errors import UserError
from gpt2.kernels import layer_norm
from gpt2.kernels.layer_norm import LayerNorm, with_norm

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
    monkeypatch.setattr(layer_norm, "_in_bf16", lambda _: True)
    for function in (layer_norm.LayerNorm.__call__, lambda norm, x: with_norm(x, norm)[1]):
        layer = LayerNorm(16)
        getattr(layer, frozen).requires_grad_(requires_grad=False)
        function(layer, torch.randn(2, 16, requires_grad=True)).sum().backward()
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


def test_second_derivatives_are_refused(monkeypatch):
    monkeypatch.setattr(layer_norm, "_wide_in_bf16", lambda _: True)
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(UserError, match="the kernels for speed have first derivatives only"):
        torch.autograd.grad(LayerNorm(8)(x).sum(), x, create_graph=True)


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


def both(layer, x, upstream):
    """The stream goes on past the norm; gradients of all."""
    past, y = with_norm(x, layer)
    loss = (torch.stack([past.to(y.dtype), y]) * upstream.to(y.dtype)).sum()
    return past, y, *torch.autograd.grad(loss, [x, *layer.parameters()])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(37, 64), (8192, 768), (1500, 1600)])
def test_the_gradient_past_a_norm_is_added_as_exactly_as_by_pytorch(
    rows, width, compiled, device, monkeypatch
):
    """On a CPU the same autograd function, around the plain form."""
    torch.manual_seed(0)
    rows = min(rows, 300) if device == "cpu" else rows
    layer = LayerNorm(width).to(device)
    for p in layer.parameters():
        p.data.normal_(1, 0.1)
    x = (2 * torch.randn(rows, width, device=device) + 3).bfloat16().requires_grad_()
    upstream = torch.randn(2, rows, width, device=device).bfloat16()
    in_double = x.detach().double().requires_grad_()
    exact = both(copy.deepcopy(layer).double(), in_double, upstream.double())
    backend = "inductor" if device == "cuda" else "aot_eager"
    function = torch.compile(both, backend=backend) if compiled else both
    found = []
    with torch.autocast(device, torch.bfloat16):
        for ours in (True, False):
            monkeypatch.setattr(layer_norm, "_in_bf16", lambda _, ours=ours: ours)
            torch._dynamo.reset()
            found.append(function(layer, x, upstream))
    assert found[0][1].dtype is torch.bfloat16
    for ours, theirs, right in zip(*found, exact, strict=True):
        assert error(ours, right) < 1.1 * error(theirs, right) + 4e-3


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_who_looks_at_a_norm_sees_it(kind, monkeypatch):
    monkeypatch.setattr(layer_norm, "_in_bf16", lambda _: True)
    layer, x = LayerNorm(16), torch.randn(2, 16).bfloat16().requires_grad_()
    seen = []
    handle = getattr(layer, f"register_{kind}_hook")(lambda *_: seen.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        with_norm(x, layer)[1].sum().backward()
        handle.remove()
        with_norm(x, layer)[1].sum().backward()
    assert seen == [1]


def test_a_norm_that_computes_something_else_is_called(monkeypatch):
    class Doubled(LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    monkeypatch.setattr(layer_norm, "_in_bf16", lambda _: True)
    x, replaced, plain = torch.randn(2, 16), LayerNorm(16), LayerNorm(16)
    replaced.forward = lambda x: 2 * plain.forward(x)
    expected = 2 * plain.eval()(x)
    for layer in (Doubled(16), replaced):
        torch.testing.assert_close(with_norm(x, layer)[1], expected)


def test_no_norm_of_its_own_outside_of_training(monkeypatch):
    monkeypatch.setattr(layer_norm, "_in_bf16", lambda _: True)
    layer, x = LayerNorm(16), torch.randn(2, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert with_norm(x, layer)[1].dtype is torch.bfloat16
        assert with_norm(x.float(), layer.eval())[1].dtype is torch.float32
