"""One program for an expert and a tile of its outputs: it walks over the rows of that expert.

How many rows an expert has is read on the device, so that a CUDA graph can replay the call. The
weight of an expert without rows is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.codes import centred
from fxopt.kernels._triton.common import ASM, DOT_UPCAST, dot, stages_that_fit, tile

BLOCK_N = 64


@triton.jit(do_not_specialize=["M"])
def _experts_kernel(
    x, packed, scale, zero, offsets, out, M, N, K, WIDTH, GROUPS, EXPERTS,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m] = x[m] @ weight[expert of m].T; x [M, K], packed [EXPERTS, N, WIDTH], scale and zero
    [EXPERTS, N, GROUPS]. The program after the last expert writes zeros to the rows left over."""
    PLANES: tl.constexpr = 8 // BITS
    PLANE: tl.constexpr = GROUP // PLANES
    STEPS: tl.constexpr = (PLANE + BLOCK_K - 1) // BLOCK_K
    RAGGED: tl.constexpr = PLANE % BLOCK_K != 0
    i_e = tl.program_id(1)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    start = tl.load(offsets + i_e - 1, mask=i_e > 0, other=0).to(tl.int32)
    end = tl.load(offsets + i_e, mask=i_e < EXPERTS, other=M).to(tl.int32)
    # Rows of the weight beyond the last read the last one: masks would cost more.
    expert = tl.minimum(i_e, EXPERTS - 1).to(tl.int64)
    r_n = expert * N + tl.minimum(o_n, N - 1).to(tl.int64)
    p_packed = packed + r_n[None, :] * WIDTH + o_k[:, None]
    p_scale, p_zero = scale + r_n * GROUPS, zero + r_n * GROUPS
    groups = tl.where(i_e < EXPERTS, GROUPS, 0)
    for first in range(start, end, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        m_m = o_m < end
        p_x = x + o_m.to(tl.int64)[:, None] * K + o_k[None, :]
        b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_g in range(0, groups):
            b_zero, b_scale = tl.load(p_zero + i_g)[None, :], tl.load(p_scale + i_g)[None, :]
            b_step = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i_s in tl.static_range(STEPS):
                m_k = i_s * BLOCK_K + o_k < PLANE
                p_byte = p_packed + i_g * PLANE + i_s * BLOCK_K
                m_byte = m_k[:, None] if RAGGED else None
                b_byte = tl.load(p_byte, mask=m_byte, other=0 if RAGGED else None)
                for i_p in tl.static_range(PLANES):
                    m_x = m_m[:, None] & m_k[None, :]
                    p_step = p_x + i_g * GROUP + i_p * PLANE + i_s * BLOCK_K
                    b_x = tl.load(p_step, mask=m_x, other=0.0)
                    b_w = centred(b_byte, b_zero, b_x.dtype, BITS, i_p, ASM)
                    b_step = dot(b_x, b_w, b_step, UPCAST)
            b_y += b_step * b_scale.to(tl.float32)
        p_out = out + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        tl.store(p_out, b_y.to(out.dtype.element_ty), mask=m_m[:, None] & (o_n < N)[None, :])


def stages_of(
    block_m: int, block_k: int, bits: int, group_size: int, size: int, device: torch.device
) -> int:
    """Of the loop over groups, whose steps are all in one of its own; x has numbers of `size`."""
    codes, planes = BLOCK_N * block_k, 8 // bits
    steps = triton.cdiv(group_size // planes, block_k)
    x = block_m * block_k * planes * size
    return stages_that_fit(3, steps * x, steps * codes, codes * size, device)


def quantized_experts(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    """As the reference, without dequantised weights; float32 accumulation."""
    experts, out_features, width = packed.shape
    x, packed, offsets = x.contiguous(), packed.contiguous(), offsets.contiguous()
    scale, zero = scale.contiguous(), zero.contiguous()
    out = x.new_empty((len(x), out_features))
    if out.numel() == 0:
        return out
    block_m = tile(triton.cdiv(len(x), experts))
    block_k = tile(group_size * bits // 8)
    grid = (triton.cdiv(out_features, BLOCK_N), experts + 1)
    stages = stages_of(block_m, block_k, bits, group_size, x.itemsize, x.device)
    _experts_kernel[grid](
        x, packed, scale, zero, offsets, out, len(x), out_features, x.shape[1], width,
        scale.shape[2], experts, BITS=bits, GROUP=group_size, ASM=ASM, UPCAST=DOT_UPCAST,
        BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=block_k, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out
