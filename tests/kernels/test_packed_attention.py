"""Attention whose gradient is one matrix: the plain form on a CPU, cuDNN on a GPU."""

import copy

import pytest
import torch

from gpt2.config.model import GPT2Config
from gpt2.kernels import cudnn_choice, linear
from gpt2.kernels import packed_attention as packed_attention_module
from gpt2.kernels.attention import causal_attention_reference
from gpt2.kernels.packed_attention import describe_packing, packed_attention
from gpt2.model.gpt import GPT

from ..conftest import error

CPU = torch.device("cpu")


def by_formula(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in qkv.split(qkv.shape[-1] // 3, -1)
    )
    return causal_attention_reference(q, k, v).transpose(1, 2).flatten(2)


def compared(
    attend, device: str, dtype: torch.dtype, T: int, heads: int, width: int = 64
) -> list[float]:
    """Relative errors of the result and of the gradient against the formula in float64."""
    torch.manual_seed(0)
    qkv = torch.randn(2, T, 3 * heads * width, device=device, dtype=dtype)
    upstream = torch.randn(2, T, heads * width, device=device, dtype=dtype)
    both = []
    for function, kind in ((attend, dtype), (by_formula, torch.float64)):
        given = qkv.to(kind).requires_grad_()
        y = function(given, heads)
        both.append([y, *torch.autograd.grad(y, given, upstream.to(kind))])
    return [error(found.double(), exact) for found, exact in zip(*both, strict=True)]


@pytest.mark.parametrize(("T", "heads"), [(1, 1), (20, 3)])
def test_the_plain_form_equals_the_formula(T, heads):
    assert max(compared(packed_attention, "cpu", torch.float32, T, heads)) < 1e-5


@pytest.mark.slow
def test_it_compiles_as_an_operator():
    compiled = torch.compile(packed_attention, fullgraph=True)
    assert max(compared(compiled, "cpu", torch.float32, 20, 3)) < 1e-5


def loss_and_gradients(model: GPT, idx: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.autocast(idx.device.type, torch.bfloat16):
        loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


def test_gpt2_learns_alike_with_packed_gradients(monkeypatch):
    """Through the same autograd functions as on a GPU, on plain matmuls."""
    torch.manual_seed(0)
    model = GPT(GPT2Config(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=300))
    idx, again = torch.randint(0, 300, (4, 33)), copy.deepcopy(model)
    wanted = loss_and_gradients(model, idx)
    called = []
    monkeypatch.setattr(linear, "_by_cublaslt", lambda *_: True)
    monkeypatch.setattr(cudnn_choice, "takes", lambda *_: called.append(1) or True)
    found = loss_and_gradients(again, idx)
    assert len(called) == 2, "one for each block"
    keys = slice(64, 128)
    for name, value in found.items():
        if name.endswith("c_attn.bias"):
            assert not value[keys].any(), "softmax ignores a bias of the keys"
            wanted[name][keys] = 0
        assert error(value, wanted[name]) < 4e-2, name


def test_dropout_and_a_cache_keep_pytorchs_attention(monkeypatch):
    monkeypatch.setattr(linear, "_by_cublaslt", lambda *_: True)
    monkeypatch.setattr(cudnn_choice, "takes", lambda *_: pytest.fail("asked"))
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 300}
    idx = torch.randint(0, 300, (2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        GPT(GPT2Config(**shape, dropout=0.1)).train()(idx, idx)
        model = GPT(GPT2Config(**shape))
        model(idx, cache=model.new_cache(2, torch.bfloat16, 8))


def test_a_single_position_keeps_pytorchs_attention(monkeypatch):
    monkeypatch.setattr(linear, "_by_cublaslt", lambda *_: True)
    monkeypatch.setattr(cudnn_choice, "takes", lambda *_: True)
    layer = torch.nn.Linear(64, 192)
    assert linear.packs(torch.ones(1024, 2, 64), layer, 1)
    assert not linear.packs(torch.ones(1024, 1, 64), layer, 1)


@pytest.mark.parametrize("there", [False, True])
def test_the_note_says_what_to_install(there, monkeypatch):
    assert not describe_packing(CPU, 64)
    monkeypatch.setattr(packed_attention_module, "fits", lambda *_, **__: True)
    monkeypatch.setattr(packed_attention_module, "frontend", lambda: there or None)
    said = describe_packing(CPU, 64)
    assert said.endswith("in one matrix" if there else '[cudnn]"')


def needs_cudnn():
    if not cudnn_choice.takes(torch.device("cuda"), 64, True):
        pytest.skip("needs nvidia-cudnn-frontend, and a Hopper or newer")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("T", "heads"), [(1024, 12), (512, 25), (300, 2)])
def test_cudnn_equals_the_formula(T, heads, compiled):
    needs_cudnn()
    attend = torch.compile(packed_attention) if compiled else packed_attention
    assert max(compared(attend, "cuda", torch.bfloat16, T, heads)) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("width", [8, 16, 32, 48, 80, 96, 128])
@pytest.mark.parametrize("T", [2, 31, 256])
def test_cudnn_takes_heads_of_all_widths(T, width):
    needs_cudnn()
    assert max(compared(packed_attention, "cuda", torch.bfloat16, T, 3, width)) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpt2_learns_alike_on_a_gpu(compiled, monkeypatch):
    needs_cudnn()
    torch.manual_seed(0)
    model = GPT(GPT2Config(n_layer=2)).cuda()
    idx, again = torch.randint(0, 50257, (4, 1025), device="cuda"), copy.deepcopy(model)
    if compiled:
        again.compile()
    found = loss_and_gradients(again, idx)
    monkeypatch.setattr(cudnn_choice, "takes", lambda *_: False)
    for name, value in loss_and_gradients(model, idx).items():
        assert error(found[name], value) < 3e-2, name
