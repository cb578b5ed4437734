"""Products with something around them, against the plain layers in float64."""

import copy

import pytest
import torch
from torch import nn

from gpt2.config.model import GPT2Config
from gpt2.kernels import linear
from gpt2.model.gpt import Block

from ..conftest import error

NAMES = ["qkv", "add_linear", "add_mlp", "add_mlp_recomputed"]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def call(name: str, block: Block, residual, x, upstream):
    """Result and gradients of one of the functions."""
    if name == "qkv":
        y = torch.cat(linear.qkv(x, block.attn.c_attn), -1)
        parameters = list(block.attn.c_attn.parameters())
    elif name == "add_linear":
        y = linear.add_linear(residual, x, block.attn.c_proj)
        parameters = [residual, *block.attn.c_proj.parameters()]
    else:
        layers, recompute = (block.mlp.c_fc, block.mlp.c_proj), name == "add_mlp_recomputed"
        y = linear.add_mlp(residual, x, *layers, recompute=recompute)
        parameters = [residual, *block.mlp.parameters()]
    return y, *torch.autograd.grad(y, [x, *parameters], upstream[..., : y.shape[-1]].to(y))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("rows", [1024, 8192])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_as_exact_as_plain_layers_in_bf16(name, bias, rows, device, monkeypatch):
    """On a CPU the same autograd functions run on plain matmuls, compiled on a GPU only."""
    torch.manual_seed(0)
    width = 768 if device == "cuda" else 64
    block = Block(GPT2Config(n_embd=width, n_head=1), 0).to(device)
    for layer in block.modules():
        if isinstance(layer, nn.Linear) and not bias:
            layer.bias = None
    for p in block.parameters():
        p.data.normal_(0, 0.1)
    x, residual = torch.randn(2, 2, rows // 2, width, device=device)
    upstream = torch.randn(2, rows // 2, 3 * width, device=device)
    inputs = residual.bfloat16().requires_grad_(), x.bfloat16().requires_grad_(), upstream
    in_double = [t.detach().double().requires_grad_() for t in inputs]
    exact = call(name, copy.deepcopy(block).double(), *in_double)
    compiled = torch.compile(call) if device == "cuda" else call
    with torch.autocast(device, torch.bfloat16):
        assert linear._by_cublaslt(x, block.attn.c_attn) == (device == "cuda")
        monkeypatch.setattr(linear, "_by_cublaslt", lambda *_: True)
        ours, again = call(name, block, *inputs), compiled(name, block, *inputs)
        monkeypatch.setattr(linear, "_by_cublaslt", lambda *_: False)
        theirs = call(name, block, *inputs)
    expected = {"qkv": (3, 4), "add_linear": (4, 5)}.get(name, (5, 7))[bias]
    assert len(ours) == len(theirs) == expected
    for index, (a, b, c, right) in enumerate(zip(ours, again, theirs, exact, strict=True)):
        if name == "qkv" and index == 3:  # the bias of the keys does not matter to attention
            assert not a[width : 2 * width].any()
            keep = torch.arange(3 * width, device=device) // width != 1
            a, b, c, right = a[keep], b[keep], c[keep], right[keep]  # noqa: PLW2901
        # sums of three matmuls are rounded to bf16 three times instead of once
        assert max(error(a, right), error(b, right)) < 1.5 * error(c, right) + 1e-4
        assert a.dtype == c.dtype


def test_small_inputs_dropout_and_inference_take_the_plain_way(monkeypatch):
    """`_by_cublaslt` is asked with what decides; a CPU never qualifies."""
    x = torch.randn(1, 2048, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not linear._by_cublaslt(x, nn.Linear(64, 64))
    block = Block(GPT2Config(n_embd=64, n_head=1), 0)
    monkeypatch.setattr(linear, "_by_cublaslt", lambda *_: True)
    torch.manual_seed(0)
    y = linear.add_linear(torch.zeros_like(x), x, block.attn.c_proj, dropout=0.5)
    assert 0.4 < (y == 0).float().mean() < 0.6


class Lacking:
    """`torch.ops.aten` without one operator; torch itself asks it for others."""

    def __init__(self, name):
        self.name, self.aten = name, torch.ops.aten

    def __getattr__(self, name):
        if name == self.name:
            raise AttributeError(name)
        return getattr(self.aten, name)


def test_gelu_backward_without_the_operator(monkeypatch):
    dy, x = torch.randn(2, 5, 7, dtype=torch.float64)
    by_operator = linear.gelu_backward(dy, x)
    monkeypatch.setattr(torch.ops, "aten", Lacking("gelu_backward"))
    with torch.no_grad():  # as in an operator's own backward
        found = linear.gelu_backward(dy, x)
    torch.testing.assert_close(found, by_operator)
    assert not found.requires_grad
