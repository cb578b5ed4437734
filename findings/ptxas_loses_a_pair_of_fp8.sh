#!/usr/bin/env bash
# ptxas of CUDA 12.6 to 13.0.48 (triton 3.6.0 brings 12.8.93 and 12.9.86) loses numbers in fp8.
# A cvt to fp8 puts two numbers into 16 bits, and mov.b32 {lo, hi} puts two such pairs into 32 bits.
# ptxas joins the cvt of lo with the mov into one F2FP...MERGE_C, which stands where the mov stood.
# It drops the cvt, though an instruction between the two may need lo as well.
# That instruction then reads a register that nothing has written. Nothing warns.
# Uses of lo after the mov are right, and so is -O0. ptxas up to 12.5 and from 13.0.88 on is right.
# Concerned are e5m2, e4m3 and, on sm_100a, the pairs of fp6, and st.v2.b16 like the mov.
# Shifts or prmt in place of the mov avoid it. A cvt of a number from two sides of a branch escapes.
# Triton writes such code: a tile that is scaled, cast, and stored both as it is and transposed.
# Triton 3.4 to 3.8 bring such a ptxas for sm_90, 3.4 to 3.9 for sm_89, and 3.3 to 3.6 for sm_100.
#
# Seen on Python 3.11, no GPU needed. A is the first number in fp8, and R0? is a byte of R0, never written:
#   ptxas 12.8.93 -O3, lo stored before the mov: lo R0? R0?, both A B C D (12.9.86: the same)
#   ptxas 12.8.93 -O3, lo stored after the mov: lo A B, both A B C D
#   ptxas 12.8.93 -O0, lo stored before the mov: lo A B, both A B C D (13.0.88 -O3: the same)
#   transposed by Triton for sm_90: ptxas 12.8.93 loses 8 of 32 bytes, 13.0.88 loses 0 of 32 bytes
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet triton==3.6.0
venv/bin/pip install --quiet --no-deps nvidia-cuda-nvcc==13.0.88 nvidia-cuda-nvdisasm==13.5.37
cat > try.py <<'PY'
import itertools
import re
import subprocess
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

packages = Path(triton.__file__).parents[1]
PTXAS = {
    "12.8.93": packages / "triton/backends/nvidia/bin/ptxas",
    "12.9.86": packages / "triton/backends/nvidia/bin/ptxas-blackwell",
    "13.0.88": packages / "nvidia/cu13/bin/ptxas",
}
PTX = """.version 8.7
.target ARCH
.address_size 64
.visible .entry k(.param .u64 numbers, .param .u64 both, .param .u64 lo) {
    .reg .b16 %rs<3>; .reg .b32 %r<6>; .reg .b64 %rd<4>;
    ld.param.b64 %rd1, [numbers];
    ld.param.b64 %rd2, [both];
    ld.param.b64 %rd3, [lo];
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    cvt.rn.satfinite.KIND.f32 %rs1, %r2, %r1;
    cvt.rn.satfinite.KIND.f32 %rs2, %r4, %r3;
    USES
    ret;
}"""
LO = "st.global.b16 [%rd3], %rs1;"
BOTH = "mov.b32 %r5, {%rs1, %rs2}; st.global.b32 [%rd2], %r5;"
CASES = (
    ("12.8.93", "-O3", "before", LO + BOTH, "R0? R0?"),
    ("12.9.86", "-O3", "before", LO + BOTH, "R0? R0?"),
    ("13.0.88", "-O3", "before", LO + BOTH, "A B"),
    ("12.8.93", "-O0", "before", LO + BOTH, "A B"),
    ("12.8.93", "-O3", "after", BOTH + LO, "A B"),
)


