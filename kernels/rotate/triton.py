"""Rotary position embedding in one kernel, which also lays its result out for attention."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.common import tile


@triton.jit
def _product(a, b, WIDE: tl.constexpr):
    """Rounded to the dtype of `a`, as a call of its own rounds."""
    return (a.to(WIDE) * b.to(WIDE)).to(a.dtype)


@triton.jit
def _sum(a, b, WIDE: tl.constexpr):
    return (a.to(WIDE) + b.to(WIDE)).to(a.dtype)


@triton.jit
def _rotate_kernel(
    x, cos, sin, out, N, x_b, x_h, x_n, cos_b, cos_n, sin_b, sin_n,
    H: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: out [B, H, N, 2 * HALF]."""
    i_b, i_n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    o_h, o_d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    m_d = o_d < HALF
    m_x = (o_h < H)[:, None] & m_d[None, :]
    p_x = x + i_b * x_b + i_n.to(tl.int64) * x_n + o_h[:, None] * x_h + o_d[None, :]
    p_cos = cos + i_b * cos_b + i_n * cos_n + o_d
    p_sin = sin + i_b * sin_b + i_n * sin_n + o_d
    b_low, b_high = tl.load(p_x, mask=m_x), tl.load(p_x + HALF, mask=m_x)
    c_low, c_high = tl.load(p_cos, mask=m_d), tl.load(p_cos + HALF, mask=m_d)
    s_low, s_high = tl.load(p_sin, mask=m_d), tl.load(p_sin + HALF, mask=m_d)
    turned_low = _product(-b_high, s_low[None, :], WIDE)
    turned_high = _product(b_low, s_high[None, :], WIDE)
    p_out = out + ((i_b * H + o_h[:, None]) * N + i_n) * 2 * HALF + o_d[None, :]
    tl.store(p_out, _sum(_product(b_low, c_low[None, :], WIDE), turned_low, WIDE), mask=m_x)
    high = _sum(_product(b_high, c_high[None, :], WIDE), turned_high, WIDE)
    tl.store(p_out + HALF, high, mask=m_x)


def rotate_forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the reference, to the bit, and contiguous; channels of x, cos and sin lie side by side."""
    batch, heads, length, dim = x.shape
    out = x.new_empty(x.shape)
    cos, sin = (t.expand(batch, 1, length, dim) for t in (cos, sin))
    block = tile(heads, least=1, most=16)
    _rotate_kernel[(batch * length, triton.cdiv(heads, block))](
        x, cos, sin, out, length, *x.stride()[:3],
        cos.stride(0), cos.stride(2), sin.stride(0), sin.stride(2),
        H=heads, HALF=dim // 2, WIDE=tl.float64 if x.itemsize == 8 else tl.float32,
        BLOCK_H=block, BLOCK_D=triton.next_power_of_2(dim // 2),
        enable_fp_fusion=False,  # a product that is not rounded before the sum is another number
    )  # fmt: skip
    return out
