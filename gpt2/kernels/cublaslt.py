"""Matmuls by cuBLASLt, called by ctypes from the library that PyTorch installs.

Two things are won over `torch.mm`: epilogues, which apply GELU or its derivative inside the matmul,
and the fastest of the algorithms that the library proposes, which is measured for each shape. The
C interface is cublasLt.h (NVIDIA, "cuBLAS library", chapter "Using the cuBLASLt API").
nvmath-python has the same epilogues, but these thin calls add no dependency and can be captured in
a CUDA graph: once an algorithm is chosen, a call allocates nothing and waits for nothing.

The library is column-major: a row-major (M, N) tensor is a column-major N × M matrix to it. So
out = a b is computed as outᵀ = bᵀ aᵀ, and no tensor is transposed in memory.
"""

import ctypes
import functools
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

import torch
from torch import Tensor

TYPES = {torch.bfloat16: 14, torch.float32: 0}  # cudaDataType
COMPUTE_F32 = 68  # cublasComputeType_t: bf16 matmuls accumulate in float32
TRANS_A, TRANS_B, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD = 3, 4, 7, 8, 11, 12  # attributes
DEFAULT, BIAS, GELU_AUX, GELU_AUX_BIAS, DGELU = 1, 4, 160, 164, 192  # epilogues
WORKSPACE_BYTES = 32 << 20
CANDIDATES, FINALISTS = 64, 8  # algorithms timed once per shape; the fastest, timed again
REPEATS = 8  # timed runs of each finalist
MAX_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes_t: MAX_WORKSPACE_BYTES

# With these ctypes converts every argument, and refuses one of a wrong type or number.
# Each line is a prototype of cublasLt.h; all functions return cublasStatus_t, an int.
_POINTER = c_void_p
ARGUMENT_TYPES = {
    "cublasLtCreate": (_POINTER,),
    "cublasLtMatmulDescCreate": (_POINTER, c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (_POINTER, c_int, _POINTER, c_size_t),
    "cublasLtMatrixLayoutCreate": (_POINTER, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatmulPreferenceCreate": (_POINTER,),
    "cublasLtMatmulPreferenceSetAttribute": (_POINTER, c_int, _POINTER, c_size_t),
    "cublasLtMatmulPreferenceDestroy": (_POINTER,),
    "cublasLtMatmulAlgoGetHeuristic": (*[_POINTER] * 7, c_int, _POINTER, _POINTER),
    "cublasLtMatmul": (*[_POINTER] * 14, c_size_t, _POINTER),
}


class _Candidate(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@functools.cache
def library() -> tuple[ctypes.CDLL, c_void_p] | None:
    """The loaded library and its handle, or None if it is not installed or does not start."""
    try:
        lt = ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '').split('.')[0]}")
    except OSError:
        return None
    for name, types in ARGUMENT_TYPES.items():
        getattr(lt, name).argtypes = types
    handle = c_void_p()
    return (lt, handle) if lt.cublasLtCreate(byref(handle)) == 0 else None


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """Scratch memory of the algorithms, one tensor per device for the life of the process.

    All streams share it, although two matmuls at once would overwrite each other's scratch. That is
    safe because training runs its matmuls on one stream at a time: warm-up and capture of a CUDA
    graph use streams of their own, and synchronize with the main stream before and after.
    """
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    epilogue: int = DEFAULT,
    bias: Tensor | None = None,
    aux: Tensor | None = None,
    add: Tensor | None = None,
) -> None:
    """out = epilogue(a b + add), on the current stream.

    All tensors have contiguous rows. The first call with a shape times the algorithms and waits for
    the device.

    Args:
        a: (M, K), or (K, M) with `transpose_a`; bf16.
        b: (K, N), or (N, K) with `transpose_b`; bf16.
        out: (M, N), bf16 or float32.
        transpose_a: whether a is given transposed.
        transpose_b: whether b is given transposed.
        epilogue: `BIAS` adds the bias. `GELU_AUX` stores a b in aux and applies GELU (the tanh
            form); `GELU_AUX_BIAS` adds the bias first. `DGELU` multiplies by the derivative of GELU
            at aux.
        bias: (N,) bf16.
        aux: (M, N) bf16.
        add: (M, N), dtype and strides of out.
    """
    key = (
        *((t.shape, t.stride(0)) for t in (a, b, out)),
        (out.dtype, out.device),
        (transpose_a, transpose_b, epilogue, add is not None),
    )
    plan = _plans.get(key)
    if plan is None:
        plan = _Plan(a, b, out, transpose_a, transpose_b, epilogue)
        plan.choose(a, b, torch.empty_like(out), bias, aux, add)
        _plans[key] = plan
    plan.run(plan.best, a, b, out, bias, aux, add)


