"""The symmetric product against the plain one."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from ..conftest import ROOT


def compare(device: str) -> None:
    """Rows and columns that fill blocks and that do not; the interpreter's `dot` lacks bf16."""
    from gpt2.kernels.triton_symmetric import symmetric_product

    torch.manual_seed(0)
    for rows, columns in ((16, 32), (40, 72), (100, 16)):
        x = torch.randn(3, rows, columns, device=device)
        x = x.bfloat16() if device == "cuda" else x
        found = symmetric_product(x, 16, 16, 4, 2)
        torch.testing.assert_close(found, found.mT)
        torch.testing.assert_close(found.float(), x.float() @ x.float().mT, atol=0.1, rtol=1e-2)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_it_equals_the_plain_product_in_the_interpreter():
    code = "from tests.kernels.test_triton_symmetric import compare; compare('cpu')"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.gpu
def test_it_equals_the_plain_product_on_a_gpu():
    compare("cuda")
