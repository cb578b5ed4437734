"""Each operation against its plain form, in double precision."""

import pytest
import torch

from gpt2.ops import causal_attention, causal_attention_reference, head_logits, head_loss


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


def test_head_loss_and_gradients_equal_plain():
    torch.manual_seed(0)
    x = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(100, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 100, (9,))
    targets[2] = -1
    loss = head_loss(x, weight, targets, 128, "sum")
    ours = torch.autograd.grad(loss, (x, weight))
    logprobs = (x @ weight.t()).log_softmax(-1)
    keep = targets >= 0
    plain = -logprobs[keep].gather(1, targets[keep, None]).sum()
    theirs = torch.autograd.grad(plain, (x, weight))
    torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
