"""Which tensors cuDNN's attention takes; its numbers: `test_window_attention.py` and others."""

import pytest
import torch

from gpt2.kernels.cudnn_attention import fits, frontend
from gpt2.kernels.cudnn_choice import takes


def test_a_cpu_takes_none():
    assert not takes(torch.device("cpu"), 64, True)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "in_bf16"), [(136, True), (60, True), (64, False)])
def test_narrow_even_heads_in_bf16_alone(width, in_bf16):
    cuda = torch.device("cuda")
    assert not fits(cuda, width, in_bf16)
    assert takes(cuda, 64, True) == (fits(cuda, 64, True) and frontend() is not None)
