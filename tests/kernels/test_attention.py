"""Which kernel computes attention, and what masks must not reach."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from gpt2.config.model import GPT2Config
from gpt2.kernels import attention
from gpt2.kernels.attention import (
    causal_attention,
    causal_attention_reference,
    describe_kernel,
    visible_attention,
)

from ..conftest import error

CPU = torch.device("cpu")


def test_the_kernel_is_the_one_that_pytorch_chooses(monkeypatch):
    config = GPT2Config(n_head=2, n_embd=16, block_size=16, dropout=0.1)
    plain = replace(config, dropout=0.0)
    assert describe_kernel(plain, CPU, torch.float32) == "causal attention: FlashAttention-2"
    asked = []

    def choice(q, k, v, **given):
        asked.append((q.shape, q.dtype, q.requires_grad, given))
        return int(SDPBackend.CUDNN_ATTENTION)

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    said = describe_kernel(config, CPU, torch.bfloat16)
    assert said == "causal attention: cuDNN"
    given = {"dropout_p": 0.1, "is_causal": True}
    assert asked == [((1, 2, 16, 8), torch.bfloat16, True, given)]
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    said = describe_kernel(plain, CPU, torch.float32)
    assert said == "causal attention: as PyTorch chooses"


@pytest.mark.parametrize(("positions", "by_cudnn"), [(64, False), (128, True), (192, False)])
def test_masks_of_odd_multiples_of_64_never_reach_cudnn(monkeypatch, positions, by_cudnn):
    allowed, real = [], F.scaled_dot_product_attention

    def record(*args, **given):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **given)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", record)
    q, k, v = torch.randn(3, 1, 2, positions, 8)
    visible = torch.ones(positions, positions, dtype=torch.bool).tril()[None, None]
    found = visible_attention(q, k, v, visible)
    torch.testing.assert_close(found, causal_attention_reference(q, k, v))
    assert allowed == [by_cudnn]
    assert torch.backends.cuda.cudnn_sdp_enabled()  # as before


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "width"), [(12, 64), (6, 128)])
def test_compiled_attention_runs_in_the_kernel_that_is_said(heads, width):
    """Forward and backward in bf16 against float64, and the names of the kernels."""
    torch.manual_seed(0)
    shape = 2, 1024, heads, width
    exact = [torch.randn(shape, device="cuda", dtype=torch.float64).transpose(1, 2) for _ in "qkv"]
    given = [t.bfloat16().detach().requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in given]
    wanted = causal_attention_reference(*exact)
    upstream = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, exact, upstream)
    compiled = torch.compile(causal_attention)

    def work():
        found = compiled(*given)
        return found, torch.autograd.grad(found, given, upstream.bfloat16())

    found, found_gradients = work()
    assert error(found, wanted) < 1e-2
    for one, other in zip(found_gradients, gradients, strict=True):
        assert error(one, other) < 2e-2
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        work()
        torch.cuda.synchronize()
    names = " ".join(event.key for event in record.key_averages()).lower()
    config = GPT2Config(n_head=heads, n_embd=heads * width)
    said = describe_kernel(config, given[0].device, torch.bfloat16)
    assert ("cudnn" in names) == said.endswith("cuDNN"), names
    assert said.endswith(("cuDNN", "FlashAttention-2"))
    if torch.cuda.get_device_capability()[0] == 9 and torch.backends.cudnn.version() > 91500:
        assert said.endswith("cuDNN")


@pytest.mark.gpu
def test_gradients_under_a_mask_are_finite_where_cudnn_has_nan():
    positions, width = 704, 64
    q, k, v = torch.randn(3, 1, 1, positions, width, device="cuda") * 0.1
    q[..., 0], k[..., 0] = 1.0, -120 * width**0.5  # all scores are about -120
    given = [t.bfloat16().requires_grad_() for t in (q, k, v)]
    visible = torch.ones(positions, positions, dtype=torch.bool, device="cuda").tril()[None, None]
    found = visible_attention(*given, visible)
    upstream = torch.randn_like(found)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, given, upstream))
    exact = causal_attention_reference(*(t.detach().double() for t in given))
    assert error(found, exact) < 1e-2
