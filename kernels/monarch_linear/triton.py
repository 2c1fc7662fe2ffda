"""Triton kernel of `monarch_linear`: a batched product that stores through the permutation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.common import DOT_UPCAST, dot, tile


@triton.jit
def _blocks_kernel(
    x, w, bias, y, M, N, K, x_batch, x_row, y_batch, y_row, y_part, PART,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[batch][m][n] = x[batch][m] . w[batch][n]; column n is stored in part n // PART of y."""
    i_b = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        p_x = x + i_b * x_batch + o_m[:, None] * x_row + o_k[None, :]
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
        p_w = w + (i_b * N + o_n[None, :]) * K + o_k[:, None]
        b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_y = dot(b_x, b_w, b_y, UPCAST)
    if HAS_BIAS:
        b_y += tl.load(bias + i_b * N + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = y + i_b * y_batch + o_m[:, None] * y_row
    p_y += ((o_n // PART) * y_part + o_n % PART)[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def monarch_linear(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference, in two launches without a copy between them; float32 accumulation."""
    blocks, inner, in_width = right.shape
    out_width, rank = left.shape[1], inner // blocks
    rows = x.reshape(-1, blocks * in_width).contiguous()
    y = x.new_empty((*x.shape[:-1], blocks * out_width))
    if y.numel() == 0:
        return y
    count = len(rows)
    hidden = x.new_empty((blocks, count, inner))
    right, left = right.contiguous(), left.contiguous()
    block_m = tile(count)

    def launch(n: int, k: int, *arguments: object) -> None:
        block_n = tile(n)
        grid = (triton.cdiv(count, block_m), triton.cdiv(n, block_n), blocks)
        _blocks_kernel[grid](
            *arguments, HAS_BIAS=arguments[2] is not None, UPCAST=DOT_UPCAST,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=tile(k),
        )  # fmt: skip

    launch(
        inner, in_width,
        rows, right, None, hidden, count, inner, in_width,
        in_width, blocks * in_width, rank, inner, count * inner, rank,
    )  # fmt: skip
    launch(
        out_width, inner,
        hidden, left, bias, y, count, out_width, inner,
        count * inner, inner, out_width, blocks * out_width, 0, out_width,
    )  # fmt: skip
    return y
