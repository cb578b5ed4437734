"""The pass whose kernels begin early: against the plain pass, and its machine code."""

import re

import pytest
import torch

from gpt2.config.model import SIZES, GPT2Config
from gpt2.generate import few_token_pass
from gpt2.generate.sampling import Sampling
from gpt2.generate.stream import decoder_for, generate
from gpt2.model.gpt import GPT

from .triton_without_gpu import machine_code, needs_triton, run_in_interpreter


def some_model(std: float = 0.3, **shape: int) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPT2Config(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn_like(p))
    return model


def after_one_token(model: GPT, length: int, **given):
    """(logits, keys, values) by the plain pass and by the kernels, which also choose a token."""
    from gpt2.kernels.triton_one_sequence import OneSequence

    weight, capacity = model.transformer.wte.weight, model.config.block_size
    caches = [model.new_cache(1, weight.dtype, capacity) for _ in range(2)]
    torch.manual_seed(length)
    for name in ("keys", "values"):
        past = torch.randn_like(getattr(caches[0], name))
        for cache in caches:
            getattr(cache, name).copy_(past)
    for cache in caches:
        cache.length, cache.lengths = length, torch.tensor([length], device=weight.device)
    token = torch.tensor([7], device=weight.device)
    wanted = few_token_pass.next_logits(model, token[:, None], caches[0])
    found = OneSequence(model, caches[1], **given).next_logits(token, choose=True)
    assert token.item() == found.argmax().item()
    assert caches[1].lengths.item() == caches[1].length == length + 1
    return [(t, cache.keys, cache.values) for t, cache in zip((wanted, found), caches, strict=True)]


@torch.inference_mode()
def compare_in_float32(device: str = "cpu", early: int = 0) -> None:
    """Widths that fill a block and that do not; shares that are empty, full, and of two spans."""
    from gpt2.kernels import triton_one_sequence as kernels

    tiles = kernels.Tiles(qkv=(4, 4), fc=(16, 8), head=(16, 4), head_programs=3)
    for heads, width, vocabulary in ((2, 40, 60), (3, 48, 130)):
        shape = {"n_layer": 2, "n_head": heads, "n_embd": width, "block_size": 64}
        model = some_model(**shape, vocab_size=vocabulary).to(device)
        for length, shares in ((0, 4), (1, 2), (40, 1), (63, 4)):
            given = {"early": early, "tiles": tiles._replace(shares=shares)}
            for wanted, found in zip(*after_one_token(model, length, **given), strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@needs_triton
def test_the_pass_equals_the_plain_one_in_the_interpreter():
    code = "from tests.kernels.test_triton_one_sequence import *\n"
    code += "from gpt2.kernels import triton_one_sequence as kernels\n"
    code += "kernels.SPAN = 16\ncompare_in_float32()"
    run_in_interpreter(code)


@needs_triton
@pytest.mark.parametrize("name", ["_linear", "_attend", "_project"])
def test_kernels_signal_and_load_their_weights_before_they_wait(name):
    """A compiler that moved the loads behind the wait would cost the speed, and no result."""
    from gpt2.kernels import triton_one_sequence as kernels

    width, half, full = 768, "*bf16", "*fp32"
    tile = {"width": width, "block": 1024, "early": 3}
    types, constants, loads = {
        "_linear": (
            {"x": full, "gain": half, "shift": half, "weight": half, "bias": half, "out": full}
            | {"eps": "fp32", "outputs": "i32"},
            tile | {"normed": True, "gelu": True, "added": False, "tile": 2},
            8,
        ),
        "_attend": (
            {"qkv": full, "keys": half, "values": half, "lengths": "*i64", "mixed": full}
            | {"sums": full, "capacity": "i32", "scale": "fp32"},
            {"heads": 12, "D": 64, "lanes": 64, "shares": 4, "span": 128, "early": 3},
            16,
        ),
        "_project": (
            {"mixed": full, "sums": full, "weight": half, "bias": half, "x": full},
            tile | {"heads": 12, "shares": 4, "tile": 16},
            8,
        ),
    }[name]
    warps = {"_linear": 1, "_attend": 4, "_project": 8}[name]
    kernel = getattr(kernels, name)
    code = machine_code(kernel, types, constants, warps, launch_pdl=True)
    order = re.findall(r"\b(PREEXIT|ACQBULK|LDG|STG|LDL|STL)\b", code)
    before = order[: order.index("ACQBULK")]
    assert "PREEXIT" in before
    assert before.count("LDG") >= loads
    assert "STG" not in before  # nothing is written before the wait
    assert not {"LDL", "STL"} & set(order)  # no registers in memory


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.inference_mode()
def test_the_pass_equals_the_plain_one_at_the_size_of_gpt2(dtype, error):
    if not hopper():
        pytest.skip("needs compute capability 9.0")
    model = some_model(0.02, **SIZES["gpt2"]).to("cuda", dtype)
    for length in (0, 3, 500, 1023):
        for wanted, found in zip(*after_one_token(model, length), strict=True):
            assert (found - wanted).float().norm() < error * wanted.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 60, 127, 140])
def test_the_kernel_chooses_what_argmax_chooses(length):
    """Greedy text by CUDA graphs, over a context that fills and is read again."""
    if not hopper():
        pytest.skip("needs compute capability 9.0")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 128, "vocab_size": 300}
    model = some_model(0.1, **shape).to("cuda", torch.bfloat16)
    prompt = [torch.randint(300, (length,)).tolist()]
    decoder = decoder_for(model, prompt, 150, Sampling(temperature=0.0))
    assert decoder.forward.early is not None
    text = generate(model, prompt, 150, decoder=decoder)
    assert generate(model, prompt, 150, decoder=decoder) == text
    decoder.greedy = False
    with torch.inference_mode():
        decoder.graph = decoder.forward.record(decoder._recorded_step)
    assert generate(model, prompt, 150, decoder=decoder) == text
