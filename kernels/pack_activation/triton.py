"""One pass over memory each way: a program packs or unpacks a few groups."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .reference import LEAST as _LEAST

TILE = 4096
"""Values of one program: what keeps enough loads in flight with 4 warps."""

LEAST = tl.constexpr(_LEAST)
# Adding 1.5 * 2 ** 23 rounds to the nearest integer, ties to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _magnitude(b_x):
    """|x|, 0 for -inf, +inf for +inf and NaN (which the device's maximum would pass over)."""
    b_a = tl.where(b_x == -float("inf"), 0.0, tl.abs(b_x))
    return tl.where(b_x != b_x, float("inf"), b_a)


@triton.jit
def _codes(b_x, b_rate, LEVELS: tl.constexpr):
    """Integers from 1 to 2 * LEVELS + 1, and 0 for -inf."""
    b_finite = tl.where(_magnitude(b_x) < float("inf"), b_x, 0.0)
    b_finite = tl.where(b_x == -float("inf"), 0.0, b_finite)
    b_code = ((b_finite * b_rate[:, None] + _ROUND) - _ROUND).to(tl.int32) + (LEVELS + 1)
    return tl.where(b_x == -float("inf"), 0, b_code)


@triton.jit
def _pack_kernel(
    x, codes, top, size, groups, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    PLANES: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = GROUP // PLANES
    LEVELS: tl.constexpr = 2 ** (BITS - 1) - 1
    o_g = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_w = tl.arange(0, WIDTH)
    m_g = o_g < groups
    o_x = o_g[:, None] * GROUP + o_w[None, :]
    b_low = tl.load(x + o_x, mask=o_x < size, other=0.0).to(tl.float32)
    b_top = tl.max(_magnitude(b_low), 1)
    if PLANES == 2:
        b_high = tl.load(x + o_x + WIDTH, mask=o_x + WIDTH < size, other=0.0).to(tl.float32)
        b_top = tl.maximum(b_top, tl.max(_magnitude(b_high), 1))
    b_top = tl.where(b_top < LEAST, 0.0, b_top)
    usable = (b_top > 0.0) & (b_top < float("inf"))
    b_rate = tl.where(usable, tl.div_rn(LEVELS + 0.0, tl.where(usable, b_top, 1.0)), 0.0)
    b_code = _codes(b_low, b_rate, LEVELS)
    if PLANES == 2:
        b_code += _codes(b_high, b_rate, LEVELS) * 16
    o_c = o_g[:, None] * WIDTH + o_w[None, :]
    tl.store(codes + o_c, b_code.to(tl.uint8), mask=m_g[:, None])
    b_top = tl.where(b_top < float("inf"), b_top, float("nan"))
    tl.store(top + o_g, b_top.to(top.dtype.element_ty), mask=m_g)


@triton.jit
def _restored(b_code, b_top, LEVELS: tl.constexpr):
    b_share = (b_code - (LEVELS + 1)).to(tl.float32) * (1.0 / LEVELS)
    return tl.where(b_code == 0, -float("inf"), b_share * b_top[:, None])


@triton.jit
def _unpack_kernel(
    codes, top, out, size, groups, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    PLANES: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = GROUP // PLANES
    LEVELS: tl.constexpr = 2 ** (BITS - 1) - 1
    o_g = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_w = tl.arange(0, WIDTH)
    m_g = o_g < groups
    b_top = tl.load(top + o_g, mask=m_g, other=0.0).to(tl.float32)
    o_c = o_g[:, None] * WIDTH + o_w[None, :]
    b_byte = tl.load(codes + o_c, mask=m_g[:, None], other=1).to(tl.int32)
    for i_p in tl.static_range(PLANES):
        b_code = b_byte
        if PLANES == 2:
            b_code = (b_byte >> (4 * i_p)) & 15
        o_x = o_g[:, None] * GROUP + i_p * WIDTH + o_w[None, :]
        b_x = _restored(b_code, b_top, LEVELS)
        tl.store(out + o_x, b_x.to(out.dtype.element_ty), mask=o_x < size)


def pack(flat: Tensor, codes: Tensor, top: Tensor, bits: int, group_size: int) -> None:
    """Write codes and magnitudes of `flat` [values], in float32 arithmetic."""
    _launch(_pack_kernel, (flat, codes, top), flat, top, bits, group_size)


def unpack(codes: Tensor, top: Tensor, flat: Tensor, bits: int, group_size: int) -> None:
    """Write the values behind codes and magnitudes to `flat` [values]."""
    _launch(
        _unpack_kernel, (codes.contiguous(), top.contiguous(), flat), flat, top, bits, group_size
    )


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    flat: Tensor,
    top: Tensor,
    bits: int,
    group_size: int,
) -> None:
    rows = TILE // group_size
    if len(top):
        kernel[(triton.cdiv(len(top), rows),)](
            *tensors, flat.numel(), len(top), BITS=bits, GROUP=group_size, ROWS=rows,
            enable_fp_fusion=False,  # a product is rounded before `_ROUND` is added to it
        )  # fmt: skip
