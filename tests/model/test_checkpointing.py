"""What backward recomputes: its memory, its bits, its calls, and networks that refuse a kind."""

import pytest
import torch

from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.config.registry import forget, register
from gpt2.errors import UserError
from gpt2.kernels import linear
from gpt2.model.checkpointing import checkpoint_activations
from gpt2.model.gpt import GPT
from gpt2.model.modern import Modern

SHAPE = {"n_layer": 4, "n_head": 2, "n_embd": 64, "block_size": 64, "vocab_size": 100}
CHANNEL = 16 * 64 * 64 * 2  # bytes of C channels of all tokens: 16 sequences of 64, in bf16


def kept_and_gradients(model: GPT, kind: str) -> tuple[float, list[torch.Tensor]]:
    """Numbers kept for backward per block and token, in units of C; and all gradients."""
    checkpoint_activations(model, kind)
    torch.manual_seed(1)
    idx, sizes = torch.randint(0, 100, (16, 64)), {}

    def keep(tensor):  # storages, each once
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(idx)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = sum(size for at, size in sizes.items() if at not in weights)
    hidden.float().square().sum().backward()
    gradients = [p.grad for p in model.transformer.h.parameters()]
    model.zero_grad(set_to_none=True)
    return kept / CHANNEL / 4, gradients


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mlps_computed_twice_keep_half_and_change_no_bit(compiled, fused, monkeypatch):
    """`fused`: the autograd functions of a GPU, on plain matmuls."""
    monkeypatch.setattr(linear, "_by_cublaslt", lambda *_: fused)
    torch.manual_seed(0)
    model = GPT(GPT2Config(**SHAPE))
    if compiled:
        torch._dynamo.reset()
        model.hidden = torch.compile(model.hidden)
    whole, exact = kept_and_gradients(model, "False")
    if compiled:
        torch._dynamo.reset()
        model.hidden = torch.compile(GPT.hidden.__get__(model))
    half, found = kept_and_gradients(model, "mlp")
    assert 6 < whole - half < 9, (
        whole,
        half,
    )  # the MLP's inner layer is 8 C, before GELU and after
    for ours, right in zip(found, exact, strict=True):
        assert torch.allclose(ours, right, rtol=1e-2, atol=1e-6) if compiled else ours.equal(right)


def test_only_the_first_matrix_is_multiplied_twice():
    torch.manual_seed(0)
    model, calls = GPT(GPT2Config(**SHAPE)), []
    for block in model.transformer.h:
        block.mlp.c_fc.register_forward_hook(lambda *_: calls.append("fc"))
        block.attn.c_attn.register_forward_hook(lambda *_: calls.append("attn"))
        block.mlp.c_proj.register_forward_hook(lambda *_: calls.append("proj"))
    kept_and_gradients(model, "mlp")
    assert {name: calls.count(name) for name in calls} == {"fc": 8, "attn": 4, "proj": 4}


@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
def test_another_mlp_is_refused_by_name(mlp):
    model = Modern(ModernConfig(**SHAPE, mlp=mlp))
    with pytest.raises(UserError, match=f"mlp=gelu, and this network has mlp={mlp}; use --activ"):
        checkpoint_activations(model, "mlp")
    checkpoint_activations(model, "True")
    assert model.checkpoint_activations


def test_a_modern_network_with_gelu_recomputes_it():
    torch.manual_seed(0)
    model, calls = Modern(ModernConfig(**SHAPE, norm="rmsnorm")), []
    for block in model.transformer.h:
        block.mlp.c_fc.register_forward_hook(lambda *_: calls.append("fc"))
    _, exact = kept_and_gradients(model, "False")
    _, found = kept_and_gradients(model, "mlp")
    assert len(calls) == 4 + 8
    assert all(a.equal(b) for a, b in zip(found, exact, strict=True))


def dropped(x):
    """An activation of a plugin that draws, beside `dropout` of the network, which is 0."""
    return torch.nn.functional.dropout(torch.relu(x), 0.5)


def test_a_part_of_a_plugin_that_draws_gets_its_draws_again():
    register("mlp", "dropped")(dropped)
    torch.manual_seed(0)
    model = Modern(ModernConfig(**SHAPE, mlp="dropped"))
    (whole, exact), (few, found) = (kept_and_gradients(model, kind) for kind in ("False", "True"))
    forget()
    assert few < whole / 2
    assert all(ours.equal(right) for ours, right in zip(found, exact, strict=True))
