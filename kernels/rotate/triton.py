"""Rotary position embedding in one kernel, for queries and keys at once, with what mixes their
channels; the result is laid out for attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.common import DOT_UPCAST, dot, tile

# Rows of a tile where channels are mixed; more for so many rows, up to as many channels as do not
# spill then, as compiled for sm_90.
FEW_ROWS, MANY_ROWS, LONG, MOST_CHANNELS = 16, 64, 4096, 128


@triton.jit
def _product(a, b, WIDE: tl.constexpr):
    """Rounded to the dtype of `a`, as a call of its own rounds."""
    return (a.to(WIDE) * b.to(WIDE)).to(a.dtype)


@triton.jit
def _sum(a, b, WIDE: tl.constexpr):
    return (a.to(WIDE) + b.to(WIDE)).to(a.dtype)


@triton.jit
def _turned(
    b_low, b_high, cos, sin, o_t, o_d, m_x, N, cos_b, cos_n, sin_b, sin_n,
    HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Both halves of the channels of tokens `o_t` of the batch, turned by their angles."""
    i_b, i_n = o_t // N, o_t % N
    p_cos = cos + (i_b * cos_b + i_n * cos_n)[:, None] + o_d[None, :]
    p_sin = sin + (i_b * sin_b + i_n * sin_n)[:, None] + o_d[None, :]
    c_low, c_high = tl.load(p_cos, mask=m_x), tl.load(p_cos + HALF, mask=m_x)
    s_low, s_high = tl.load(p_sin, mask=m_x), tl.load(p_sin + HALF, mask=m_x)
    low = _sum(_product(b_low, c_low, WIDE), _product(-b_high, s_low, WIDE), WIDE)
    high = _sum(_product(b_high, c_high, WIDE), _product(b_low, s_high, WIDE), WIDE)
    return tl.where(m_x, low, 0.0), tl.where(m_x, high, 0.0)


