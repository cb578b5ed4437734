"""The fp8 head in plain PyTorch: with and without private operators, and whatever a cast does."""

import math

import pytest
import torch

from gpt2.kernels import fp8
from gpt2.kernels import head_loss as head_loss_module
from gpt2.kernels.head_loss import head_loss_reference

from ..conftest import error

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def fp8_head(x, weight, targets, cap=0.0):
    """(loss, gradient of x, gradient of the weight) for V = P."""
    return head_loss_module._head_in_fp8(x, weight, targets, weight.shape[0], cap)


def rows(n=70, width=32, vocab=128):
    torch.manual_seed(0)
    targets = torch.randint(0, vocab, (n,))
    targets[::7] = -1
    return torch.randn(n, width), torch.randn(vocab, width) * 0.2, targets


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_fp8_head_on_a_cpu_against_float64(cap):
    """What the kernels do on a GPU (tests/test_gpu.py), rows that fill no whole tile included."""
    x, weight, targets = rows()
    inputs = [t.double().requires_grad_() for t in (x, weight)]
    exact = head_loss_reference(*inputs, targets, 128, "sum", softcap=cap)
    exact_grads = torch.autograd.grad(exact, inputs)
    loss, *grads = fp8_head(x.bfloat16(), weight.bfloat16(), targets, cap)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for found, wanted in zip(grads, exact_grads, strict=True):
        assert 0.01 < error(found, wanted) < 0.1  # e5m2 keeps two bits of the mantissa
    assert not grads[0][::7].any()


@pytest.mark.parametrize(("one", "other"), [(E4M3, E4M3), (E5M2, E4M3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matmul_without_the_private_operator(one, other, dtype, monkeypatch):
    a, b = torch.randn(64, 32).to(one), torch.randn(48, 32).to(other).t()
    scales = torch.tensor(0.5), torch.tensor(3.0)
    by_operator = fp8.scaled_matmul(a, b, *scales, dtype)
    monkeypatch.delattr(torch, "_scaled_mm")
    found = fp8.scaled_matmul(a, b, *scales, dtype, fast=True)
    assert found.dtype is by_operator.dtype is dtype
    torch.testing.assert_close(found, by_operator, atol=1e-2, rtol=1e-2)
    exact = a.double() @ b.double() * 1.5
    assert error(found, exact) < (4e-3 if dtype is torch.bfloat16 else 1e-6)


def test_head_without_the_private_operator(monkeypatch):
    x, weight, targets = rows()
    by_operator = fp8_head(x, weight, targets)
    monkeypatch.delattr(torch, "_scaled_mm")
    for found, wanted in zip(fp8_head(x, weight, targets), by_operator, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


class OldCast:
    """PyTorch 2.11's cast to e4m3: NaN for every number that would round beyond 448."""

    def __init__(self, saturating):
        self.to = torch.Tensor.to
        self.saturating = saturating

    def __call__(self, tensor, *given, **named):
        if E4M3 not in given:
            return self.to(tensor, *given, **named)
        beyond = tensor.abs() > 464  # halfway to the next number that e4m3 would have
        limit = 448.0 if self.saturating else math.nan
        tensor = torch.where(beyond, limit * tensor.sign(), tensor)
        return self.to(tensor, *given, **named)


@pytest.fixture(params=["of this PyTorch", "to NaN", "saturating"])
def cast(request, monkeypatch):
    """A cast as this PyTorch has it, and as others have it."""
    if request.param != "of this PyTorch":
        old = OldCast(request.param == "saturating")
        monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: old(*a, **k))  # noqa: PLW0108 - a method binds


@pytest.mark.usefixtures("cast")
def test_no_number_is_lost_by_a_cast():
    """The quotient is clamped before the cast, and the scale keeps what is not finite."""
    torch.manual_seed(0)
    for size in (1e-20, 1.0, 3.1e38):
        x = torch.randn(40, 33) / 5 * size
        x[3, 4], x[5, 6] = size, -size
        out, transposed, scale = fp8.quantize(x)
        numbers = out.float()
        assert torch.equal(transposed.float(), numbers.t())
        assert numbers.abs().max() == 448 or size < 1e-12
        assert scale.isfinite()
        assert error(numbers * scale, x) < 0.05 or size < 1e-12
    weight, targets = rows()[1:]
    for bad in (math.nan, math.inf, -math.inf):
        for where in ("x", "weight"):
            x, spoiled = rows()[0], weight.clone()
            (x if where == "x" else spoiled)[1, 2] = bad
            assert not fp8.quantize(x if where == "x" else spoiled)[2].isfinite()
            loss, *grads = fp8_head(x, spoiled, targets)
            assert not loss.isfinite(), (where, bad)
            assert not all(grad.isfinite().all() for grad in grads)


@pytest.mark.usefixtures("cast")
def test_a_quotient_beyond_448_is_clamped(monkeypatch):
    """As by a scale that was rounded down; a cast of PyTorch 2.11 would give NaN."""
    monkeypatch.setattr(fp8, "e4m3_scale", lambda x: torch.tensor(0.5))
    out = fp8.quantize(torch.tensor([[250.0, -1000.0, 3.0]]))[0]
    assert out.float().tolist() == [[448.0, -448.0, 6.0]]
