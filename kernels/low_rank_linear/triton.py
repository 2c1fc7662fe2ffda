"""Triton kernels of `low_rank_linear` for few rows: both products read each factor once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.common import DOT_UPCAST, dot, tile

# The rank alone fills few multiprocessors, so the inputs are split as well.
PROGRAMS = 128


@triton.jit
def _down_kernel(
    x, down, partial, M, R, K, CHUNK,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_s = tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M).to(tl.int64)
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m = o_m < M
    m_r = o_r < R
    b_z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i_k in range(0, CHUNK, BLOCK_K):
        o_k = i_s * CHUNK + i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        p_x = x + o_m[:, None] * K + o_k[None, :]
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
        p_down = down + o_r[None, :] * K + o_k[:, None]
        b_down = tl.load(p_down, mask=m_k[:, None] & m_r[None, :], other=0.0)
        b_z = dot(b_x, b_down, b_z, UPCAST)
    p_z = partial + (i_s * M + o_m[:, None]) * R + o_r[None, :]
    tl.store(p_z, b_z, mask=m_m[:, None] & m_r[None, :])


@triton.jit
def _up_kernel(
    partial, up, bias, y, M, N, R, SPLITS,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    o_m = tl.arange(0, BLOCK_M).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_r in range(0, R, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        b_z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i_s in range(SPLITS):
            p_z = partial + (i_s * M + o_m[:, None]) * R + o_r[None, :]
            b_z += tl.load(p_z, mask=m_m[:, None] & m_r[None, :], other=0.0)
        p_up = up + o_n[None, :] * R + o_r[:, None]
        b_up = tl.load(p_up, mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_y = dot(b_z.to(b_up.dtype), b_up, b_y, UPCAST)
    if HAS_BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = y + o_m[:, None] * N + o_n[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference, for up to 64 rows of x.

    Partial sums of the first product lie in a float32 workspace [splits, rows, rank] and are
    added in a fixed order, so results repeat exactly.
    """
    rank, in_features = down.shape
    out_features = up.shape[0]
    rows = x.reshape(-1, in_features).contiguous()
    if len(rows) > 64:
        raise ValueError(f"low_rank_linear: at most 64 rows in this kernel, got {len(rows)}")
    y = x.new_empty((*x.shape[:-1], out_features))
    if y.numel() == 0:
        return y
    down, up = down.contiguous(), up.contiguous()
    block_m, block_r, block_k = tile(len(rows)), tile(rank, most=32), 64
    columns = triton.cdiv(rank, block_r)
    chunk = block_k * triton.cdiv(in_features, block_k * max(1, PROGRAMS // columns))
    splits = triton.cdiv(in_features, chunk)
    partial = torch.empty((splits, len(rows), rank), dtype=torch.float32, device=x.device)
    _down_kernel[(columns, splits)](
        rows, down, partial, len(rows), rank, in_features, chunk,
        UPCAST=DOT_UPCAST, BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_K=block_k,
    )  # fmt: skip
    _up_kernel[(triton.cdiv(out_features, 32),)](
        partial, up, bias, y, len(rows), out_features, rank, splits,
        HAS_BIAS=bias is not None, UPCAST=DOT_UPCAST,
        BLOCK_M=block_m, BLOCK_N=32, BLOCK_R=block_r,
    )  # fmt: skip
    return y