@triton.jit
def _side(
    x, cos, sin, mix, places, out, i_p, tiles, rows, N, x_b, x_h, x_n, cos_b, cos_n, sin_b, sin_n,
    H, G: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The `i_p`-th tile of x [B, H, N, 2 * HALF]: rows of tokens and of G heads of each, which
    share a matrix of `mix`; out is contiguous."""
    D: tl.constexpr = 2 * HALF
    i_h = i_p // tiles
    o_r, o_d = i_p % tiles * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    o_t, o_h = (o_r // G).to(tl.int64), i_h * G + o_r % G
    i_b, i_n = o_t // N, o_t % N
    m_r = o_r < rows
    m_x = m_r[:, None] & (o_d < HALF)[None, :]
    p_x = x + (i_b * x_b + i_n * x_n + o_h * x_h)[:, None] + o_d[None, :]
    b_low, b_high = tl.load(p_x, mask=m_x, other=0.0), tl.load(p_x + HALF, mask=m_x, other=0.0)
    if cos is not None:
        b_low, b_high = _turned(
            b_low, b_high, cos, sin, o_t, o_d, m_x, N, cos_b, cos_n, sin_b, sin_n, HALF, WIDE
        )
    p_out = out + (((i_b * H + o_h) * N + i_n) * D)[:, None]
    place = i_h * 0 - 1
    if mix is not None:
        place = i_h
        if places is not None:
            place = tl.load(places + i_h)
    if place < 0:
        tl.store(p_out + o_d[None, :], b_low, mask=m_x)
        tl.store(p_out + HALF + o_d[None, :], b_high, mask=m_x)
    elif mix is not None:
        for i_e in tl.static_range(0, D, BLOCK_E):
            o_e = i_e + tl.arange(0, BLOCK_E)
            p_mix = mix + place * (D * D) + o_d[:, None] * D + o_e[None, :]
            m_mix = (o_d < HALF)[:, None] & (o_e < D)[None, :]
            b_y = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
            b_y = dot(b_low, tl.load(p_mix, mask=m_mix, other=0.0), b_y, UPCAST)
            b_y = dot(b_high, tl.load(p_mix + HALF * D, mask=m_mix, other=0.0), b_y, UPCAST)
            m_y = m_r[:, None] & (o_e < D)[None, :]
            tl.store(p_out + o_e[None, :], b_y.to(out.dtype.element_ty), mask=m_y)


@triton.jit
def _rotate_kernel(
    q, k, cos, sin, query_mix, key_mix, places, out_q, out_k, query_tiles, key_tiles,
    query_rows, key_rows, N, q_b, q_h, q_n, k_b, k_h, k_n, cos_b, cos_n, sin_b, sin_n,
    QUERY_PROGRAMS, H, KV, GQ: tl.constexpr, GK: tl.constexpr,
    HALF: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Tiles of the queries, then those of the keys, if there are any."""
    i_p = tl.program_id(0)
    if i_p < QUERY_PROGRAMS:
        _side(
            q, cos, sin, query_mix, places, out_q, i_p, query_tiles, query_rows, N, q_b, q_h, q_n,
            cos_b, cos_n, sin_b, sin_n, H, GQ, HALF, WIDE, UPCAST, BLOCK_R, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    elif k is not None:
        _side(
            k, cos, sin, key_mix, places, out_k, i_p - QUERY_PROGRAMS, key_tiles, key_rows, N,
            k_b, k_h, k_n, cos_b, cos_n, sin_b, sin_n, KV, GK, HALF, WIDE, UPCAST, BLOCK_R,
            BLOCK_D, BLOCK_E,
        )  # fmt: skip


def rotate_forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the reference, to the bit, and contiguous; channels of x, cos and sin lie side by side."""
    return _launch(x, None, cos, sin, None, None, (), 0)[0]


def rotate_both_forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    query_mix: Tensor | None,
    key_mix: Tensor | None,
    heads: Sequence[int],
    kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """As the reference, and contiguous: to the bit without matrices, with their products summed
    in float32; channels of q, k, cos and sin lie side by side, matrices are contiguous."""
    out_q, out_k = _launch(q, k, cos, sin, query_mix, key_mix, heads, kv_heads)
    assert out_k is not None
    return out_q, out_k


def _launch(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    query_mix: Tensor | None,
    key_mix: Tensor | None,
    heads: Sequence[int],
    kv_heads: int,
) -> tuple[Tensor, Tensor | None]:
    batch, count, length, dim = q.shape
    out_q, out_k = q.new_empty(q.shape), None if k is None else k.new_empty(k.shape)
    angles = [t if t is None else t.expand(batch, 1, length, dim) for t in (cos, sin)]
    turns = [0 if t is None else t.stride(d) for t in angles for d in (0, 2)]
    sides = [count, 0 if k is None else k.shape[1]]
    # Heads that share a matrix are rows of one tile; without matrices all of them are.
    apart = sides[1] if query_mix is not None else 1
    groups = [side // apart for side in sides]
    rows = [batch * length * group for group in groups]
    block = tile(rows[0], least=1, most=16)
    if query_mix is not None:
        block = MANY_ROWS if rows[0] >= LONG and dim <= MOST_CHANNELS else FEW_ROWS
    tiles = [triton.cdiv(n, block) for n in rows]
    half = dim // 2
    places = _places(tuple(heads), kv_heads, q.device) if heads else None
    _rotate_kernel[(apart * sum(tiles),)](
        q, k, *angles, query_mix, key_mix, places, out_q, out_k, *tiles, *rows, length,
        *q.stride()[:3], *((0, 0, 0) if k is None else k.stride()[:3]), *turns,
        apart * tiles[0], *sides, GQ=groups[0], GK=max(1, groups[1]),
        HALF=half, WIDE=tl.float64 if q.itemsize == 8 else tl.float32, UPCAST=DOT_UPCAST,
        BLOCK_R=block, BLOCK_D=tile(half, least=1 if query_mix is None else 16, most=1024),
        BLOCK_E=tile(dim),
        enable_fp_fusion=False,  # a product that is not rounded before the sum is another number
    )  # fmt: skip
    return out_q, out_k


@cache
def _places(heads: tuple[int, ...], kv_heads: int, device: torch.device) -> Tensor:
    """Which matrix each KV head has, int32 [KV]; -1 for none. Kept for good: a captured CUDA graph
    reads it in every replay, and nothing tells when the last one is gone."""
    found = [heads.index(head) if head in heads else -1 for head in range(kv_heads)]
    return torch.tensor(found, dtype=torch.int32, device=device)