# Plans, and the C descriptors that they own, are kept for the life of the process: a captured CUDA
# graph replays their kernels, and a run has a few dozen shapes at most.
_plans: dict[tuple, "_Plan"] = {}


class _Plan:
    """A matmul of one shape: its C descriptors, and the algorithm that was fastest."""

    def __init__(self, a, b, out, transpose_a, transpose_b, epilogue):  # noqa: PLR0917
        self.lt, self.handle = library()
        self.description = c_void_p()
        self._check(self.lt.cublasLtMatmulDescCreate(byref(self.description), COMPUTE_F32, 0))
        self._set(TRANS_A, c_int32(transpose_b))
        self._set(TRANS_B, c_int32(transpose_a))
        self._set(EPILOGUE, c_uint32(epilogue))
        anywhere = c_void_p(out.data_ptr())  # the heuristic wants a pointer, and does not read it
        if epilogue in (BIAS, GELU_AUX_BIAS):
            self._set(BIAS_POINTER, anywhere)
        if epilogue in (GELU_AUX, GELU_AUX_BIAS, DGELU):
            self._set(AUX_POINTER, anywhere)
            self._set(AUX_LD, c_int64(out.stride(0)))
        self.layouts = [self._layout(t) for t in (b, a, out)]
        self.candidates = self._propose()
        self.best = self.candidates[0]

    def _check(self, status: int):
        assert status == 0, f"cuBLASLt: status {status}"

    def _set(self, attribute: int, value):
        size = c_size_t(ctypes.sizeof(value))
        setter = self.lt.cublasLtMatmulDescSetAttribute
        self._check(setter(self.description, c_int(attribute), byref(value), size))

    def _layout(self, t: Tensor) -> c_void_p:
        layout, (rows, columns) = c_void_p(), t.shape
        create = self.lt.cublasLtMatrixLayoutCreate
        sizes = c_uint64(columns), c_uint64(rows), c_int64(t.stride(0))
        self._check(create(byref(layout), c_int(TYPES[t.dtype]), *sizes))
        return layout

    def _propose(self) -> list[_Candidate]:
        preference, room = c_void_p(), c_size_t(WORKSPACE_BYTES)
        self._check(self.lt.cublasLtMatmulPreferenceCreate(byref(preference)))
        self._check(
            self.lt.cublasLtMatmulPreferenceSetAttribute(
                preference, c_int(MAX_WORKSPACE), byref(room), c_size_t(ctypes.sizeof(room))
            )
        )
        found, count = (_Candidate * CANDIDATES)(), c_int()
        b, a, out = self.layouts
        self._check(
            self.lt.cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                self.description,
                b,
                a,
                out,
                out,
                preference,
                c_int(CANDIDATES),
                found,
                byref(count),
            )
        )
        self.lt.cublasLtMatmulPreferenceDestroy(preference)
        return list(found)[: count.value]

    def choose(self, *tensors):
        """Times every candidate once and the finalists again; keeps the fastest."""

        def ranked(repeats: int) -> list[_Candidate]:
            return sorted(self.candidates, key=lambda c: self._milliseconds(c, repeats, *tensors))

        self.candidates = ranked(1)[:FINALISTS]
        self.best = ranked(REPEATS)[0]

    def _milliseconds(self, candidate, repeats: int, *tensors) -> float:
        """The time of the fastest run."""
        runs = []
        for _ in range(repeats + 1):  # the first one warms up
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.run(candidate, *tensors)
            end.record()
            runs.append((start, end))
        runs[-1][1].synchronize()
        return min(start.elapsed_time(end) for start, end in runs[1:])

    def run(self, candidate, a, b, out, bias, aux, add):  # noqa: PLR0917 - called with `tensors`
        """Launches the matmul on the current stream."""
        if bias is not None:
            self._set(BIAS_POINTER, c_void_p(bias.data_ptr()))
        if aux is not None:
            self._set(AUX_POINTER, c_void_p(aux.data_ptr()))
        one, beta = c_float(1), c_float(0 if add is None else 1)
        workspace = _workspace(out.device)
        at = [c_void_p(t.data_ptr()) for t in (b, a, out if add is None else add, out, workspace)]
        first, second, result = self.layouts
        self._check(
            self.lt.cublasLtMatmul(
                self.handle,
                self.description,
                byref(one),
                at[0],
                first,
                at[1],
                second,
                byref(beta),
                at[2],
                result,
                at[3],
                result,
                byref(candidate.algorithm),
                at[4],
                c_size_t(WORKSPACE_BYTES),
                c_void_p(torch.cuda.current_stream(out.device).cuda_stream),
            )
        )
