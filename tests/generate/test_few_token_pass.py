"""The pass of few kernels against the network, and its kernels against their plain forms."""

from unittest import mock

import pytest
import torch
from torch import nn

from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.generate import few_token_pass
from gpt2.generate.few_token_pass import small_linear
from gpt2.kernels.attention import cached_attention
from gpt2.model.gpt import GPT
from gpt2.model.lora import LoRALinear
from gpt2.train.setup import network

from ..kernels.triton_without_gpu import needs_triton, run_in_interpreter

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 40, "block_size": 32, "vocab_size": 300}


def some_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPT2Config(**SHAPE)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


@torch.inference_mode()
def logits_of_six_tokens(model: GPT, device: str):
    """Rows that have 3 and 5 tokens behind them; each pass's logits and the network's own."""
    model = model.to(device)
    rows = torch.randint(300, (2, 12), device=device)
    cache = model.new_cache(2, model.transformer.wte.weight.dtype, 32)
    cache.lengths = torch.tensor([3, 5], device=device)
    cache.rows = torch.arange(2, device=device)
    model.hidden(rows[:, :5], cache)
    cache.rows, cache.length = None, 5
    found = []
    for step in range(6):
        tokens = rows[[0, 1], [3 + step, 5 + step]]
        found.append(few_token_pass.next_logits(model, tokens[:, None], cache))
    assert cache.lengths.tolist() == [9, 11]
    whole = model(rows)
    wanted = [whole[[0, 1], [3 + step, 5 + step]] for step in range(6)]
    return torch.stack(found), torch.stack(wanted)


def test_the_pass_equals_the_network():
    found, wanted = logits_of_six_tokens(some_model(), "cpu")
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_pass_equals_the_network_on_a_gpu(dtype, error):
    found, wanted = logits_of_six_tokens(some_model().to(dtype), "cuda")
    assert (found - wanted).float().norm() < error * wanted.float().norm()


def test_it_is_for_the_network_of_gpt2_alone():
    model = some_model()
    assert few_token_pass.supports(model)
    assert not few_token_pass.supports(network(ModernConfig(**SHAPE, qk_norm=True)))
    mlp = model.transformer.h[1].mlp
    mlp.c_fc = LoRALinear(mlp.c_fc, 2, 1.0)
    assert not few_token_pass.supports(model)


def compare_kernels(device: str):
    """Widths that fill a block and that do not; with all that can be around a product."""
    from gpt2.kernels import triton_decoding

    torch.manual_seed(0)
    for rows, width, outputs in ((1, 64, 20), (3, 40, 7), (2, 1300, 33)):
        x, residual = torch.randn(rows, width, device=device), torch.randn(rows, outputs).to(device)
        layer = nn.Linear(width, outputs, device=device)
        norm = nn.LayerNorm(width, device=device)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        for case in (
            (None, None, False, None),
            (layer.bias, norm, False, None),
            (layer.bias, norm, True, None),
            (layer.bias, None, False, residual),
        ):
            bias, normed, gelu, added = case
            wanted = small_linear(x.cpu(), *_on_cpu(layer.weight, bias), norm=_copy(normed),
                                  gelu=gelu, residual=_on_cpu(added)[0])  # fmt: skip
            found = triton_decoding.small_linear_(x, layer.weight, bias, normed, gelu, added)
            torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-5)
    lengths = torch.tensor([0, 5, 127])
    # in two shares, in three of which the last is short, in two longer ones, and in one
    few = mock.patch.object(triton_decoding, "SHARES", {3: 64, 6: 128})
    for width, heads, capacity in ((16, 1, 128), (20, 1, 160), (16, 2, 160), (64, 3, 160)):
        q, k, v = torch.randn(3, 3, 1, heads, width).transpose(2, 3)
        caches = torch.randn(2, 3, heads, capacity, width)
        copies = caches.clone().to(device)
        wanted = cached_attention(q, k, v, *caches, lengths, capacity)
        with few:
            found = triton_decoding.cached_attention_(
                *(t.to(device) for t in (q, k, v)), *copies, lengths.to(device)
            )
        torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(copies.cpu(), caches)


def _on_cpu(*tensors):
    return [t if t is None else t.detach().cpu() for t in tensors]


def _copy(norm):
    if norm is None:
        return None
    copy = nn.LayerNorm(norm.weight.shape)
    copy.load_state_dict(norm.state_dict())
    return copy


@pytest.mark.gpu
def test_kernels_equal_their_plain_forms():
    with torch.no_grad():
        compare_kernels("cuda")


def count_in_the_interpreter() -> None:
    """`range` up to a loaded number; before Triton 3.9, NumPy 2.4 refuses its array of one."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


@needs_triton
def test_kernels_equal_their_plain_forms_in_the_interpreter():
    code = "import torch; from tests.generate.test_few_token_pass import *\n"
    code += "count_in_the_interpreter()\nwith torch.no_grad(): compare_kernels('cpu')"
    run_in_interpreter(code)
