"""What of Triton's kernels can be tested without a GPU: the interpreter, and the machine code."""

import importlib.util
import os
import subprocess
import sys

import pytest

from ..conftest import ROOT

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


def run_in_interpreter(code: str) -> None:
    """Runs Python in a process in which Triton interprets kernels; it must succeed."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def machine_code(kernel, types: dict[str, str], constants: dict, warps: int, **options) -> str:
    """What a kernel becomes for compute capability 9.0; compiling needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): aligned for i, n in enumerate(names) if types.get(n, "").startswith("*")},
    )
    options |= {"num_warps": warps}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["sass"]
