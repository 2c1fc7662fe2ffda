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


@triton.jit
def eightfold(size, KNOWN: tl.constexpr):
    """`size`. KNOWN: it is a multiple of 8, and the compiler shall see so: of numbers it looks by
    itself only whether they are multiples of 16."""
    if KNOWN:
        size = size // 8 * 8
    return size


@triton.jit
def summed(x, mask, part, PARTS: tl.constexpr, dtype: tl.constexpr):
    """What the pointers `x` show; or the sum of PARTS numbers, `part` apart, rounded to `dtype`."""
    b_x = tl.load(x, mask=mask, other=0.0)
    if PARTS > 1:
        for i in tl.static_range(1, PARTS):
            b_x += tl.load(x + i * part, mask=mask, other=0.0)
        b_x = b_x.to(dtype)
    return b_x


@triton.jit
def _product(
    x, w, o_m, m_m, r_n, first, last, K, x_row, x_part, PARTS: tl.constexpr,
    HAS_SCALE: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ w.T in float32 [BLOCK_M, BLOCK_N] for rows `r_n` of w, columns `first` to `last`."""
    o_k = tl.arange(0, BLOCK_K)
    p_x = x + o_m.to(tl.int64)[:, None] * x_row + o_k[None, :]
    p_w = w + r_n[None, :] * K + o_k[:, None]
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(first, last, BLOCK_K):
        if EVEN:
            b_w = tl.load(p_w + i_k)
            b_x = summed(p_x + i_k, m_m[:, None], x_part, PARTS, w.dtype.element_ty)
        else:
            m_k = i_k + o_k < K
            b_w = tl.load(p_w + i_k, mask=m_k[:, None], other=0.0)
            m_x = m_m[:, None] & m_k[None, :]
            b_x = summed(p_x + i_k, m_x, x_part, PARTS, w.dtype.element_ty)
        if HAS_SCALE:
            # Exact, and every product of two such numbers is, too.
            b_w = b_w.to(tl.float16)
            b_x = b_x.to(tl.float16)
        b_y = dot(b_x, b_w, b_y, UPCAST)
    return b_y


@triton.jit(do_not_specialize=["M"])
def _few_rows_kernel(
    x, w, scale_m, scale_n, bias, up_x, up_w, up_scale, up_bias, residual, y,
    M, N, K, SPAN, x_batch, x_row, x_part, y_batch, y_row, y_part, PART,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, EITHER: tl.constexpr, PAIRED: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr, UPCAST: tl.constexpr,
    STARTS: tl.constexpr, WAITS: tl.constexpr, EVEN: tl.constexpr, EIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[batch][m][n] = x[batch][m] . w[batch][n], and what follows the product.

    Column n is stored in part n // PART of y, and a residual lies as y. With scales, float8 x and
    w: the sum times scale_m[m] * scale_n[n]. STARTS and WAITS: what the kernel is to the next and
    the previous one. EVEN: steps fill K. EIGHTS: K and x's strides are multiples of 8.

    x may be PARTS sums in float32, which are added as they are read. With SPLITS, each of as many
    programs has SPAN columns, and y is their sums, [batch, SPLITS, M, N] in float32. Of two
    weights, `w` and `up_w`, EITHER batch 0 has the first and batch 1 the second, or, PAIRED, what
    follows takes the products of both, with `x` and with `up_x`.
    """
    if STARTS:
        start_dependents(True)
    K, x_row = eightfold(K, EIGHTS), eightfold(x_row, EIGHTS)
    x_batch, x_part = eightfold(x_batch, EIGHTS), eightfold(x_part, EIGHTS)
    i_b = (tl.program_id(2) // SPLITS).to(tl.int64)
    i_s = tl.program_id(2) % SPLITS
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    r_n = tl.minimum(o_n, N - 1).to(tl.int64)
    first = i_s * SPAN
    last = tl.minimum(first + SPAN, K)
    if EITHER:
        w = up_w if i_b > 0 else w
    else:
        w += i_b * N * K
    x += i_b * x_batch
    if WAITS:
        # The weight is nobody's output: it can be on its way while the kernel before this ends.
        prefetch(w + r_n * K + first, last - first, w.dtype.element_ty.primitive_bitwidth // 8, 8)
        if PAIRED:
            prefetch(up_w + r_n * K, K, w.dtype.element_ty.primitive_bitwidth // 8, 8)
        wait(True)
    b_y = _product(
        x, w, o_m, m_m, r_n, first, last, K, x_row, x_part,
        PARTS, HAS_SCALE, UPCAST, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    b_up = b_y
    if PAIRED:
        b_up = _product(
            up_x, up_w, o_m, m_m, r_n, first, last, K, x_row, x_part,
            PARTS, HAS_SCALE, UPCAST, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if HAS_SCALE:
        b_m = tl.load(scale_m + o_m, mask=m_m, other=0.0)[:, None]
        b_y *= b_m
        b_y *= tl.load(scale_n + r_n)[None, :]
        if PAIRED:
            b_up *= b_m
            b_up *= tl.load(up_scale + r_n)[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias + i_b * N + r_n).to(tl.float32)[None, :]
    if HAS_UP_BIAS:
        b_up += tl.load(up_bias + r_n).to(tl.float32)[None, :]
    m_y = m_m[:, None] & (o_n < N)[None, :]
    if SPLITS > 1:
        o_y = tl.program_id(2).to(tl.int64) * M * N + o_m[:, None] * N + o_n[None, :]
        tl.store(y + o_y, b_y, mask=m_y)
    else:
        o_y = i_b * y_batch + o_m.to(tl.int64)[:, None] * y_row
        o_y += ((o_n // PART).to(tl.int64) * y_part + o_n % PART)[None, :]
        b_y = finished(
            b_y, b_up, residual + o_y, m_y, y.dtype.element_ty, ACTIVATION, PAIRED, HAS_RESIDUAL
        )
        tl.store(y + o_y, b_y, mask=m_y)


class Configuration(NamedTuple):
    """How a product is cut. `splits` programs share the sums of one tile of outputs."""

    block_n: int = 32
    block_k: int = 128
    warps: int = 4
    stages: int = 5
    splits: int = 1
    block_m: int = 16


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


class Other(NamedTuple):
    """A second weight [columns, depth]. With `x`, which lies as the first weight's, what follows
    takes its product too; without, `y` is a batch of both products."""

    w: Tensor
    bias: Tensor | None = None
    x: Tensor | None = None
    scale: Tensor | None = None


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
    parts: int = 1,
    other: Other | None = None,
) -> None:
    """y = x @ w.T + bias for w [batch, columns, depth], and what comes `after`.

    `x` may be `parts` float32 sums, its layout's `part` apart. Where the configuration splits sums,
    y is [batch, splits, rows, columns] in float32.
    """
    batch, columns, depth = w.shape
    either = other is not None and other.x is None
    other = other or Other(w)
    splits = chosen.splits
    span = triton.cdiv(triton.cdiv(depth, splits), chosen.block_k) * chosen.block_k
    grid = (
        triton.cdiv(columns, chosen.block_n),
        triton.cdiv(rows, chosen.block_m),
        (2 if either else batch) * splits,
    )
    overlap = overlaps(x.device)
    scale_m, scale_n = scales or (x, x)
    _few_rows_kernel[grid](
        x, w, scale_m, scale_n, bias, other.x, other.w, other.scale, other.bias,
        y if after.residual is None else after.residual, y,
        rows, columns, depth, span, x_layout.batch, x_layout.row, x_layout.part,
        y_layout.batch, y_layout.row, y_layout.part, min(y_layout.width, columns),
        PARTS=parts, SPLITS=splits, EITHER=either, PAIRED=other.x is not None,
        HAS_SCALE=scales is not None, HAS_BIAS=bias is not None,
        HAS_UP_BIAS=other.bias is not None, ACTIVATION=after.activation,
        HAS_RESIDUAL=after.residual is not None, UPCAST=DOT_UPCAST,
        STARTS=overlap and chain.starts, WAITS=overlap and chain.waits,
        EVEN=depth % chosen.block_k == 0,
        EIGHTS=all(size % 8 == 0 for size in (depth, *x_layout[:3])), BLOCK_M=chosen.block_m,
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
    after: Epilogue = PLAIN,
    other: Other | None = None,
) -> Tensor:
    """Fill y [..., columns] with x [rows, depth] @ w[columns, depth].T + bias; or with scales."""
    (rows, depth), columns = x.shape, len(w)
    c = chosen or configuration(columns, depth, w.itemsize)
    plain = Layout(rows * columns, columns)
    launch(
        x, Layout(0, depth), w[None], bias, y, plain, rows, c, chain, scales, after, other=other
    )  # fmt: skip
    return y
