"""The MLP of a block by nvmath-python, a contender of `benchmarks.libraries`."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gpt2.kernels.cublaslt import WORKSPACE_BYTES


class NvmathMatmuls:
    """Matmuls of nvmath-python, each planned at its first use, with as much workspace as ours.

    Args:
        nvmath: the library.
        advanced: its module `nvmath.linalg.advanced`.
        limit: algorithms that a plan proposes.
        autotuned: whether the fastest of them is found by trying them.
    """

    def __init__(self, nvmath: ModuleType, advanced: ModuleType, limit: int, autotuned: bool):
        self.nvmath, self.advanced = nvmath, advanced
        self.limit, self.autotuned, self.planned = limit, autotuned, {}

    def __call__(
        self, name: str, a: Tensor, b: Tensor, c: Tensor | None = None, epilog: str = "", **inputs
    ) -> Any:
        """a b + c and the epilog of that name; with outputs of the epilog (result, outputs).

        Epilogs are for results whose columns are contiguous, so that everything is transposed.
        """
        matmul = self.planned.get(name)
        if matmul is None:
            options: dict[str, Any] = {"memory_limit": WORKSPACE_BYTES}
            if name.startswith("weight gradient"):
                options["result_type"] = self.nvmath.CudaDataType.CUDA_R_32F
            beta = None if c is None else 1.0
            matmul = self.advanced.Matmul(a, b, c, beta=beta, options=options)
            kind = getattr(self.advanced.MatmulEpilog, epilog) if epilog else None
            preferences = {"limit": self.limit}
            matmul.plan(preferences=preferences, epilog=kind, epilog_inputs=inputs or None)
            if self.autotuned:
                matmul.autotune(iterations=5)
            self.planned[name] = matmul
        else:
            matmul.reset_operands_unchecked(a=a, b=b, c=c, epilog_inputs=inputs or None)
        return matmul.execute()


class NvmathMLP(torch.autograd.Function):
    """GELU, its derivative, biases, the gradient of one and the residual, all in epilogs."""

    @staticmethod
    def forward(ctx, matmul: NvmathMatmuls, *inputs: Tensor) -> Tensor:
        """Residual, x, fc's weight and bias, proj's weight and bias -> (tokens, C)."""
        residual, x, w1, b1, w2, b2 = (t.detach().bfloat16() for t in inputs)
        after, aux = matmul("fc", w1, x.t(), epilog="GELU_AUX_BIAS", bias=b1)
        ctx.save_for_backward(x, w1, w2, aux["gelu_aux"], after)
        ctx.matmul = matmul
        return matmul("proj", w2, after, residual.t(), epilog="BIAS", bias=b2).t()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs; those of the weights in float32."""
        (x, w1, w2, before, after), matmul = ctx.saved_tensors, ctx.matmul
        dh, aux = matmul("gelu gradient", w2.t(), dy.t(), epilog="DGELU_BGRAD", gelu_aux=before)
        dx = matmul("input gradient", w1.t(), dh).t()
        dw1 = matmul("weight gradient of fc", x.t(), dh.t()).t()
        dw2 = matmul("weight gradient of proj", after, dy).t()
        db2 = dy.sum(0, dtype=torch.float32)
        return None, dy, dx, dw1, aux["dgelu_bgrad"].float(), dw2, db2
