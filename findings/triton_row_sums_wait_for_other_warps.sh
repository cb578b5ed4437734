#!/usr/bin/env bash
# triton 3.9.0 (3.6.0 too): eight warps that sum eight rows of 1,024 bfloat16 numbers do not take a row each.
# Warps are laid along the contiguous axis first, until it is covered: four warps share a row, two rows at
# a time. So the product of a matrix and a vector, a line of Triton, waits at five barriers, and its
# numbers go through 4 KB of shared memory. In parts of 256 columns, 16 bytes a lane of one warp, the same
# sums give each warp its own rows: one barrier, which stores the result, and 5 shuffles instead of 28.
#
# Seen on Python 3.11, compiled for compute capability 9.0, no GPU needed:
#   at_once:  warps of a program (2, 4) over (rows, columns), 5 barriers, 28 shuffles, 4096 bytes shared
#   in_parts: warps of a program (8, 1) over (rows, columns), 1 barriers, 5 shuffles, 32 bytes shared
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet triton==3.9.0
cat > try.py <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def at_once(weight, x, out):
    n, k = tl.arange(0, 8), tl.arange(0, 1024)
    w = tl.load(weight + n[:, None] * 1024 + k[None, :]).to(tl.float32)
    tl.store(out + n, tl.sum(w * tl.load(x + k)[None, :], 1))


@triton.jit
def in_parts(weight, x, out):
    n, total = tl.arange(0, 8), tl.zeros([8, 256], tl.float32)
    for i in tl.static_range(4):
        k = i * 256 + tl.arange(0, 256)[None, :]
        w = tl.load(weight + n[:, None] * 1024 + k).to(tl.float32)
        total += w * tl.load(x + tl.zeros([8, 1], tl.int32) + k)
    tl.store(out + n, tl.sum(total, 1))


for kernel in at_once, in_parts:
    types = {"weight": "*bf16", "x": "*fp32", "out": "*fp32"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(kernel, types, {}, aligned)
    made = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 8})
    ptx, layouts = made.asm["ptx"], made.asm["ttgir"]
    warps = re.search(r"sizePerThread = \[1, 8\].*?warpsPerCTA = \[(\d, \d)\]", layouts)[1]
    print(
        f"{kernel.__name__}: warps of a program ({warps}) over (rows, columns), "
        f"{ptx.count('bar.sync')} barriers, {ptx.count('shfl.sync')} shuffles, "
        f"{made.metadata.shared} bytes shared"
    )
PY
TRITON_CACHE_DIR=$work/cache venv/bin/python -W ignore try.py | tee seen.txt
diff - seen.txt <<'TXT'
at_once: warps of a program (2, 4) over (rows, columns), 5 barriers, 28 shuffles, 4096 bytes shared
in_parts: warps of a program (8, 1) over (rows, columns), 1 barriers, 5 shuffles, 32 bytes shared
TXT
