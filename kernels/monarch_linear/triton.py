"""Triton kernel of `monarch_linear`: a batched product that stores through the permutation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._epilogue import PLAIN, Epilogue, contiguous, contiguous_epilogue
from fxopt.kernels._triton import few_rows
from fxopt.kernels._triton.common import DOT_UPCAST, dot, tile
from fxopt.kernels._triton.epilogue import finished
from fxopt.kernels._triton.few_rows import Chain, Layout


@triton.jit
def _blocks_kernel(
    x, w, bias, residual, y, M, N, K, x_batch, x_row, y_batch, y_row, y_part, PART,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    UPCAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[batch][m][n] = x[batch][m] . w[batch][n]; column n is stored in part n // PART of y.

    What follows the product is done before; a residual lies as y.
    EVEN: steps fill K.
    """
    i_b = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Rows and columns beyond the last read the last one: masks would cost more.
    r_m, r_n = tl.minimum(o_m, M - 1), tl.minimum(o_n, N - 1)
    o_k = tl.arange(0, BLOCK_K)
    p_x = x + i_b * x_batch + r_m[:, None] * x_row + o_k[None, :]
    p_w = w + (i_b * N + r_n[None, :]) * K + o_k[:, None]
    for i_k in range(0, K, BLOCK_K):
        if EVEN:
            b_x, b_w = tl.load(p_x + i_k), tl.load(p_w + i_k)
        else:
            m_k = i_k + o_k < K
            b_x = tl.load(p_x + i_k, mask=m_k[None, :], other=0.0)
            b_w = tl.load(p_w + i_k, mask=m_k[:, None], other=0.0)
        b_y = dot(b_x, b_w, b_y, UPCAST)
    if HAS_BIAS:
        b_y += tl.load(bias + i_b * N + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_y = i_b * y_batch + o_m[:, None] * y_row
    o_y += ((o_n // PART) * y_part + o_n % PART)[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    b_y = finished(
        b_y, b_y, residual + o_y, m_y, y.dtype.element_ty, ACTIVATION, False, HAS_RESIDUAL
    )
    tl.store(y + o_y, b_y, mask=m_y)


def monarch_linear(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, after: Epilogue = PLAIN
) -> Tensor:
    """As the reference, in two launches without a copy between them; float32 accumulation. The
    second does what comes `after`."""
    blocks, inner, in_width = right.shape
    out_width, rank = left.shape[1], inner // blocks
    rows = x.reshape(-1, blocks * in_width).contiguous()
    y = x.new_empty((*x.shape[:-1], blocks * out_width))
    if y.numel() == 0:
        return y
    count = len(rows)
    hidden = x.new_empty((blocks, count, inner))
    right, left = right.contiguous(), left.contiguous()
    read = Layout(in_width, blocks * in_width)
    swapped = Layout(rank, inner, count * inner, rank)
    whole, written = Layout(count * inner, inner), Layout(out_width, blocks * out_width)
    bias, after = contiguous(bias), contiguous_epilogue(after)
    if count <= few_rows.ROWS:
        first, second = (
            few_rows.configuration(w.shape[0] * w.shape[1], w.shape[2], w.itemsize)
            for w in (right, left)
        )
        starts, waits = Chain(starts=True), Chain(waits=True)
        few_rows.launch(rows, read, right, None, hidden, swapped, count, first, starts)
        few_rows.launch(hidden, whole, left, bias, y, written, count, second, waits, after=after)
        return y
    _launch(rows, read, right, None, hidden, swapped, count)
    _launch(hidden, whole, left, bias, y, written, count, after)
    return y


def _launch(
    x: Tensor,
    x_layout: Layout,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    y_layout: Layout,
    rows: int,
    after: Epilogue = PLAIN,
) -> None:
    batch, columns, depth = w.shape
    block_m, block_n, block_k = tile(rows, most=128), tile(columns, most=128), tile(depth)
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n), batch)
    _blocks_kernel[grid](
        x, w, bias, y if after.residual is None else after.residual, y, rows, columns, depth,
        x_layout.batch, x_layout.row,
        y_layout.batch, y_layout.row, y_layout.part, min(y_layout.width, columns),
        HAS_BIAS=bias is not None, ACTIVATION=after.activation,
        HAS_RESIDUAL=after.residual is not None, UPCAST=DOT_UPCAST, EVEN=depth % block_k == 0,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps,
        num_stages=2 if w.itemsize == 4 else 4,
    )  # fmt: skip
