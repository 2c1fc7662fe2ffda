"""One pass over memory each way: a program takes a few groups. The pieces are constants of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import GROUP

ROWS = 4
"""Groups of one program: 4,096 values keep enough loads in flight with 4 warps."""


@triton.jit
def _codes_kernel(
    x, codes, size, groups,
    BORDERS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = GROUP // 8
    o_g = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_w = tl.arange(0, WIDTH)
    m_g = (o_g < groups)[:, None]
    # byte p of each is plane p
    b_planes = tl.zeros((ROWS, WIDTH), tl.int32)
    for i_k in tl.static_range(8):
        o_x = o_g[:, None] * GROUP + i_k * WIDTH + o_w[None, :]
        b_x = tl.load(x + o_x, mask=o_x < size, other=0).to(tl.float32)
        b_code = tl.zeros((ROWS, WIDTH), tl.int32)
        for i_b in tl.static_range(len(BORDERS)):
            b_code += tl.where(b_x <= BORDERS[i_b], 0, 1)
        for i_p in tl.static_range(BITS):
            b_planes += ((b_code >> i_p) & 1) << (8 * i_p + i_k)
    for i_p in tl.static_range(BITS):
        o_c = (o_g[:, None] * BITS + i_p) * WIDTH + o_w[None, :]
        tl.store(codes + o_c, ((b_planes >> (8 * i_p)) & 255).to(tl.uint8), mask=m_g)


@triton.jit
def _times_kernel(
    gradient, codes, out, size, groups,
    LEVELS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = GROUP // 8
    o_g = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_w = tl.arange(0, WIDTH)
    m_g = (o_g < groups)[:, None]
    b_planes = tl.zeros((ROWS, WIDTH), tl.int32)
    for i_p in tl.static_range(BITS):
        o_c = (o_g[:, None] * BITS + i_p) * WIDTH + o_w[None, :]
        b_planes += tl.load(codes + o_c, mask=m_g, other=0).to(tl.int32) << (8 * i_p)
    for i_k in tl.static_range(8):
        b_code = tl.zeros((ROWS, WIDTH), tl.int32)
        for i_p in tl.static_range(BITS):
            b_code += ((b_planes >> (8 * i_p + i_k)) & 1) << i_p
        b_level = tl.full((ROWS, WIDTH), LEVELS[0], tl.float32)
        for i_l in tl.static_range(1, len(LEVELS)):
            b_level = tl.where(b_code >= i_l, LEVELS[i_l], b_level)
        o_x = o_g[:, None] * GROUP + i_k * WIDTH + o_w[None, :]
        b_g = tl.load(gradient + o_x, mask=o_x < size, other=0.0).to(tl.float32)
        tl.store(out + o_x, (b_g * b_level).to(out.dtype.element_ty), mask=o_x < size)


def codes(flat: Tensor, codes: Tensor, borders: Sequence[float], bits: int) -> None:
    """Write the codes of `flat` [values], compared in float32."""
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    if len(codes):
        _codes_kernel[(triton.cdiv(len(codes), ROWS),)](
            flat, codes, flat.numel(), len(codes),
            BORDERS=tuple(borders), BITS=bits, GROUP=GROUP, ROWS=ROWS,
        )  # fmt: skip


def times(flat: Tensor, codes: Tensor, out: Tensor, levels: Sequence[float], bits: int) -> None:
    """Write `flat` [values] times the levels of `codes` to `out` [values]."""
    if len(codes):
        _times_kernel[(triton.cdiv(len(codes), ROWS),)](
            flat, codes.contiguous(), out, flat.numel(), len(codes),
            LEVELS=tuple(levels), BITS=bits, GROUP=GROUP, ROWS=ROWS,
        )  # fmt: skip
