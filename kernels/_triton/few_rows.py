"""Products of few rows with a weight: all time goes to reading the weight once."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._epilogue import PLAIN, Epilogue

from .common import DOT_UPCAST, dot, overlaps, tile
from .epilogue import finished
from .splits import prefetch, start_dependents, wait

ROWS = 16
"""Up to these rows the kernel is meant for."""


@triton.jit(do_not_specialize=["M"])
def _few_rows_kernel(
    x, w, scale_m, scale_n, bias, residual, y,
    M, N, K, x_batch, x_row, y_batch, y_row, y_part, PART,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, UPCAST: tl.constexpr,
    STARTS: tl.constexpr, WAITS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[batch][m][n] = x[batch][m] . w[batch][n], and what follows the product.

    Column n is stored in part n // PART of y, and a residual lies as y. With scales, float8 x and
    w: the sum times scale_m[m] * scale_n[n]. STARTS and WAITS: what the kernel is to the next and
    the previous one. EVEN: steps fill K.
    """
    if STARTS:
        start_dependents(True)
    i_b = tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < M
    r_n = tl.minimum(o_n, N - 1).to(tl.int64)
    p_w = w + (i_b * N + r_n) * K
    if WAITS:
        # The weight is nobody's output: it can be on its way while the kernel before this ends.
        prefetch(p_w, K, w.dtype.element_ty.primitive_bitwidth // 8, 8)
        wait(True)
    p_x = x + i_b * x_batch + o_m.to(tl.int64)[:, None] * x_row + o_k[None, :]
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        m_k = i_k + o_k < K
        if EVEN:
            b_w = tl.load(p_w[None, :] + i_k + o_k[:, None])
            b_x = tl.load(p_x + i_k, mask=m_m[:, None], other=0.0)
        else:
            b_w = tl.load(p_w[None, :] + i_k + o_k[:, None], mask=m_k[:, None], other=0.0)
            b_x = tl.load(p_x + i_k, mask=m_m[:, None] & m_k[None, :], other=0.0)
        if HAS_SCALE:
            # Exact, and every product of two such numbers is, too.
            b_w = b_w.to(tl.float16)
            b_x = b_x.to(tl.float16)
        b_y = dot(b_x, b_w, b_y, UPCAST)
    if HAS_SCALE:
        b_y *= tl.load(scale_m + o_m, mask=m_m, other=0.0)[:, None]
        b_y *= tl.load(scale_n + r_n)[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias + i_b * N + r_n).to(tl.float32)[None, :]
    o_y = i_b * y_batch + o_m.to(tl.int64)[:, None] * y_row
    o_y += ((o_n // PART).to(tl.int64) * y_part + o_n % PART)[None, :]
    m_y = m_m[:, None] & (o_n < N)[None, :]
    b_y = finished(
        b_y, b_y, residual + o_y, m_y, y.dtype.element_ty, ACTIVATION, False, HAS_RESIDUAL
    )
    tl.store(y + o_y, b_y, mask=m_y)


class Configuration(NamedTuple):
    block_n: int = 32
    block_k: int = 128
    warps: int = 4
    stages: int = 5


def configuration(columns: int, depth: int, bytes_each: int) -> Configuration:
    """The fastest that were found on an H100; `benchmarks/linear.py --sweep few` compares them."""
    if bytes_each < 2:
        block_n, block_k, stages = 32, 256, 5
    elif columns < 2048:
        block_n, block_k, stages = 64, 64, 7
    elif columns < 8192:
        block_n, block_k, stages = 32, 128, 7
    else:
        block_n, block_k, stages = 64, 128, 4
    if bytes_each > 2:
        block_k, stages = block_k // 2, 4
    return Configuration(block_n, tile(depth, most=block_k), stages=stages)


class Chain(NamedTuple):
    """What a launch does for its neighbours: `starts` the next early, `waits` for the previous."""

    starts: bool = False
    waits: bool = False


ALONE = Chain()


class Layout(NamedTuple):
    """Strides of [batch, rows, columns]; columns in parts of `width`, `part` apart."""

    batch: int
    row: int
    part: int = 0
    width: int = 1 << 30


def launch(
    x: Tensor,
    x_layout: Layout,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    y_layout: Layout,
    rows: int,
    chosen: Configuration,
    chain: Chain = ALONE,
    scales: tuple[Tensor, Tensor] | None = None,
    after: Epilogue = PLAIN,
) -> None:
    """y = x @ w.T + bias for w [batch, columns, depth], and what comes `after` with one weight."""
    batch, columns, depth = w.shape
    grid = (triton.cdiv(columns, chosen.block_n), batch)
    overlap = overlaps(x.device)
    scale_m, scale_n = scales or (x, x)
    _few_rows_kernel[grid](
        x, w, scale_m, scale_n, bias, y if after.residual is None else after.residual, y,
        rows, columns, depth, x_layout.batch, x_layout.row,
        y_layout.batch, y_layout.row, y_layout.part, min(y_layout.width, columns),
        HAS_SCALE=scales is not None, HAS_BIAS=bias is not None, ACTIVATION=after.activation,
        HAS_RESIDUAL=after.residual is not None, UPCAST=DOT_UPCAST,
        STARTS=overlap and chain.starts, WAITS=overlap and chain.waits,
        EVEN=depth % chosen.block_k == 0, BLOCK_M=tile(rows),
        BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k,
        num_warps=chosen.warps, num_stages=chosen.stages, launch_pdl=overlap and chain.waits,
    )  # fmt: skip


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    chain: Chain = ALONE,
    scales: tuple[Tensor, Tensor] | None = None,
    chosen: Configuration | None = None,
) -> Tensor:
    """Fill y [..., columns] with x [rows, depth] @ w[columns, depth].T + bias; or with scales."""
    (rows, depth), columns = x.shape, len(w)
    c = chosen or configuration(columns, depth, w.itemsize)
    plain = Layout(rows * columns, columns)
    launch(x, Layout(0, depth), w[None], bias, y, plain, rows, c, chain, scales)
    return y
