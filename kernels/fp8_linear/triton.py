"""Triton kernels of `fp8_linear`: rows and their scales in one launch, products of few rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._epilogue import PLAIN, Epilogue, contiguous, contiguous_epilogue
from fxopt.kernels._triton import few_rows
from fxopt.kernels._triton.common import overlaps
from fxopt.kernels._triton.epilogue import finished
from fxopt.kernels._triton.few_rows import Chain, Other
from fxopt.kernels._triton.splits import start_dependents

from .reference import DTYPE, LARGEST, LEAST


@triton.jit
def _quantize_rows_kernel(
    x, y, scale, K, LARGEST: tl.constexpr, LEAST: tl.constexpr, STARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    start_dependents(STARTS)
    i_m = tl.program_id(0).to(tl.int64)
    b_most = tl.zeros((BLOCK_K,), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_x = tl.load(x + i_m * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_most = tl.maximum(b_most, tl.abs(b_x))
    b_scale = tl.maximum(tl.max(b_most, 0) / LARGEST, LEAST)
    tl.store(scale + i_m, b_scale)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_x = tl.load(x + i_m * K + o_k, mask=o_k < K, other=0.0).to(tl.float32) / b_scale
        b_x = tl.minimum(tl.maximum(b_x, -LARGEST), LARGEST)
        tl.store(y + i_m * K + o_k, b_x.to(y.dtype.element_ty), mask=o_k < K)


def quantize_rows(x: Tensor, starts: bool = False) -> tuple[Tensor, Tensor]:
    """x [rows, in] as e4m3 [rows, in] and the scale [rows, 1] of each row, in float32.

    `starts`: the next kernel waits for this one by itself, and so may start early.
    """
    x = x.contiguous()
    y = torch.empty_like(x, dtype=DTYPE)
    scale = torch.empty((len(x), 1), dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(x.shape[1]), 4096)
    warps = max(1, min(16, block // 256))
    _quantize_rows_kernel[(len(x),)](
        x, y, scale, x.shape[1], LARGEST=LARGEST, LEAST=LEAST,
        STARTS=starts and overlaps(x.device), BLOCK_K=block, num_warps=warps,
    )  # fmt: skip
    return y, scale


@triton.jit
def _step(w, r_n, i_k, K, BLOCK_K: tl.constexpr):
    """Columns from `i_k` on of rows `r_n` of w; zeros from K on."""
    o_k = i_k + tl.arange(0, BLOCK_K)
    p_w = w + r_n[:, None] * K + o_k[None, :]
    # Eight at once, as of x: both then lie in the same threads.
    return tl.load(tl.max_contiguous(p_w, [1, 8]), mask=(o_k < K)[None, :], other=0.0)


@triton.jit
def _product(
    x, w, b_w, b_scale, r_n, K, LARGEST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `r_n` of w [N, K] times x [K] over `b_scale`, rounded; `b_w` is the first step of w."""
    o_k = tl.arange(0, BLOCK_K)
    p_x = x + o_k[None, :]
    b_y = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        if EVEN:
            b_x = tl.load(p_x + i_k).to(tl.float32) / b_scale
        else:
            b_x = tl.load(p_x + i_k, mask=(i_k + o_k < K)[None, :], other=0.0)
            b_x = b_x.to(tl.float32) / b_scale
        b_x = tl.minimum(tl.maximum(b_x, -LARGEST), LARGEST).to(w.dtype.element_ty)
        b_product = b_w.to(tl.float32) * b_x.to(tl.float32)
        b_w = _step(w, r_n, i_k + BLOCK_K, K, BLOCK_K)
        b_y += tl.sum(tl.reshape(b_product, (BLOCK_N, BLOCK_K // 8, 8)), 2)
    return tl.sum(b_y, 1)


@triton.jit
def _vector_kernel(
    x, w, scale, bias, up_w, up_scale, up_bias, residual, y, N, K,
    LARGEST: tl.constexpr, LEAST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PAIRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_ALL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [N] = x [K] @ (w [N, K] * scale [N]).T, x rounded as `_quantize_rows_kernel` does, and what
    follows the product.

    Every program finds the scale of x anew, while its first bytes of w are on their way. PAIRED,
    the rows of the second weight are read after those of the first.
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r_n = tl.minimum(o_n, N - 1).to(tl.int64)
    b_w = _step(w, r_n, 0, K, BLOCK_K)
    o_all = tl.arange(0, BLOCK_ALL)
    b_all = tl.load(x + o_all, mask=o_all < K, other=0.0).to(tl.float32)
    b_scale = tl.maximum(tl.max(tl.abs(b_all), 0) / LARGEST, LEAST)
    b_y = _product(x, w, b_w, b_scale, r_n, K, LARGEST, EVEN, BLOCK_N, BLOCK_K)
    b_y = b_y * b_scale * tl.load(scale + r_n)
    if HAS_BIAS:
        b_y += tl.load(bias + r_n).to(tl.float32)
    b_up = b_y
    if PAIRED:
        b_w = _step(up_w, r_n, 0, K, BLOCK_K)
        b_up = _product(x, up_w, b_w, b_scale, r_n, K, LARGEST, EVEN, BLOCK_N, BLOCK_K)
        b_up = b_up * b_scale * tl.load(up_scale + r_n)
        if HAS_UP_BIAS:
            b_up += tl.load(up_bias + r_n).to(tl.float32)
    m_n = o_n < N
    dtype: tl.constexpr = y.dtype.element_ty
    b_y = finished(b_y, b_up, residual + o_n, m_n, dtype, ACTIVATION, PAIRED, HAS_RESIDUAL)
    tl.store(y + o_n, b_y, mask=m_n)


class Vector(NamedTuple):
    """How the product of one row is cut: rows of the weight, and bytes of each, in a step."""

    block_n: int
    block_k: int
    warps: int = 4


LONGEST = 16384
"""Elements of x that `one_row` holds in registers."""


def one_row(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    chosen: Vector | None = None,
    after: Epilogue = PLAIN,
) -> Tensor:
    """As the reference, for one row of up to LONGEST elements, in one launch.

    On an H100 1.66, 1.55 and 1.75 times cuBLAS's speed in bf16 at 4096 x 4096, 4096 x 14336 and
    14336 x 4096; `benchmarks/linear.py --sweep fp8` compares others.
    """
    out_features, in_features = weight.shape
    block_k = min(1024, triton.next_power_of_2(max(in_features, 16)))
    v = chosen or Vector(4 if in_features <= 8192 else 8, block_k)
    y = x.new_empty((*x.shape[:-1], out_features))
    after = contiguous_epilogue(after)
    residual, up = after.residual, after.up or (None, None, None)
    _vector_kernel[(triton.cdiv(out_features, v.block_n),)](
        x.contiguous(), weight.contiguous(), scale.contiguous(), contiguous(bias), *up,
        y if residual is None else residual, y, out_features,
        in_features, LARGEST=LARGEST, LEAST=LEAST, HAS_BIAS=bias is not None,
        HAS_UP_BIAS=up[2] is not None, ACTIVATION=after.activation, PAIRED=after.up is not None,
        HAS_RESIDUAL=residual is not None, EVEN=in_features % v.block_k == 0,
        BLOCK_ALL=triton.next_power_of_2(in_features),
        BLOCK_N=v.block_n, BLOCK_K=v.block_k, num_warps=v.warps,
    )  # fmt: skip
    return y


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, after: Epilogue = PLAIN
) -> Tensor:
    """As the reference, for up to 16 rows of x, on devices that have e4m3."""
    rows, own = quantize_rows(x.reshape(-1, x.shape[-1]), starts=True)
    y = x.new_empty((*x.shape[:-1], len(weight)))
    scales, waits = (own, scale.contiguous()), Chain(waits=True)
    after = contiguous_epilogue(after)
    other = None
    if after.up is not None:
        up, up_scale, up_bias = after.up
        other, after = Other(up, up_bias, rows, up_scale), after._replace(up=None)
    return few_rows.linear(
        rows, weight.contiguous(), contiguous(bias), y, waits, scales, after=after, other=other
    )
