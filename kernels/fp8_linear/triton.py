"""Triton kernels of `fp8_linear`: rows and their scales in one launch, products of few rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton import few_rows
from fxopt.kernels._triton.common import overlaps
from fxopt.kernels._triton.few_rows import Chain
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


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference, for up to 16 rows of x, on devices that have e4m3."""
    rows, own = quantize_rows(x.reshape(-1, x.shape[-1]), starts=True)
    y = x.new_empty((*x.shape[:-1], len(weight)))
    scales = own, scale.contiguous()
    return few_rows.linear(rows, weight.contiguous(), bias, y, Chain(waits=True), scales)
