"""Triton's kernels of the head: in Triton's interpreter, and their machine code."""

import re

import pytest
import torch

from gpt2.config.model import IGNORE
from gpt2.kernels.logits_loss import Later, loss_and_gradient_fp8, second_targets
from gpt2.kernels.precision import GRADIENT_SCALE

from .triton_without_gpu import machine_code, needs_triton, run_in_interpreter


def compare_gradients(device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Rows without a target, ids without a logit, with and without all that changes a gradient."""
    from gpt2.kernels.triton_training import cross_entropy_fp8

    torch.manual_seed(0)
    rows, padded = 128, 256
    for cap, raises, two in ((0.0, False, False), (0.0, True, True), (5.0, False, True)):
        vocab = padded if raises else 200
        logits = 3 * torch.randn(rows, padded).to(dtype)
        targets = torch.randint(vocab, (rows,))
        targets[::7] = IGNORE
        raised = torch.randn(vocab) if raises else None
        later = Later(second_targets(targets, 16), torch.tensor(0.5)) if two else None
        wanted = loss_and_gradient_fp8(logits.clone(), targets, vocab, cap, raised, later)
        tensors = (logits, targets, raised, *(later or (None, None)))
        logits, targets, raised, *after = [t if t is None else t.to(device) for t in tensors]
        loss, *found = cross_entropy_fp8(logits, targets, vocab, cap, raised, *after)
        torch.testing.assert_close(loss.cpu(), wanted[0], rtol=1e-4, atol=0)
        one, plain = 2.0**GRADIENT_SCALE, wanted[1].float()
        # e5m2 has steps of a quarter at most; tanh of bf16 logits is 2^-11 off
        error = 1e-3 if cap and dtype == torch.bfloat16 else 1e-5
        for gradient in (found[0].float().cpu(), found[1].float().cpu().t()):
            near = (gradient - plain).abs() <= 0.26 * plain.abs() + error * one
            # findings/triton_interpreter_halves_numbers_in_fp8.sh
            assert (near | (device == "cpu") & (2 * gradient == plain)).all()


@needs_triton
def test_the_gradient_in_fp8_equals_the_plain_one_in_the_interpreter():
    code = "from tests.kernels.test_triton_training import *\ncompare_gradients()"
    run_in_interpreter(code)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_in_fp8_equals_the_plain_one(dtype):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    compare_gradients("cuda", dtype)


@needs_triton
@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_the_gradient_in_fp8_is_computed_once(cap):
    """Triton may compute it once for each layout of its result: twice the time, and no error."""
    from gpt2.kernels import triton_training as kernels

    pointers = {"logits": "*bf16", "targets": "*i64", "log_sums": "*fp32", "raised": "*fp32"}
    pointers |= {"later": "*i64", "shares": "*fp32", "rows": "i32"}
    pointers |= {"gradient": "*fp8e5", "transposed": "*fp8e5"}
    switches = {"cap": cap, "fast": True, "nvidia": True, "raises": bool(cap), "two": bool(cap)}
    sizes = {"vocab": 16768, "padded": 16768, "scale": GRADIENT_SCALE}
    sizes |= {"tall": kernels.TALL, "wide": kernels.WIDE}
    code = machine_code(kernels._gradient_fp8, pointers, switches | sizes, kernels.TILE_WARPS)
    numbers = kernels.TALL * kernels.WIDE // (32 * kernels.TILE_WARPS)  # of a thread
    assert len(re.findall(r"\bMUFU.EX2\b", code)) == numbers
    assert not re.findall(r"\b(LDL|STL)\b", code)  # no registers in memory
