"""How one block of new tokens becomes what a cache stores: the bytes of
`fxopt.kernels.kv_attention.packing`, from the ring and what a call brings."""

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.kernels.kv_attention import packing

LARGEST = tl.constexpr(packing.LARGEST)


@triton.jit
def _bfloat16_below(x):
    """The bfloat16 at or below each float32, by its bits, as float32."""
    b_bits = x.to(tl.int32, bitcast=True)
    b_cut = b_bits - (b_bits & 0xFFFF)
    b_down = tl.where((b_cut == b_bits) | (b_bits >= 0), b_cut, b_cut + 0x10000)
    return b_down.to(tl.float32, bitcast=True)


@triton.jit
def _affine(b_low, b_high, LEVELS: tl.constexpr):
    """(scale, zero) of ranges; (0, 0) where nothing is valid."""
    some = b_low <= b_high
    b_low = tl.where(some, b_low, 0.0)
    b_high = tl.where(some, b_high, 0.0)
    b_levels = tl.zeros_like(b_low) + LEVELS
    b_zero = _bfloat16_below(b_low)
    b_scale = -_bfloat16_below(tl.div_rn(b_zero, b_levels) - tl.div_rn(b_high, b_levels))
    return b_scale, b_zero


@triton.jit
def _load_tokens(ring, new, i_bh, p, m_t, channels, m_channels, fresh, RING, N, D: tl.constexpr):
    """Tokens at positions `p` from the sink's end; those from `fresh` on are new."""
    m_new = m_t & (p >= fresh)
    m_old = m_t & (p < fresh)
    o_old = (i_bh * RING + p % tl.maximum(RING, 1))[:, None] * D + channels[None, :]
    o_new = (i_bh * N + p - fresh)[:, None] * D + channels[None, :]
    b_old = tl.load(ring + o_old, mask=m_old[:, None] & m_channels[None, :], other=0.0)
    b_new = tl.load(new + o_new, mask=m_new[:, None] & m_channels[None, :], other=0.0)
    return tl.where(m_new[:, None], b_new, b_old)


@triton.jit
def _due(o_t, low, end, rank, HAS_RANK: tl.constexpr):
    """(position, whether there is a token, whether it counts) of a block's slots `o_t`."""
    p = low + o_t
    m_t = p < end
    m_valid = m_t
    if HAS_RANK:
        m_valid = m_t & (tl.load(rank + p, mask=m_t, other=0) != 0)
    return p, m_t, m_valid


