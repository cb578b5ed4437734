"""Each operation against its plain form, in double precision."""

import pytest
import torch

from gpt2.kernels import head_loss as head_loss_module
from gpt2.kernels.attention import causal_attention, causal_attention_reference
from gpt2.kernels.head_loss import head_logits, head_loss, head_loss_reference


@pytest.mark.parametrize(("new", "total"), [(8, 8), (1, 8), (3, 8), (1, 1)])
def test_attention_equals_reference(new, total):
    q = torch.randn(2, 3, new, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, total, 16, dtype=torch.float64)
    torch.testing.assert_close(causal_attention(q, k, v), causal_attention_reference(q, k, v))


def test_attention_gradients():
    inputs = [torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(causal_attention, inputs)


@pytest.mark.parametrize(("rows", "padded"), [(100, 128), (128, 128), (129, 256)])
def test_head_equals_plain_product(rows, padded):
    x, weight = torch.randn(7, 16), torch.randn(rows, 16)
    logits = head_logits(x, weight, padded)
    assert logits.shape == (7, rows)
    torch.testing.assert_close(logits, x @ weight.t(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", [head_loss, head_loss_reference])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("n", [1, 16, 45])  # less than, exactly and more than one chunk of 16 rows
@pytest.mark.parametrize("cap", [0.0, 3.0])  # most logits reach beyond 3
def test_head_loss_and_gradients_equal_the_formula(implementation, reduction, n, cap):
    x = torch.randn(n, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(100, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 100, (n,))
    targets[1::5] = -1
    upstream = torch.randn(n if reduction == "none" else (), dtype=torch.float64)
    loss = implementation(x, weight, targets, 128, reduction, softcap=cap)
    ours = torch.autograd.grad(loss, (x, weight), upstream)
    keep = targets >= 0
    logits = x @ weight.t()
    logprobs = (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)
    each = -logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0] * keep
    plain = {"sum": each.sum(), "mean": each.sum() / keep.sum(), "none": each}[reduction]
    theirs = torch.autograd.grad(plain, (x, weight), upstream)
    torch.testing.assert_close(loss, plain)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.long
@pytest.mark.parametrize("compiled", [False, True])
def test_a_frozen_head_costs_no_gradient(monkeypatch, compiled):
    """As beside adapters: the product that would make it is never computed."""
    x = torch.randn(45, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(100, 16, dtype=torch.float64)
    targets = torch.randint(0, 100, (45,))
    expected = torch.autograd.grad(head_loss_reference(x, weight, targets, 128, "sum"), x)[0]
    monkeypatch.setattr(head_loss_module, "_write_matmul", None)
    function = torch.compile(head_loss, backend="aot_eager") if compiled else head_loss
    ours = torch.autograd.grad(function(x, weight, targets, 128, "sum"), x)[0]
    torch.testing.assert_close(ours, expected)
    with pytest.raises(TypeError, match="NoneType"):
        head_loss(x, weight.requires_grad_(), targets, 128, "sum")


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_chunked_head_loss_in_bf16_is_as_exact_as_the_plain_form(monkeypatch, cap):
    """Both against double precision; also without gradients, where nothing is kept."""
    torch.manual_seed(0)
    x = torch.randn(300, 64, requires_grad=True)
    weight = (torch.randn(1000, 64) * 0.1).requires_grad_()
    targets = torch.randint(0, 1000, (300,))
    exact = head_loss_reference(x.double(), weight.double(), targets, 1024, "sum", softcap=cap)
    exact_grads = torch.autograd.grad(exact, (x, weight))
    errors = {}
    for implementation in (head_loss, head_loss_reference):
        with torch.autocast("cpu", torch.bfloat16):
            loss = implementation(x, weight, targets, 1024, "sum", softcap=cap)
        assert loss.dtype is torch.float32
        grads = torch.autograd.grad(loss, (x, weight))
        assert [g.dtype for g in grads] == [torch.float32, torch.float32]
        errors[implementation] = [
            ((g - e).norm() / e.norm()).item() for g, e in zip(grads, exact_grads, strict=True)
        ]
        assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    for ours, plain in zip(errors[head_loss], errors[head_loss_reference], strict=True):
        assert ours < max(1.2 * plain, 5e-3)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)  # where gradients would begin
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        without = head_loss(x, weight, targets, 1024, "sum", softcap=cap)
    assert without.item() == pytest.approx(exact.item(), rel=1e-4)


def test_cap_of_very_large_logits_has_no_gradient_and_no_nan():
    x = torch.full((2, 4), 1e4, requires_grad=True)
    weight = torch.randn(9, 4).requires_grad_()
    loss = head_loss(x, weight, torch.tensor([3, -1]), 128, "sum", softcap=15.0)
    grads = torch.autograd.grad(loss, (x, weight))
    assert torch.isfinite(loss)
    assert not any(g.any() for g in grads)
