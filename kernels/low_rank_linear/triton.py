"""Triton kernels of `low_rank_linear` for few rows: two launches of which the second is loaded, and
has sent for its weight, while the first runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._epilogue import PLAIN, Epilogue, contiguous, contiguous_epilogue
from fxopt.kernels._triton import few_rows
from fxopt.kernels._triton import splits as partial_sums
from fxopt.kernels._triton.common import overlaps, processors, tile
from fxopt.kernels._triton.epilogue import finished
from fxopt.kernels._triton.few_rows import ALONE, Chain, Layout, Other, eightfold, summed
from fxopt.kernels._triton.splits import start_dependents, wait


@triton.jit
def _step(w, r_n, i_k, last, K, BLOCK_K: tl.constexpr):
    """Columns from `i_k` on of rows `r_n` of w, [1, rows, BLOCK_K]; zeros from `last` on."""
    o_k = i_k + tl.arange(0, BLOCK_K)
    mask = (o_k < K) & (i_k < last)
    return tl.load(
        w + r_n[None, :, None] * K + o_k[None, None, :], mask=mask[None, None, :], other=0.0
    )


@triton.jit
def _product(
    x, w, b_w, o_m, r_n, first, last, K, x_part,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ w.T in float32 [ROWS, BLOCK_N], over the columns `first` to `last`; `b_w` is the first
    step of w. Each step sends for the next one before it reads x."""
    o_k = tl.arange(0, BLOCK_K)
    p_x = x + o_m[:, None, None] * K + o_k[None, None, :]
    b_y = tl.zeros((ROWS, BLOCK_N, BLOCK_K // 8), tl.float32)
    for i_k in range(first, last, BLOCK_K):
        b_next = _step(w, r_n, i_k + BLOCK_K, last, K, BLOCK_K)
        m_k = (i_k + o_k < K)[None, None, :]
        b_x = summed(p_x + i_k, m_k, x_part, PARTS, w.dtype.element_ty).to(tl.float32)
        b_product = tl.reshape(b_w.to(tl.float32) * b_x, (ROWS, BLOCK_N, BLOCK_K // 8, 8))
        b_y += tl.sum(b_product, 3)
        b_w = b_next
    return tl.sum(b_y, 2)


@triton.jit(do_not_specialize=["M"])
def _vector_kernel(
    x, w, bias, up_x, up_w, up_bias, residual, y, M, N, K, SPAN, x_part,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, EITHER: tl.constexpr, PAIRED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    STARTS: tl.constexpr, WAITS: tl.constexpr, EIGHTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As the kernel of `few_rows`, without tensor cores, for x [M, K] and M up to ROWS.

    The first bytes of the weight go to registers before the previous kernel is waited for.
    """
    if STARTS:
        start_dependents(True)
    K, x_part = eightfold(K, EIGHTS), eightfold(x_part, EIGHTS)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r_n = tl.minimum(o_n, N - 1).to(tl.int64)
    o_m = tl.arange(0, ROWS)
    r_m = tl.minimum(o_m, M - 1)
    first = tl.program_id(1) % SPLITS * SPAN
    last = tl.minimum(first + SPAN, K)
    if EITHER:
        w = up_w if tl.program_id(1) >= SPLITS else w
    b_w = _step(w, r_n, first, last, K, BLOCK_K)
    b_up = b_w
    if PAIRED:
        b_up = _step(up_w, r_n, first, last, K, BLOCK_K)
    if WAITS:
        wait(True)
    b_y = _product(x, w, b_w, r_m, r_n, first, last, K, x_part, PARTS, ROWS, BLOCK_N, BLOCK_K)
    if PAIRED:
        b_up = _product(
            up_x, up_w, b_up, r_m, r_n, first, last, K, x_part, PARTS, ROWS, BLOCK_N, BLOCK_K
        )
    else:
        b_up = b_y
    if HAS_BIAS:
        b_y += tl.load(bias + r_n).to(tl.float32)[None, :]
    if HAS_UP_BIAS:
        b_up += tl.load(up_bias + r_n).to(tl.float32)[None, :]
    o_y = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
    if SPLITS > 1:
        tl.store(y + tl.program_id(1).to(tl.int64) * M * N + o_y, b_y, mask=m_y)
    else:
        if EITHER:
            o_y += tl.program_id(1).to(tl.int64) * M * N
        b_y = finished(
            b_y, b_up, residual + o_y, m_y, y.dtype.element_ty, ACTIVATION, PAIRED, HAS_RESIDUAL
        )
        tl.store(y + o_y, b_y, mask=m_y)


class Vector(NamedTuple):
    """How a product of up to four rows is cut: rows of the weight, and columns of each, in a step;
    `splits` programs share a sum."""

    block_n: int
    block_k: int
    warps: int = 4
    splits: int = 1


Cut = Vector | few_rows.Configuration
LONGEST = 4
"""Rows of x that the kernel without tensor cores takes."""


class Configuration(NamedTuple):
    """How both products are cut; the second without splits.

    Where the first's sums are split, every program of the second adds what it reads of them, or,
    `added`, a launch of its own does so before.
    """

    first: Cut
    second: Cut
    added: bool = False


def configuration(
    rows: int,
    in_features: int,
    rank: int,
    out_features: int,
    device: torch.device,
    paired: bool = False,
) -> Configuration:
    """For up to 16 rows. With one row, and with 16 where the op takes the kernels, within 2 % of
    the fastest that were found on an H200; `benchmarks/linear.py --sweep low-rank` compares others.

    A program of the second launch has half as many rows of each of two weights, `paired`, or where
    it has two rows of x: its registers are those of one then.
    """
    count = processors(device)
    if rows <= 2:
        split = in_features > 8192 or triton.cdiv(rank, 4) < 2 * count
        first = Vector(2, 1024, splits=2) if split else Vector(4, 1024)
        second = Vector(8 if rows == 1 and not paired else 4, tile(rank, most=1024))
        return Configuration(first._replace(block_k=tile(in_features, most=1024)), second)
    first = few_rows.Configuration(32, tile(in_features, most=256), stages=4)
    splits = _splits(triton.cdiv(rank, first.block_n), count)
    second = few_rows.configuration(out_features, rank, 2)
    # Parts of sums, in float32, would not fit into shared memory beside the second weight.
    return Configuration(first._replace(splits=splits), second, added=splits > 1)


def _splits(programs: int, wanted: int) -> int:
    """Programs for a sum, a power of two up to eight, so that there are about `wanted`."""
    return min(8, triton.next_power_of_2(max(1, round(wanted / programs))))


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    chosen: Configuration | None = None,
    after: Epilogue = PLAIN,
) -> Tensor:
    """As the reference, for few rows; float32 accumulation. The second launch does what comes
    `after`. The factors of a second weight have the shapes of the first's, and are read in the same
    two launches."""
    (rank, in_features), out_features = down.shape, len(up)
    # The second kernel reads weights before it waits: no copy may run between the launches.
    rows, down, up = x.reshape(-1, in_features).contiguous(), down.contiguous(), up.contiguous()
    bias, after = contiguous(bias), contiguous_epilogue(after)
    y = x.new_empty((*x.shape[:-1], out_features))
    if y.numel() == 0:
        return y
    count = len(rows)
    c = chosen or configuration(
        count, in_features, rank, out_features, x.device, after.up is not None
    )
    downs = (down, *(after.up[:1] if after.up else ()))
    parts = c.first.splits
    # For each weight the sums of each split.
    hidden = x.new_empty(
        (len(downs), parts, count, rank), dtype=torch.float32 if parts > 1 else x.dtype
    )
    both = None if after.up is None else Other(after.up[0])
    _launch(c.first, rows, down, None, hidden, Chain(starts=True), other=both)
    if c.added and parts > 1:
        sums, hidden = hidden, x.new_empty((len(downs), 1, count, rank))
        for partial, whole in zip(sums, hidden, strict=True):
            partial_sums.add(partial, None, whole[0], starts=True)
        parts = 1
    if after.up is not None:
        both = Other(after.up[1], after.up[2], hidden[1])
    _launch(c.second, hidden[0], up, bias, y, Chain(waits=True), after, parts, both)
    return y


def _launch(
    cut: Cut,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    chain: Chain = ALONE,
    after: Epilogue = PLAIN,
    parts: int = 1,
    other: Other | None = None,
) -> None:
    """y = x @ w.T for x [..., rows, depth], `parts` sums of which are added, and what follows; all
    contiguous."""
    columns, depth = w.shape
    rows = x.numel() // parts // depth
    if isinstance(cut, few_rows.Configuration):
        read, written = Layout(0, depth, rows * depth), Layout(rows * columns, columns)
        few_rows.launch(
            x, read, w[None], bias, y, written, rows, cut, chain, None, after, parts, other
        )
        return
    either = other is not None and other.x is None
    other = other or Other(w)
    span = triton.cdiv(triton.cdiv(depth, cut.splits), cut.block_k) * cut.block_k
    overlap = overlaps(x.device)
    _vector_kernel[(triton.cdiv(columns, cut.block_n), (2 if either else 1) * cut.splits)](
        x, w, bias, other.x, other.w, other.bias, y if after.residual is None else after.residual,
        y, rows, columns, depth, span, rows * depth,
        PARTS=parts, SPLITS=cut.splits, EITHER=either, PAIRED=other.x is not None,
        HAS_BIAS=bias is not None, HAS_UP_BIAS=other.bias is not None,
        ACTIVATION=after.activation, HAS_RESIDUAL=after.residual is not None,
        STARTS=overlap and chain.starts, WAITS=overlap and chain.waits, EIGHTS=depth % 8 == 0,
        ROWS=triton.next_power_of_2(rows), BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
        num_warps=cut.warps, num_stages=1, launch_pdl=overlap and chain.waits,
    )  # fmt: skip