def stored(ptx, version, arch, level="-O3"):
    """Where the bytes come from that the machine code stores: {bytes of a store: their names}."""
    Path("k.ptx").write_text(ptx)
    subprocess.run([PTXAS[version], f"-arch={arch}", level, "k.ptx", "-o", "k.bin"], check=True)
    show = [packages / "nvidia/cu13/bin/nvdisasm", "-c", "k.bin"]
    code = subprocess.run(show, check=True, capture_output=True, text=True).stdout
    written, stores = {"RZ": ["0"] * 4}, {}
    letters, others = iter("abcd"), map("n{}".format, itertools.count())

    def read(x):
        return written.get(x, [f"{x}?"] * 4)

    for op, rest in re.findall(r"^ +/\*\w{4}\*/ +(?:@!?U?P\w+ +)?([A-Z]\S*)(.*?) *;", code, re.M):
        x = [part.strip().removesuffix(".reuse") for part in rest.split(",")]
        size = re.search(r"\.(128|64|U16|U8)\b", op)
        size = {"128": 16, "64": 8, "U16": 2, "U8": 1}[size[1]] if size else 4
        first = re.fullmatch(r"R(\d+)", x[-1] if op.startswith("ST") else x[0])
        registers = [f"R{int(first[1]) + i}" for i in range((size + 3) // 4)] if first else []
        if op.startswith("ST"):
            stores.setdefault(size, []).extend(sum(map(read, registers), [])[:size])
        elif op.startswith("F2FP.") and "MERGE_C" in op:  # of d, a, b, c: d is b, a, lower half of c
            written[x[0]] = [read(x[2])[0].upper(), read(x[1])[0].upper(), *read(x[3])[:2]]
        elif op == "PRMT" and x[2].startswith("0x"):
            eight = read(x[1]) + read(x[3])
            written[x[0]] = [eight[int(x[2], 16) >> 4 * i & 7] for i in range(4)]
        elif op == "LOP3.LUT" and x[2] == "0xffff" and x[3:5] == ["RZ", "0xc0"]:
            written[x[0]] = read(x[1])[:2] + ["0"] * 2
        elif op == "SHF.R.U32.HI" and x[1] == "RZ" and x[2] == "0x8":
            written[x[0]] = read(x[3])[1:] + ["0"]
        elif re.match(r"(IMAD\.)?MOV\b", op) and x[-1].startswith("R"):
            written[x[0]] = read(x[-1])
        else:  # any other instruction makes a number of its own
            for register in registers:
                written[register] = [(op.startswith("LDG") and next(letters, "")) or next(others)] * 4
    return stores


@triton.jit
def both_ways(x, scale, out, turned):
    i, j = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    q = (tl.load(x + 32 * i + j) * scale).to(tl.float8e5)
    tl.store(out + 32 * i + j, q)
    tl.store(turned + 32 * j + i, q)  # goes byte by byte through shared memory


for version, level, order, uses, wanted in CASES:
    for arch, kind in itertools.product(("sm_89", "sm_90a", "sm_100a"), ("e5m2x2", "e4m3x2")):
        ptx = PTX.replace("ARCH", arch).replace("KIND", kind).replace("USES", uses)
        seen = stored(ptx, version, arch, level)
        lo, both = " ".join(seen[2]), " ".join(seen[4])
        assert (lo, both) == (wanted, "A B C D"), (version, level, order, arch, kind, seen)
    print(f"ptxas {version} {level}, lo stored {order} the mov: lo {lo}, both {both}")
types = {"x": "*fp32", "scale": "fp32", "out": "*fp8e5", "turned": "*fp8e5"}
source = ASTSource(both_ways, types, {}, {(i,): [["tt.divisibility", 16]] for i in (0, 2, 3)})
ptx = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 1}).asm["ptx"]
for version, wanted in ("12.8.93", 8), ("13.0.88", 0):
    seen = stored(ptx, version, "sm_90a")
    rows, columns = seen[16][:32], seen[1]
    lost = sum(byte not in rows for byte in columns)
    print(f"transposed by Triton for sm_90: ptxas {version} loses {lost} of {len(columns)} bytes")
    assert len(columns) == len({*rows}) == 32 and lost == wanted == 32 - len({*rows} & {*columns})
PY
TRITON_CACHE_DIR=$work/cache venv/bin/python -W ignore try.py || exit 1
