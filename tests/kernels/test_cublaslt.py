"""The C calls, with a library in their place that takes the arguments of the prototypes."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from gpt2.kernels import cublaslt


@pytest.fixture
def calls(monkeypatch):
    """Every call by name, with plain numbers for its arguments; returned pointers are 7."""
    seen = []

    def function(name):
        types = cublaslt.ARGUMENT_TYPES[name]

        def call(*given):
            seen.append((name, given))
            if "Create" in name:
                ctypes.c_void_p.from_address(given[0]).value = 7
            if name == "cublasLtMatmulAlgoGetHeuristic":
                ctypes.c_int.from_address(given[-1]).value = 1
            return 0

        return ctypes.CFUNCTYPE(ctypes.c_int, *types)(call)

    library = SimpleNamespace(**{name: function(name) for name in cublaslt.ARGUMENT_TYPES})
    monkeypatch.setattr(cublaslt, "library", lambda: (library, ctypes.c_void_p(7)))
    monkeypatch.setattr(cublaslt, "_plans", {})
    monkeypatch.setattr(cublaslt._Plan, "choose", lambda *_: None)
    stream = SimpleNamespace(cuda_stream=0x7FFF12345678)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    return seen


def test_every_call_fits_its_prototype_and_has_the_operands_in_column_major_order(calls):
    a, b = torch.zeros(128, 64).bfloat16(), torch.zeros(64, 192).bfloat16()
    out, add, bias = (*torch.zeros(2, 128, 192).bfloat16().unbind(), torch.zeros(192).bfloat16())
    cublaslt.matmul(a, b, out, epilogue=cublaslt.BIAS, bias=bias, add=add)
    name, given = calls[-1]
    assert name == "cublasLtMatmul"
    assert given[3] == b.data_ptr()
    assert given[5] == a.data_ptr()
    assert (given[8], given[10]) == (add.data_ptr(), out.data_ptr())
    assert given[14] == cublaslt.WORKSPACE_BYTES
    assert given[15] == 0x7FFF12345678  # not cut to 32 bits
    layouts = [given[2:] for name, given in calls if name == "cublasLtMatrixLayoutCreate"]
    assert layouts == [(192, 64, 192), (64, 128, 64), (192, 128, 192)]


def test_a_shape_is_planned_once_and_another_epilogue_again(calls):
    a, out = torch.zeros(64, 64).bfloat16(), torch.zeros(64, 64).bfloat16()
    for epilogue in (cublaslt.DEFAULT, cublaslt.DEFAULT, cublaslt.GELU_AUX):
        aux = torch.zeros_like(out) if epilogue == cublaslt.GELU_AUX else None
        cublaslt.matmul(a, a, out, epilogue=epilogue, aux=aux)
    names = [name for name, _ in calls]
    assert names.count("cublasLtMatmul") == 3
    assert names.count("cublasLtMatmulDescCreate") == 2
    assert set(names) == set(cublaslt.ARGUMENT_TYPES) - {"cublasLtCreate"}
