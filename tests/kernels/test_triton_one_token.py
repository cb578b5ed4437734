"""The persistent kernel of one token against the pass of few kernels."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from gpt2.config.model import GPT2Config
from gpt2.generate import few_token_pass
from gpt2.model.gpt import GPT

from ..conftest import ROOT


@torch.inference_mode()
def compare(device: str, programs: int | None, dtype: torch.dtype, error: float, **shape: int):
    """Six tokens after five, beside the pass of few kernels on a CPU in float32."""
    from gpt2.kernels.triton_one_token import OneToken

    torch.manual_seed(0)
    model = GPT(GPT2Config(**shape)).eval()
    for name, p in model.named_parameters():
        p.normal_(1.0 if "ln" in name and "weight" in name else 0.0, 0.2 if p.ndim < 2 else 0.1)
    kernel_model = GPT(GPT2Config(**shape)).eval().to(device, dtype)
    kernel_model.load_state_dict(model.to(dtype).state_dict())
    model = model.float()
    caches = []
    tokens = torch.randint(shape["vocab_size"], (11,))
    for network, where in ((model, "cpu"), (kernel_model, device)):
        weight = network.transformer.wte.weight
        cache = network.new_cache(1, weight.dtype, shape["block_size"])
        cache.lengths, cache.rows = torch.tensor([5], device=where), torch.tensor([0]).to(where)
        network.hidden(tokens[None, :5].to(where), cache)
        cache.rows, cache.length = None, 5
        caches.append(cache)
    one = OneToken(kernel_model, programs, phases_apart=device == "cpu")
    for token in tokens[5:]:
        wanted = few_token_pass.next_logits(model, token.view(1, 1), caches[0])
        cache = caches[1]
        hidden = one(token.view(1).to(device), cache.keys, cache.values, cache.lengths).cpu()
        cache.advance(1)
        found = model.logits(model.transformer.ln_f(hidden))
        assert (found - wanted).norm() < error * wanted.norm()
    assert caches[1].lengths.tolist() == [11]
    kept = torch.stack([caches[1].keys.cpu().float(), caches[1].values.cpu().float()])
    torch.testing.assert_close(
        kept, torch.stack([caches[0].keys, caches[0].values]), atol=10 * error, rtol=10 * error
    )


SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 40, "block_size": 32, "vocab_size": 300}


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_it_equals_the_pass_of_few_kernels_in_the_interpreter():
    code = "import torch; from tests.kernels.test_triton_one_token import SMALL, compare\n"
    code += "compare('cpu', 3, torch.float32, 1e-5, **SMALL)"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("programs", [3, None])
def test_it_equals_the_pass_of_few_kernels_on_a_gpu(programs, dtype):
    compare("cuda", programs, dtype, 1e-4 if dtype is torch.float32 else 3e-2, **SMALL)
