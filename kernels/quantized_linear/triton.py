"""Triton kernels of `quantized_linear`: the fused product, and dequantisation alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.common import DOT_UPCAST, dot, nibble, tile


@triton.jit
def _quantized_linear_kernel(
    x, packed, scale, zero, bias, y, M, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS
    PLANE: tl.constexpr = GROUP // PLANES
    o_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N
    groups = K // GROUP
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_g in range(groups):
        b_zero = tl.load(zero + o_n * groups + i_g, mask=m_n, other=0.0).to(tl.float32)
        b_scale = tl.load(scale + o_n * groups + i_g, mask=m_n, other=0.0).to(tl.float32)
        b_group = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_k in range(0, PLANE, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = o_k < PLANE
            p_packed = packed + o_n[None, :] * (K // PLANES) + (i_g * PLANE + o_k)[:, None]
            b_byte = tl.load(p_packed, mask=m_k[:, None] & m_n[None, :], other=0)
            for i_p in tl.static_range(PLANES):
                p_x = x + o_m[:, None] * K + (i_g * GROUP + i_p * PLANE + o_k)[None, :]
                b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
                b_code = b_byte
                if BITS == 4:
                    b_code = nibble(b_byte, i_p)
                # Integers up to 255 are exact in every dtype, so the scale can wait for the sum.
                b_w = (b_code.to(tl.float32) - b_zero[None, :]).to(b_x.dtype)
                b_group = dot(b_x, b_w, b_group, UPCAST)
        b_y += b_group * b_scale[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = y + o_m[:, None] * N + o_n[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _dequantize_kernel(
    packed, scale, zero, w, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS
    PLANE: tl.constexpr = GROUP // PLANES
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_g = tl.program_id(1)
    m_n = o_n < N
    groups = K // GROUP
    b_zero = tl.load(zero + o_n * groups + i_g, mask=m_n, other=0.0).to(tl.float32)
    b_scale = tl.load(scale + o_n * groups + i_g, mask=m_n, other=0.0).to(tl.float32)
    for i_k in range(0, PLANE, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        mask = m_n[:, None] & (o_k < PLANE)[None, :]
        p_packed = packed + o_n[:, None] * (K // PLANES) + (i_g * PLANE + o_k)[None, :]
        b_byte = tl.load(p_packed, mask=mask, other=0)
        for i_p in tl.static_range(PLANES):
            b_code = b_byte
            if BITS == 4:
                b_code = nibble(b_byte, i_p)
            b_w = (b_code.to(tl.float32) - b_zero[:, None]) * b_scale[:, None]
            p_w = w + o_n[:, None] * K + (i_g * GROUP + i_p * PLANE + o_k)[None, :]
            tl.store(p_w, b_w.to(w.dtype.element_ty), mask=mask)


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """The weight [out, in] in the scale's dtype; arguments as in the reference."""
    out_features, in_features = packed.shape[0], packed.shape[1] * 8 // bits
    packed, scale, zero = packed.contiguous(), scale.contiguous(), zero.contiguous()
    weight = torch.empty((out_features, in_features), dtype=scale.dtype, device=scale.device)
    block_n = 32
    grid = (triton.cdiv(out_features, block_n), in_features // group_size)
    _dequantize_kernel[grid](
        packed, scale, zero, weight, out_features, in_features,
        BITS=bits, GROUP=group_size, BLOCK_N=block_n, BLOCK_K=tile(group_size * bits // 8),
    )  # fmt: skip
    return weight


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """As the reference, without the dequantised weight; float32 accumulation."""
    out_features, in_features = packed.shape[0], packed.shape[1] * 8 // bits
    packed, scale, zero = packed.contiguous(), scale.contiguous(), zero.contiguous()
    rows = x.reshape(-1, in_features).contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    if y.numel() == 0:
        return y
    block_m, block_n = tile(len(rows)), 32
    grid = (triton.cdiv(out_features, block_n), triton.cdiv(len(rows), block_m))
    _quantized_linear_kernel[grid](
        rows, packed, scale, zero, bias, y, len(rows), out_features, in_features,
        BITS=bits, GROUP=group_size, HAS_BIAS=bias is not None, UPCAST=DOT_UPCAST,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=tile(group_size * bits // 8),
    )  # fmt: skip
    return y
