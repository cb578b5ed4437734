"""X Xᵀ of a batch of matrices by the blocks on and below the diagonal, in Triton.

The product is symmetric, so a block above the diagonal is the transpose of one below. With 768 rows
in blocks of 128, 21 of 36 blocks are computed.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _symmetric_product(  # noqa: PLR0917 - Triton launches by position
    x, out, rows, columns, block: tl.constexpr, deep: tl.constexpr
):
    """One program per block on or below the diagonal, and matrix."""
    number = tl.program_id(0)
    # row i of blocks begins with number i (i + 1) / 2
    i = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)  # rounding of the root
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    j = number - i * (i + 1) // 2
    matrix = tl.program_id(1).to(tl.int64)
    x += matrix * rows * columns
    out += matrix * rows * rows
    m, n, k = i * block + tl.arange(0, block), j * block + tl.arange(0, block), tl.arange(0, deep)
    total = tl.zeros((block, block), tl.float32)
    for start in range(0, columns, deep):
        at = start + k
        left = x + m[:, None] * columns + at[None, :]
        right = x + n[:, None] * columns + at[None, :]
        inside = (at < columns)[None, :]
        a = tl.load(left, mask=(m < rows)[:, None] & inside, other=0.0)
        b = tl.load(right, mask=(n < rows)[:, None] & inside, other=0.0)
        total = tl.dot(a, tl.trans(b), total)
    value = total.to(out.dtype.element_ty)
    both = (m < rows)[:, None] & (n < rows)[None, :]
    tl.store(out + m[:, None] * rows + n[None, :], value, mask=both)
    if i != j:
        turned = (n < rows)[:, None] & (m < rows)[None, :]
        tl.store(out + n[:, None] * rows + m[None, :], tl.trans(value), mask=turned)


def symmetric_product(
    x: Tensor, block: int = 128, deep: int = 64, warps: int = 8, stages: int = 3
) -> Tensor:
    """x xᵀ of contiguous (n, rows, columns) in bf16 or float32 -> (n, rows, rows).

    The plain form is `x @ x.mT`.

    Args:
        x: the matrices.
        block: side of a block.
        deep: columns at a time.
        warps: of a program.
        stages: blocks on their way.
    """
    assert x.is_contiguous()
    n, rows, columns = x.shape
    out = x.new_empty(n, rows, rows)
    side = triton.cdiv(rows, block)
    grid = (side * (side + 1) // 2, n)
    _symmetric_product[grid](x, out, rows, columns, block, deep, num_warps=warps, num_stages=stages)
    return out
