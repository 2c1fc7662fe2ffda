"""Stored codes as tensor cores multiply them, and what they are multiplied with in two parts.

    integers in int8          x ≈ (high * 254 + residual) * step
    e4m3 numbers in float16   x ≈ (high * 2048 + residual) * step

float16 holds every e4m3 number. Tiles of so few columns are multiplied by `mma.sync`, which for
e4m3 operands is the same conversions and products on Hopper (sm_90), as compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding 1.5 * 2 ** 23 rounds to the nearest integer, which the low bits then hold.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def codes(b_stored, PLANE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """What a tensor core multiplies: plane PLANE of packed integers, or e4m3 numbers as float16."""
    if b_stored.dtype.is_fp8():
        return b_stored.to(tl.float16)
    else:  # what follows a return is compiled as well
        return _integers(b_stored, PLANE, BITS, ASM)


@triton.jit
def _integers(b_byte, PLANE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Plane PLANE of packed integers as int8; those of 8 bits less 128.

    Four bytes at a time: per byte it is four times the instructions.
    """
    if not ASM:
        if BITS == 8:
            return (b_byte ^ 128).to(tl.int8, bitcast=True)
        return ((b_byte >> (PLANE * BITS)) & ((1 << BITS) - 1)).to(tl.int8)
    if BITS == 8:
        asm: tl.constexpr = "xor.b32 $0, $1, 0x80808080;"
    elif BITS == 4 and PLANE == 0:
        asm: tl.constexpr = "and.b32 $0, $1, 0x0f0f0f0f;"
    elif BITS == 4:
        asm: tl.constexpr = "{.reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f;}"
    elif PLANE == 0:
        asm: tl.constexpr = "and.b32 $0, $1, 0x03030303;"
    elif PLANE == 1:
        asm: tl.constexpr = "{.reg .b32 t; shr.u32 t, $1, 2; and.b32 $0, t, 0x03030303;}"
    elif PLANE == 2:
        asm: tl.constexpr = "{.reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x03030303;}"
    else:
        asm: tl.constexpr = "{.reg .b32 t; shr.u32 t, $1, 6; and.b32 $0, t, 0x03030303;}"
    return tl.inline_asm_elementwise(asm, "=r,r", [b_byte], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def parts(b_x, b_top, FLOAT: tl.constexpr):
    """[..., 2], high part and residual of `b_x`, whose magnitudes are at most `b_top`: float16
    for e4m3 numbers, int8 for integers."""
    if FLOAT:
        b_y = b_x * (1 / tl.maximum(b_top, 1e-30))
        b_high = b_y.to(tl.float16)
        return tl.join(b_high, ((b_y - b_high.to(tl.float32)) * 2048).to(tl.float16))
    else:
        b_y = b_x * (127 / tl.maximum(b_top, 1e-30))
        b_high = b_y + _ROUND
        b_rest = (b_y - (b_high - _ROUND)) * 254 + _ROUND
        return tl.join(b_high, b_rest).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def step_of(b_top, FLOAT: tl.constexpr):
    """What a residual of 1 stands for."""
    return b_top * ((1 / 2048) if FLOAT else (1 / (127 * 254)))


@triton.jit
def joined(b_x, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """float32 [SIZE, ROWS] of sums [SIZE, 2 * ROWS] of high parts and residuals."""
    b_weight = tl.where(tl.arange(0, 2) == 0, 254 if b_x.dtype == tl.int32 else 2048, 1)
    b_x = tl.reshape(b_x, (SIZE, ROWS, 2)) * b_weight[None, None, :]
    return tl.sum(b_x, 2).to(tl.float32)


@triton.jit
def query_plane(b_x, PLANE: tl.constexpr, PLANES: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """[W, 2 * R]: plane PLANE of [PLANES, R, W, 2]. The sum selects, and costs nothing."""
    o_p = tl.arange(0, PLANES)
    b_x = tl.where((o_p == PLANE)[:, None, None, None], b_x, 0)
    return tl.reshape(tl.permute(tl.sum(b_x, 0).to(b_x.dtype), (1, 0, 2)), (W, 2 * R))


@triton.jit
def weight_plane(b_x, PLANE: tl.constexpr, PLANES: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """[W, 2 * R]: plane PLANE of [PLANES * W, 2 * R]."""
    o_p = tl.arange(0, PLANES)
    b_x = tl.reshape(b_x, (PLANES, W, 2 * R))
    return tl.sum(tl.where((o_p == PLANE)[:, None, None], b_x, 0), 0).to(b_x.dtype)


@triton.jit
def scattered(b_x, GROUP: tl.constexpr):
    """Numbers of tokens, in the order in which `kv_int8` has them in the rows of a tile."""
    return tl.reshape(tl.permute(tl.reshape(b_x, (GROUP // 32, 8, 4)), (0, 2, 1)), (GROUP,))


@triton.jit
def gathered(b_x, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a tile in the order of tokens."""
    b_x = tl.permute(tl.reshape(b_x, (GROUP // 32, 4, 8, COLUMNS)), (0, 2, 1, 3))
    return tl.reshape(b_x, (GROUP, COLUMNS))
