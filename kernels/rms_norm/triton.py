"""RMSNorm, its weight and the sum that it reads in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: short rows share a program.
TILE = 2048


@triton.jit
def _norm_kernel(
    x, residual, weight, total, out, rows, D, epsilon,
    HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of out [rows, D], all tensors contiguous."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_x = (o_m < rows)[:, None] & m_d[None, :]
    o_x = o_m[:, None] * D + o_d[None, :]
    b_x = tl.load(x + o_x, mask=m_x, other=0.0)
    if HAS_RESIDUAL:
        b_r = tl.load(residual + o_x, mask=m_x, other=0.0)
        b_x = (b_x.to(WIDE) + b_r.to(WIDE)).to(b_x.dtype)
        tl.store(total + o_x, b_x, mask=m_x)
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0)
    b_y = b_x.to(WIDE)
    b_root = tl.rsqrt(tl.sum(b_y * b_y, 1) / D + epsilon)
    b_y = (b_y * b_root[:, None]).to(b_x.dtype)
    b_y = b_y.to(WIDE) * b_w.to(WIDE)[None, :]
    tl.store(out + o_x, b_y.to(b_x.dtype), mask=m_x)


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(x + residual, its norm) as the reference; without a residual the sum is x."""
    size = x.shape[-1]
    x, weight = x.contiguous(), weight.contiguous()
    out, rows = x.new_empty(x.shape), x.numel() // size
    total = x if residual is None else x.new_empty(x.shape)
    columns = triton.next_power_of_2(size)
    block = max(1, TILE // columns)
    _norm_kernel[(triton.cdiv(rows, block),)](
        x, x if residual is None else residual.contiguous(), weight, total, out,
        rows, size, epsilon,
        HAS_RESIDUAL=residual is not None, WIDE=tl.float64 if x.itemsize == 8 else tl.float32,
        BLOCK_M=block, BLOCK_D=columns, num_warps=4 if columns <= TILE else 8,
    )  # fmt: skip
    return total, out