@triton.jit
def _code(b_x, b_scale, b_zero, LEVELS: tl.constexpr):
    """The integers nearest to (x - zero) / scale."""
    b_y = tl.div_rn(b_x - b_zero, tl.where(b_scale > 0, b_scale, 1.0))
    b_y = tl.minimum(tl.maximum(b_y, 0.0), LEVELS)
    # Adding 1.5 * 2 ** 23 rounds to the nearest integer, halves to even.
    return ((b_y + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def copy_block(
    out, ring, new, i_bh, i_block, low, end, fresh, RING, N,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of a side that has 16 bits."""
    o_t, o_d = tl.arange(0, GROUP), tl.arange(0, BLOCK_D)
    b_x = _load_tokens(ring, new, i_bh, low + o_t, low + o_t < end, o_d, o_d < D, fresh, RING, N, D)
    p_out = out + (i_block * GROUP + o_t)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_x, mask=(o_d < D)[None, :] & (o_t < GROUP)[:, None])


@triton.jit
def pack_keys(
    packed, scale, zero, ring, new, i_bh, i_block, low, end, rank, fresh, RING, N,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, HAS_RANK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A scale per channel over the tokens; bytes along the channels."""
    PLANES: tl.constexpr = 8 // BITS
    W: tl.constexpr = D // PLANES
    LEVELS: tl.constexpr = (1 << BITS) - 1
    o_t, o_w = tl.arange(0, GROUP), tl.arange(0, BLOCK_W)
    m_w = o_w < W
    p, m_t, m_valid = _due(o_t, low, end, rank, HAS_RANK)
    m_x = m_valid[:, None] & m_w[None, :]
    b_byte = tl.zeros((GROUP, BLOCK_W), tl.int32)
    for i_p in tl.static_range(PLANES):
        o_c = i_p * W + o_w
        b_x = _load_tokens(ring, new, i_bh, p, m_t, o_c, m_w, fresh, RING, N, D).to(tl.float32)
        b_low = tl.min(tl.where(m_x, b_x, float("inf")), 0)
        b_high = tl.max(tl.where(m_x, b_x, -float("inf")), 0)
        b_scale, b_zero = _affine(b_low, b_high, LEVELS)
        tl.store(scale + i_block * D + o_c, b_scale.to(scale.dtype.element_ty), mask=m_w)
        tl.store(zero + i_block * D + o_c, b_zero.to(zero.dtype.element_ty), mask=m_w)
        b_code = _code(b_x, b_scale[None, :] + b_x * 0, b_zero[None, :] + b_x * 0, LEVELS)
        b_byte += tl.where(m_x, b_code, 0) << (i_p * BITS)
    p_out = packed + (i_block * GROUP + o_t)[:, None] * W + o_w[None, :]
    tl.store(p_out, b_byte.to(tl.uint8), mask=m_w[None, :] & (o_t < GROUP)[:, None])


@triton.jit
def pack_values(
    packed, scale, zero, ring, new, i_bh, i_block, low, end, rank, fresh, RING, N,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, HAS_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A scale per token over the channels; bytes along the tokens."""
    PLANES: tl.constexpr = 8 // BITS
    W: tl.constexpr = GROUP // PLANES
    LEVELS: tl.constexpr = (1 << BITS) - 1
    o_w, o_d = tl.arange(0, W), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_byte = tl.zeros((W, BLOCK_D), tl.int32)
    for i_p in tl.static_range(PLANES):
        o_t = i_p * W + o_w
        p, m_t, m_valid = _due(o_t, low, end, rank, HAS_RANK)
        m_x = m_valid[:, None] & m_d[None, :]
        b_x = _load_tokens(ring, new, i_bh, p, m_t, o_d, m_d, fresh, RING, N, D).to(tl.float32)
        b_low = tl.min(tl.where(m_x, b_x, float("inf")), 1)
        b_high = tl.max(tl.where(m_x, b_x, -float("inf")), 1)
        b_scale, b_zero = _affine(b_low, b_high, LEVELS)
        tl.store(scale + i_block * GROUP + o_t, b_scale.to(scale.dtype.element_ty))
        tl.store(zero + i_block * GROUP + o_t, b_zero.to(zero.dtype.element_ty))
        b_code = _code(b_x, b_scale[:, None] + b_x * 0, b_zero[:, None] + b_x * 0, LEVELS)
        b_byte += tl.where(m_x, b_code, 0) << (i_p * BITS)
    p_out = packed + (i_block * D + o_d)[None, :] * W + o_w[:, None]
    tl.store(p_out, b_byte.to(tl.uint8), mask=m_d[None, :] & (o_w < W)[:, None])


@triton.jit
def _float8(b_x):
    """The nearest e4m3 numbers to float32 numbers of up to 448, as float32; the interpreter's cast
    is exact for no others. They are 2 ** -3 of the power of two below them apart, or 2 ** -9."""
    b_power = (b_x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    b_round = tl.maximum(b_power, 0.015625) * 1572864.0  # 1.5 * 2 ** 23 * 2 ** -3
    return (b_x + b_round) - b_round


@triton.jit
def pack_float8(
    codes, scale, zero, ring, new, i_bh, i_block, low, end, rank, fresh, RING, N,
    D: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, HAS_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys about the middle of each channel, row by row; values about 0, channel by channel."""
    AXIS: tl.constexpr = 0 if KEYS else 1
    o_t, o_d = tl.arange(0, GROUP)[:, None], tl.arange(0, BLOCK_D)[None, :]
    p, m_t, m_valid = _due(tl.arange(0, GROUP), low, end, rank, HAS_RANK)
    m_d = o_d < D
    m_x = m_valid[:, None] & m_d
    o_c = tl.arange(0, BLOCK_D)
    b_x = _load_tokens(ring, new, i_bh, p, m_t, o_c, o_c < D, fresh, RING, N, D).to(tl.float32)
    b_low = tl.min(tl.where(m_x, b_x, float("inf")), AXIS, keep_dims=True)
    b_high = tl.max(tl.where(m_x, b_x, -float("inf")), AXIS, keep_dims=True)
    some = b_low <= b_high
    b_low, b_high = tl.where(some, b_low, 0.0), tl.where(some, b_high, 0.0)
    b_zero = tl.zeros_like(b_low)
    p_scale, m_scale = scale + i_block * GROUP + o_t, o_t < GROUP
    if KEYS:
        b_zero = _bfloat16_below(b_low / 2 + b_high / 2)
        p_scale, m_scale = scale + i_block * D + o_d, m_d
        tl.store(zero + i_block * D + o_d, b_zero.to(zero.dtype.element_ty), mask=m_d)
    b_top = tl.maximum(b_high - b_zero, b_zero - b_low)
    b_scale = -_bfloat16_below(-tl.div_rn(b_top, tl.zeros_like(b_top) + LARGEST))
    tl.store(p_scale, b_scale.to(scale.dtype.element_ty), mask=m_scale)
    b_y = tl.div_rn(b_x - b_zero, tl.where(b_scale > 0, b_scale, 1.0) + b_x * 0)
    b_y = _float8(tl.minimum(tl.maximum(tl.where(m_x, b_y, 0.0), -LARGEST), LARGEST))
    p_out = codes + (i_block * GROUP + o_t) * D + o_d
    if not KEYS:
        p_out = codes + (i_block * D + o_d) * GROUP + o_t
    tl.store(p_out, b_y.to(codes.dtype.element_ty), mask=m_d & (o_t < GROUP))
