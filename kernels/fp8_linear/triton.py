"""Triton kernel of `fp8_linear`: rows and their scales in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import DTYPE, LARGEST, LEAST


@triton.jit
def _quantize_rows_kernel(
    x, y, scale, K, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK_K: tl.constexpr
):
    i_m = tl.program_id(0).to(tl.int64)
    b_most = tl.zeros((BLOCK_K,), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_x = tl.load(x + i_m * K + o_k, mask=o_k < K, other=0.0)
        b_most = tl.maximum(b_most, tl.abs(b_x.to(tl.float32)))
    b_scale = tl.maximum(tl.max(b_most, 0) / LARGEST, LEAST)
    tl.store(scale + i_m, b_scale)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_x = tl.load(x + i_m * K + o_k, mask=o_k < K, other=0.0).to(tl.float32) / b_scale
        b_x = tl.minimum(tl.maximum(b_x, -LARGEST), LARGEST)
        tl.store(y + i_m * K + o_k, b_x.to(y.dtype.element_ty), mask=o_k < K)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, in] as e4m3 [rows, in] and the scale [rows, 1] of each row, in float32."""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=DTYPE)
    scale = torch.empty((len(x), 1), dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(x.shape[1]), 4096)
    _quantize_rows_kernel[(len(x),)](
        x, y, scale, x.shape[1], LARGEST=LARGEST, LEAST=LEAST, BLOCK_K=block
    )
    return y, scale
