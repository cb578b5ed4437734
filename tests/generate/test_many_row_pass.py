"""The pass of many rows against the network, and its kernel against its plain form."""

import pytest
import torch
from torch import nn

from gpt2.generate.cached_forward import CachedForward
from gpt2.generate.many_row_pass import add_layer_norm, hidden

from ..kernels.triton_without_gpu import needs_triton, run_in_interpreter
from .test_few_token_pass import some_model

ROWS = 6


@torch.inference_mode()
def compare_with_network(device: str, dtype: torch.dtype, error: float) -> None:
    """Rows of different lengths, by the pass and by the network itself."""
    model = some_model().to(device, dtype)
    rows = torch.randint(300, (ROWS, 12), device=device)
    cache = model.new_cache(ROWS, dtype, 32)
    lengths = torch.arange(3, 3 + ROWS, device=device)
    cache.lengths, cache.rows = lengths.clone(), torch.arange(ROWS, device=device)
    model.hidden(rows[:, :8], cache)
    cache.rows, cache.length = None, 8
    for step in range(3):
        found = hidden(model, rows[range(ROWS), lengths + step], cache)
        wanted = model.hidden(rows)[range(ROWS), lengths + step]
        assert (found - wanted).float().norm() < error * wanted.float().norm()
        assert cache.lengths.tolist() == (lengths + step + 1).tolist()
    assert cache.length == 11


def test_the_pass_equals_the_network():
    compare_with_network("cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_pass_equals_the_network_on_a_gpu(dtype, error):
    compare_with_network("cuda", dtype, error)


def compare_add_layer_norm(device: str) -> None:
    """Widths that fill a block and that do not."""
    from gpt2.kernels.triton_decoding import add_layer_norm_

    torch.manual_seed(0)
    for width, dtype in ((64, torch.float32), (1300, torch.float32), (40, torch.bfloat16)):
        norm = nn.LayerNorm(width)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        x, y = torch.randn(2, 5, width).to(dtype)
        wanted = add_layer_norm(x, y, norm.to(dtype))
        found = add_layer_norm_(x.to(device), y.to(device), norm.to(device))
        error = 1e-5 if dtype == torch.float32 else 2e-2
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.cpu(), other, atol=error, rtol=error)


@pytest.mark.gpu
def test_the_kernel_equals_its_plain_form():
    with torch.no_grad():
        compare_add_layer_norm("cuda")


@needs_triton
def test_the_kernel_equals_its_plain_form_in_the_interpreter():
    code = "import torch; from tests.generate.test_many_row_pass import *\n"
    run_in_interpreter(code + "with torch.no_grad(): compare_add_layer_norm('cpu')")


@pytest.mark.gpu
@torch.inference_mode()
def test_hooks_of_a_norm_see_the_network_itself():
    model = some_model().cuda()
    forward = CachedForward(model, ROWS, 32, per_row_lengths=True)
    forward.copy_head()
    forward.prefill(range(ROWS), [[1, 2]] * ROWS)
    seen = []
    model.transformer.ln_f.register_forward_hook(lambda *given: seen.append(given))
    forward.next_logits(torch.zeros(ROWS, dtype=torch.int64, device="cuda"))
    assert len(seen) == 1
