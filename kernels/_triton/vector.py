"""`quantized_linear` for one to four rows, without tensor cores: all time is the weight's bytes.

Every thread reads from each of several rows of the weight at once, so that enough bytes are on
their way without a pipeline. A program sees whole rows: no sum is split.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._epilogue import PLAIN, Epilogue

from .codes import BIAS, biased
from .common import ASM, overlaps
from .epilogue import finished
from .splits import prefetch, start_dependents, wait

ROWS = 4
"""Up to these rows the kernel works."""
CHUNK = tl.constexpr(8)
"""Bytes that a thread reads at once, and as many numbers of x: 16 of its bytes."""


class Vector(NamedTuple):
    """How the product of one row is cut: rows of the weight, and bytes of each, in a step."""

    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 1
    chained: bool = False
    """Let the next kernel be loaded while this one runs, and fetch the weight while the previous
    one ends: for calls that follow each other."""


def fits(rows: int, bits: int, group_size: int) -> bool:
    """Whether the kernel serves a format: its groups tile steps of a power of two of bytes."""
    plane = group_size * bits // 8
    return rows <= ROWS and CHUNK.value <= plane <= 1024 and plane & (plane - 1) == 0


@triton.jit
def _product(
    x, packed, scale, zero, bias, o_m, r_n, M, K, WIDTH, GROUPS,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
    RAGGED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ weight.T + bias in float32 [ROWS, BLOCK_N], in steps of BLOCK_K bytes of rows `r_n`.

    A thread adds products with codes that have an offset; what the offset and the zero point make
    of the sum is a multiple of the sum of x, and is taken off before the scale joins.
    """
    PLANES: tl.constexpr = 8 // BITS
    PLANE: tl.constexpr = GROUP // PLANES
    SPAN: tl.constexpr = BLOCK_K // PLANE
    CHUNKS: tl.constexpr = PLANE // CHUNK
    OFFSET: tl.constexpr = BIAS[BITS] if ASM else 0
    o_k = tl.arange(0, BLOCK_K)
    o_g = tl.arange(0, SPAN)
    p_packed = packed + r_n[None, :, None] * WIDTH + o_k[None, None, :]
    p_x = x + tl.minimum(o_m, M - 1)[:, None, None] * K
    p_x += (o_k + o_k // PLANE * (GROUP - PLANE))[None, None, :]
    p_scale = scale + r_n[:, None] * GROUPS + o_g[None, :]
    p_zero = zero + r_n[:, None] * GROUPS + o_g[None, :]
    b_y = tl.zeros((ROWS, BLOCK_N, SPAN, CHUNKS), tl.float32)
    for i_k in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
        i_g = i_k // PLANE
        if RAGGED:
            m_k = (i_k + o_k < WIDTH)[None, None, :]
            m_g = (i_g + o_g < GROUPS)[None, :]
            b_byte = tl.load(tl.max_contiguous(p_packed + i_k, [1, 1, CHUNK]), mask=m_k, other=0)
            b_scale = tl.load(p_scale + i_g, mask=m_g, other=0.0).to(tl.float32)
            b_zero = tl.load(p_zero + i_g, mask=m_g, other=0.0).to(tl.float32) + OFFSET
        else:
            b_byte = tl.load(tl.max_contiguous(p_packed + i_k, [1, 1, CHUNK]))
            b_scale = tl.load(p_scale + i_g).to(tl.float32)
            b_zero = tl.load(p_zero + i_g).to(tl.float32) + OFFSET
        b_sum = tl.zeros((ROWS, BLOCK_N, SPAN, CHUNKS), tl.float32)
        b_all = tl.zeros((ROWS, 1, SPAN, CHUNKS), tl.float32)
        for i_p in tl.static_range(PLANES):
            if RAGGED:
                b_x = tl.load(p_x + i_k * PLANES + i_p * PLANE, mask=m_k, other=0.0)
            else:
                b_x = tl.load(p_x + i_k * PLANES + i_p * PLANE)
            b_x = b_x.to(tl.float32)
            b_all += tl.sum(tl.reshape(b_x, (ROWS, 1, SPAN, CHUNKS, CHUNK)), 4)
            b_product = biased(b_byte, BITS, i_p, ASM) * b_x
            b_sum += tl.sum(tl.reshape(b_product, (ROWS, BLOCK_N, SPAN, CHUNKS, CHUNK)), 4)
        b_y += (b_sum - b_all * b_zero[None, :, :, None]) * b_scale[None, :, :, None]
    y = tl.sum(tl.sum(b_y, 3), 2)
    if HAS_BIAS:
        y += tl.load(bias + r_n).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["M"])
def _vector_kernel(
    x, packed, scale, zero, bias, up_packed, up_scale, up_zero, up_bias, residual, out,
    M, N, K, WIDTH, GROUPS,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PAIRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ASM: tl.constexpr,
    CHAINED: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x @ weight.T for x [M, K], M up to ROWS, and what follows the product.

    PAIRED, the rows of the second weight are read after those of the first.
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r_n = tl.minimum(o_n, N - 1).to(tl.int64)
    o_m = tl.arange(0, ROWS)
    if CHAINED:
        start_dependents(True)
        prefetch(packed + r_n * WIDTH, WIDTH, 1, 16)
        wait(True)
    y = _product(
        x, packed, scale, zero, bias, o_m, r_n, M, K, WIDTH, GROUPS,
        BITS, GROUP, HAS_BIAS, ASM, RAGGED, ROWS, STAGES, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    up = y
    if PAIRED:
        up = _product(
            x, up_packed, up_scale, up_zero, up_bias, o_m, r_n, M, K, WIDTH, GROUPS,
            BITS, GROUP, HAS_UP_BIAS, ASM, RAGGED, ROWS, STAGES, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    o_y = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
    y = finished(y, up, residual + o_y, m_y, out.dtype.element_ty, ACTIVATION, PAIRED, HAS_RESIDUAL)
    tl.store(out + o_y, y, mask=m_y)


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    y: Tensor,
    bits: int,
    group_size: int,
    chosen: Vector,
    after: Epilogue = PLAIN,
) -> Tensor:
    """Fill y [..., out] from x [rows, in] for up to ROWS rows; all contiguous."""
    out_features, width = packed.shape
    up = after.up or (None, None, None, None)
    _vector_kernel[(triton.cdiv(out_features, chosen.block_n),)](
        x, packed, scale, zero, bias, *up, y if after.residual is None else after.residual, y,
        len(x), out_features, x.shape[1], width, scale.shape[1],
        BITS=bits, GROUP=group_size, HAS_BIAS=bias is not None, HAS_UP_BIAS=up[3] is not None,
        ACTIVATION=after.activation, PAIRED=after.up is not None,
        HAS_RESIDUAL=after.residual is not None,
        ASM=ASM and x.dtype != torch.float32,
        CHAINED=chosen.chained and overlaps(x.device), RAGGED=width % chosen.block_k != 0,
        ROWS=triton.next_power_of_2(len(x)),
        STAGES=chosen.stages, BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k,
        num_warps=chosen.warps, num_stages=1,
        launch_pdl=chosen.chained and overlaps(x.device),
    )  # fmt: skip
    return y
