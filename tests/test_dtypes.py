"""Every operation of ours takes each mix of dtypes that a training run hands to it.

Parameters are float32 under DDP, and bf16 or fp16 under FSDP, whose policy casts them before each
block. Inputs are float32 or in the dtype of autocast. Adapters (LoRA) freeze the other parameters.
Activation checkpointing computes the forward pass again in the backward pass. The plain form of
each operation, in float64, says which numbers are right.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gpt2.kernels import layer_norm, linear
from gpt2.kernels.head_loss import head_loss, head_loss_reference
from gpt2.kernels.layer_norm import LayerNorm

from .conftest import error

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
ROWS, VOCAB, PADDED = 1024, 200, 256
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 3e-3}


class Operations(nn.Module):
    """One layer of each kind; `call` runs one of them on x and the residual, (ROWS, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = LayerNorm(width)
        self.attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        for p in self.parameters():
            p.data.normal_(0, 0.05)
        self.norm.weight.data += 1

    def call(self, name, residual, x, plain=False):
        if name == "norm":
            return self.norm(x)
        if name == "qkv":
            return torch.cat(linear.qkv(x, self.attn), -1)
        if name == "linear":
            return linear.linear(x, self.proj)
        if name == "add_linear":
            return linear.add_linear(residual, x, self.proj)
        if name.startswith("add_mlp"):
            recompute = name.endswith("recomputed")
            return linear.add_mlp(residual, x, self.fc, self.back, recompute=recompute)
        loss = head_loss_reference if plain else head_loss
        targets = torch.arange(ROWS, device=x.device) % VOCAB
        return loss(x, self.head.weight, targets, PADDED, name.removeprefix("head_"))

    def trained(self, name):
        layers = {"norm": [self.norm], "qkv": [self.attn], "linear": [self.proj]}
        layers |= {"add_linear": [self.proj], "add_mlp": [self.fc, self.back]}
        layers["add_mlp_recomputed"] = layers["add_mlp"]
        return [p for layer in layers.get(name, [self.head]) for p in layer.parameters()]


def run(ops, name, residual, x, upstream, *, frozen=False, again=False, plain=False):
    """The result and the gradients of x and, unless frozen, of the parameters."""
    parameters = ops.trained(name)
    for p in parameters:
        p.requires_grad_(requires_grad=not frozen)
    if again:
        y = checkpoint(ops.call, name, residual, x, plain, use_reentrant=False)
    else:
        y = ops.call(name, residual, x, plain)
    given = upstream[: y.numel()].view_as(y).to(y.dtype)
    of = [x, *([] if frozen else parameters)]
    return y, torch.autograd.grad(y, of, given), of


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_parameters", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_input", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [
    "norm", "qkv", "linear", "add_linear", "add_mlp", "add_mlp_recomputed", "head_sum",
    "head_mean", "head_none",
])  # fmt: skip
def test_operation(name, of_input, of_parameters, autocast, device, monkeypatch):
    if autocast is None and of_input != of_parameters:
        pytest.skip("without autocast PyTorch's own layers take one dtype only")
    if autocast is not None and of_parameters not in {torch.float32, autocast}:
        pytest.skip("FSDP's policy and autocast have the same dtype")
    if of_input is torch.bfloat16 and autocast is torch.float16:
        pytest.skip("the residual stream is float32 then")
    torch.manual_seed(0)
    width = 1280 if device == "cuda" else 64  # wide enough for the LayerNorm's kernel
    ops = Operations(width).to(device).to(of_parameters)
    residual, x = (torch.randn(ROWS, width, device=device).to(of_input) for _ in range(2))
    if autocast is torch.bfloat16:
        residual = residual.bfloat16()  # as `to_residual_stream` makes it
    x.requires_grad_()
    upstream = torch.randn(4 * ROWS * width, device=device)
    exact = copy.deepcopy(ops).double()
    in_double = residual.double(), x.detach().double().requires_grad_()
    right, right_grads, _ = run(exact, name, *in_double, upstream, plain=True)
    if device == "cpu" and autocast is torch.bfloat16:  # the autograd functions run there too
        monkeypatch.setattr(linear, "_by_cublaslt", lambda *_: True)
        monkeypatch.setattr(layer_norm, "_wide_in_bf16", lambda x: x.dtype is torch.bfloat16)
    limit = max(ROUNDING[autocast or of_input], ROUNDING[of_parameters])
    for frozen in (False, True):
        for again in (False, True):
            with torch.autocast(device, autocast) if autocast else nullcontext():
                y, grads, of = run(ops, name, residual, x, upstream, frozen=frozen, again=again)
            assert error(y, right) < limit
            for grad, t, expected in zip(grads, of, right_grads, strict=False):
                assert grad.dtype == t.dtype
                if name == "qkv" and t is ops.attn.bias:  # keys' biases get none: softmax
                    keep = torch.arange(3 * width, device=device) // width != 1
                    grad, expected = grad[keep], expected[keep]  # noqa: PLW2901
                assert error(grad, expected) < limit
