"""Decoding over packed blocks on int8 tensor cores, or float16 ones where blocks are of e4m3.

Stored integers are multiplied as they are. What they are multiplied with is split into two int8
parts, x ≈ (high * 254 + residual) * step, which are two columns of the same tile: with up to four
query rows a KV head they fill columns that a tile of the tensor core has anyway. Scales go to the
other operand: the one of a key's channel to the query, the one of a value's token to its weight;
zeros become a number per row. Sums of products are exact, so the error is that of 15 bits. e4m3
numbers differ in what both operands are (`_triton/kv_parts.py`), and values of them have no zeros.

Tiles are transposed: scores are [tokens, rows] and outputs [channels, rows], because a tile has 16
rows and only 8 columns, and packed storage is the larger side.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.common import DOT_UPCAST, INTERPRETED, overlaps, processors, tile
from fxopt.kernels._triton.kv_parts import (
    codes,
    gathered,
    joined,
    parts,
    query_plane,
    scattered,
    step_of,
    weight_plane,
)
from fxopt.kernels._triton.splits import start_dependents
from fxopt.kernels.kv_attention.heads import Arguments
from fxopt.kernels.kv_attention.layout import Blocks
from fxopt.kernels.kv_attention.packing import FLOAT8, width
from fxopt.kernels.kv_attention.pages import room
from fxopt.kernels.kv_attention.triton import (
    Shares,
    block_at,
    blocks_used,
    exact_tokens,
    first_block,
    near_tiles,
    note_due,
    window_table,
)

from . import launch

BITS = (8, FLOAT8, 4, 2)
DIMS = (64, 128)
MOST_ROWS = 16
# An int8 instruction sums 32 products.
LEAST_DEPTH = 32
STAGES = 3

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _counted(i_n, sinks, skipped, listed, HAS_WINDOW: tl.constexpr, HAS_LIST: tl.constexpr):
    """The block that is `i_n`-th of those that are read; one behind the last may be asked for."""
    if HAS_LIST:
        return tl.load(listed + i_n)
    if HAS_WINDOW:
        return i_n + tl.where(i_n < sinks, 0, skipped)
    return i_n


@triton.jit
def _packed_share(
    q, block_start, table, key, key_scale, key_zero, value, value_scale, value_zero, rank,
    out, out_m, out_l, i_bh, i_out, first, end, sinks, skipped, listed, start, BLOCKS, N, rows,
    scale, softcap, window, sink_tokens,
    H, D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, SINK: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, HAS_RANK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_LIST: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ASM: tl.constexpr, R: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """Partial softmax sums over the blocks from `first` to `end`, counted without the `skipped`
    ones behind the first `sinks`, or in a list of blocks; with ONE over the `first` alone, which
    may hold nothing. Scores are in units of log 2.

    Row n of a tile of scores is token 4 * (n % 8) + n // 8 of its 32: the four tokens whose
    weights a thread has in a column are neighbours, and go to the second product as one word.
    """
    K_PLANES: tl.constexpr = 8 // K_BITS
    V_PLANES: tl.constexpr = 8 // V_BITS
    KW: tl.constexpr = D // K_PLANES
    VW: tl.constexpr = GROUP // V_PLANES
    K_FLOAT: tl.constexpr = key.dtype.element_ty.is_fp8()
    V_FLOAT: tl.constexpr = value.dtype.element_ty.is_fp8()
    o_t, o_d, o_v, o_r = tl.arange(0, GROUP), tl.arange(0, D), tl.arange(0, DV), tl.arange(0, R)
    o_kw, o_vw = tl.arange(0, KW), tl.arange(0, VW)
    o_n = o_t // 32 * 32 + o_t % 8 * 4 + o_t % 32 // 8
    q_position = start + o_r % N
    # Planes are the slowest of what is loaded, so that a thread has a channel of each of them.
    o_pr = tl.arange(0, K_PLANES * R)
    p_q = q + (i_bh * rows + o_pr % R)[:, None] * D + (o_pr // R * KW)[:, None] + o_kw[None, :]
    b_q = tl.load(p_q, mask=(o_pr % R < rows)[:, None], other=0.0).to(tl.float32) * scale
    b_q = tl.reshape(b_q, (K_PLANES, R, KW))
    if not HAS_SOFTCAP:
        b_q *= _LOG2E
    b_m = tl.full((R,), -float("inf"), tl.float32)
    b_l, b_z = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    b_acc = tl.zeros((DV, R), tl.float32)
    # What no product depends on is not prefetched by the compiler: bounds and zeros of values. Nor
    # is as much of what is looked up where it is loaded, so that pages and entries of a list are
    # known a step before.
    i_x = _counted(first, sinks, skipped, listed, HAS_WINDOW, HAS_LIST)
    low, high = tl.load(block_start + i_x), tl.load(block_start + tl.minimum(i_x + 1, BLOCKS))
    i_first = first_block(table, i_bh, BLOCKS, H)
    p_zero = value_zero + i_first * GROUP + o_t
    at = block_at(table, tl.minimum(i_x, BLOCKS - 1), H)
    b_next = tl.zeros((GROUP,), value_zero.dtype.element_ty)
    if not V_FLOAT:
        b_next = tl.load(p_zero + at * GROUP)

    # A loop of one step is none, so that nothing is loaded by way of shared memory.
    for i_n in range(0 if ONE else first, 1 if ONE else end):
        if table is None and not HAS_LIST and not ONE:
            i_block = i_first + _counted(i_n, sinks, skipped, listed, HAS_WINDOW, HAS_LIST)
        else:
            i_block = i_first + at
        b_kb = tl.load(key + i_block * (GROUP * KW) + o_n[:, None] * KW + o_kw[None, :])
        b_vb = tl.load(value + i_block * (DV * VW) + o_v[:, None] * VW + o_vw[None, :])
        b_ks = tl.load(key_scale + i_block * D + o_d).to(tl.float32)
        b_kz = tl.load(key_zero + i_block * D + o_d).to(tl.float32)
        b_vs = tl.load(value_scale + i_block * GROUP + o_t)
        if ONE:  # a block that is not in use may hold anything
            b_vs = tl.where(o_t < high - low, b_vs, 0.0)
            b_next = tl.where(o_t < high - low, b_next, 0.0)
        b_vs = scattered(b_vs, GROUP).to(tl.float32)
        if K_BITS == 8 and not K_FLOAT:
            b_kz += 128 * b_ks
        if not V_FLOAT:
            b_vz = scattered(b_next, GROUP).to(tl.float32)
            if V_BITS == 8:
                b_vz += 128 * b_vs
        next_low, next_high = low, high
        if not ONE:
            i_x = _counted(i_n + 1, sinks, skipped, listed, HAS_WINDOW, HAS_LIST)
            at = block_at(table, tl.minimum(i_x, BLOCKS - 1), H)
            if not V_FLOAT:
                b_next = tl.load(p_zero + at * GROUP)
            # Two loads, though one is the other's: a loop that carries over two steps is not
            # pipelined.
            next_low = tl.load(block_start + i_x)
            next_high = tl.load(block_start + tl.minimum(i_x + 1, BLOCKS))

        b_x = b_q * tl.reshape(b_ks, (K_PLANES, 1, KW))
        b_top = tl.max(tl.max(tl.abs(b_x), 2), 0)
        b_x8 = parts(b_x, b_top[None, :, None], K_FLOAT)
        b_base = tl.sum(tl.sum(b_q * tl.reshape(b_kz, (K_PLANES, 1, KW)), 2), 0)
        b_dot = tl.zeros((GROUP, 2 * R), tl.float32 if K_FLOAT else tl.int32)
        for i_p in tl.static_range(K_PLANES):
            b_plane = query_plane(b_x8, i_p, K_PLANES, KW, R)
            b_dot = tl.dot(codes(b_kb, i_p, K_BITS, ASM), b_plane, b_dot, out_dtype=b_dot.dtype)
        b_s = joined(b_dot, GROUP, R) * step_of(b_top, K_FLOAT)[None, :] + b_base[None, :]
        if HAS_SOFTCAP:
            b_s = (softcap * _LOG2E) * (1 - 2 / (tl.exp(2 * b_s / softcap) + 1))

        m_t = o_n < (high - low).to(tl.int32)
        m_s = m_t[:, None]
        if HAS_RANK:
            b_rank = tl.load(rank + SINK + low + o_n, mask=m_t, other=0)
            m_s = m_s & (b_rank != 0)[:, None]
        if HAS_WINDOW:
            b_seen = (SINK + low + o_n + 1).to(tl.int32)
            if HAS_RANK:
                b_seen = b_rank
            distance = q_position[None, :] - (SINK + low + o_n)[:, None]
            near = (distance < window) | (window <= 0)
            m_s = m_s & (near | (b_seen <= sink_tokens)[:, None])
        b_s = tl.where(m_s, b_s, -float("inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 0))
        b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_ref[None, :])
        b_alpha = tl.exp2(b_m - b_ref)
        b_m = b_new
        b_l = b_l * b_alpha + tl.sum(b_p, 0)
        if not V_FLOAT:
            b_z = b_z * b_alpha + tl.sum(b_p * b_vz[:, None], 0)

        b_w = b_p * b_vs[:, None]
        b_top = tl.max(b_w, 0)
        b_w8 = tl.reshape(parts(b_w, b_top[None, :], V_FLOAT), (GROUP, 2 * R))
        b_w8 = gathered(b_w8, GROUP, 2 * R)
        b_dot = tl.zeros((DV, 2 * R), tl.float32 if V_FLOAT else tl.int32)
        for i_p in tl.static_range(V_PLANES):
            b_plane = weight_plane(b_w8, i_p, V_PLANES, VW, R)
            b_dot = tl.dot(codes(b_vb, i_p, V_BITS, ASM), b_plane, b_dot, out_dtype=b_dot.dtype)
        b_y = joined(b_dot, DV, R) * step_of(b_top, V_FLOAT)[None, :]
        b_acc = b_acc * b_alpha[None, :] + b_y
        low, high = next_low, next_high

    tl.store(out_m + i_out + o_r, b_m * (1 / _LOG2E), mask=o_r < rows)
    tl.store(out_l + i_out + o_r, b_l, mask=o_r < rows)
    p_out = out + (i_out + o_r)[None, :] * DV + o_v[:, None]
    tl.store(p_out, b_acc + b_z[None, :], mask=(o_r < rows)[None, :])


@triton.jit
def _exact_share(
    q, k, v, sink_k, sink_v, recent_k, recent_v, rank, out, out_m, out_l,
    i_bh, i_s, i_out, start, packed, scale, softcap, window, sink_tokens, N, RING, rows,
    D: tl.constexpr, DV: tl.constexpr, SINK: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_RANK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, TILE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Partial softmax sums over a share of what is stored exactly, TILE tokens at a time."""
    o_m, o_d, o_v = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, DV)
    m_m = o_m < rows
    p_q = q + (i_bh * rows + o_m)[:, None] * D + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None], other=0.0)
    b_m = tl.full((16,), -float("inf"), tl.float32)
    b_l = tl.zeros((16,), tl.float32)
    b_acc = tl.zeros((16, DV), tl.float32)
    b_m, b_l, b_acc = exact_tokens(
        i_s, SHARES, b_q, k, v, sink_k, sink_v, recent_k, recent_v, b_m, b_l, b_acc,
        i_bh, start, packed, start + o_m % N, m_m, rank, q, o_m, 0, scale, softcap, window,
        sink_tokens,
        N, RING, D, DV, SINK, CAUSAL, HAS_RANK, False, HAS_WINDOW, HAS_SOFTCAP, UPCAST, D, DV, TILE,
    )  # fmt: skip
    tl.store(out_m + i_out + o_m, b_m, mask=m_m)
    tl.store(out_l + i_out + o_m, b_l, mask=m_m)
    p_out = out + (i_out + o_m)[:, None] * DV + o_v[None, :]
    tl.store(p_out, b_acc, mask=m_m[:, None])


@triton.jit
def _decode_packed_kernel(
    q, k, v, start_ptr, block_start, sink_k, sink_v, table, key, key_scale, key_zero,
    value, value_scale, value_zero, recent_k, recent_v, rank, windows, listed, listed_count,
    out, out_m, out_l, counts, N, BLOCKS, RING, kept, LISTED, rank_b, scale, softcap,
    H, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    GROUP: tl.constexpr, SINK: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_RANK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, ASM: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr, EXACT: tl.constexpr, HAS_LIST: tl.constexpr, OVERLAP: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """As `_decode_kernel`, for packed keys and values without a bias.

    The first shares divide what is stored exactly; the others divide the blocks in use, or with ONE
    have a block of all each, so that none is looked for before it is loaded.
    """
    start_dependents(OVERLAP)
    i_bh = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    i_h = i_bh % H
    rows = G * N
    start = tl.load(start_ptr)
    packed = tl.load(block_start + BLOCKS)
    rank += (i_bh // H) * rank_b
    window = start * 0
    sink_tokens = start * 0
    if HAS_WINDOW:
        window = tl.load(windows + 2 * i_h)
        sink_tokens = tl.load(windows + 2 * i_h + 1)
    i_out = (i_s * tl.num_programs(0) + i_bh) * rows
    if i_s < EXACT:
        _exact_share(
            q, k, v, sink_k, sink_v, recent_k, recent_v, rank, out, out_m, out_l,
            i_bh, i_s, i_out, start, packed, scale, softcap, window, sink_tokens, N, RING, rows,
            D, DV, SINK, CAUSAL, HAS_RANK, HAS_WINDOW, HAS_SOFTCAP, UPCAST, TILE, EXACT,
        )  # fmt: skip
        if (i_bh == 0) & (i_s == 0):
            used = blocks_used(block_start, packed, GROUP)
            note_due(counts, used, packed, start, N, kept, GROUP)
    else:
        i_s -= EXACT
        used, sinks, skipped = packed * 0, 0, 0
        if not ONE:
            used = blocks_used(block_start, packed, GROUP)
        if HAS_WINDOW:
            apart = tl.minimum(tl.maximum(sink_tokens - SINK, 0), packed)
            sinks = tl.cdiv(apart, GROUP).to(tl.int32)
            while tl.load(block_start + sinks) < apart:
                sinks += 1
            # No block lies before where it would be if none were short.
            skipped = near_tiles(start - SINK, window, sink_tokens, sinks, GROUP, HAS_RANK)
            skipped = skipped.to(tl.int32)
            used -= skipped
        if HAS_LIST:
            listed += i_bh * LISTED
            used = tl.load(listed_count + i_bh)
        if table is not None:
            table += i_bh // H * BLOCKS
        shares = tl.num_programs(1) - EXACT
        first, end = i_s, i_s + 1
        if not ONE:
            first = (i_s * used // shares).to(tl.int32)
            end = ((i_s + 1) * used // shares).to(tl.int32)
        _packed_share(
            q, block_start, table, key, key_scale, key_zero, value, value_scale, value_zero, rank,
            out, out_m, out_l, i_bh, i_out, first, end, sinks, skipped, listed, start, BLOCKS, N,
            rows, scale, softcap, window, sink_tokens, H, D, DV, GROUP, SINK, K_BITS, V_BITS,
            HAS_RANK, HAS_WINDOW, HAS_LIST, HAS_SOFTCAP, ASM, R, ONE,
        )  # fmt: skip


def serves(
    arguments: Arguments, new: dict[str, Tensor], part: dict[str, Tensor], fmt: Blocks
) -> bool:
    """Whether `decode_packed` computes this head class."""
    if fmt.key_bits not in BITS or fmt.value_bits not in BITS:
        return False
    dims = new["key"].shape[3], new["value"].shape[3]
    depths = dims[0] * width(fmt.key_bits) // 8, fmt.group * width(fmt.value_bits) // 8
    rows = arguments.q.shape[1] // new["key"].shape[1] * arguments.q.shape[2]
    return (
        arguments.bias is None
        and rows <= MOST_ROWS
        and room(part) > 0
        and all(dim in DIMS for dim in dims)
        and min(depths) >= LEAST_DEPTH
    )


def decode_packed(
    arguments: Arguments,
    new: dict[str, Tensor],
    part: dict[str, Tensor],
    start: Tensor,
    rank: Tensor | None,
    fmt: Blocks,
    splits: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    exact_tile: int | None = None,
    counts: Tensor | None = None,
    exact_shares: int | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Shares:
    """As `decode`, where `serves` says so. `splits` counts the shares of the packed blocks,
    `exact_shares` those of the tokens that are stored exactly."""
    q, k, v = arguments.q.contiguous(), new["key"], new["value"]
    batch, heads, queries, dim = k.shape
    value_dim, group = v.shape[3], q.shape[1] // heads
    blocks, rows, none = room(part), group * queries, q
    count, ring = processors(q.device), part["recent_key"].shape[2]
    windows = window_table(arguments, heads)
    listed, listed_count = kept or (start, start)
    read = min(blocks, listed.shape[1]) if kept else blocks
    every = windows is None and kept is None
    if every and splits is None and launch.few(fmt, batch * heads, blocks, rows, count):
        splits, num_stages = blocks, num_stages or 1
        num_warps, exact_tile = num_warps or launch.FEW_WARPS, exact_tile or launch.FEW_TILE
    num_warps, num_stages = num_warps or launch.warps(fmt, rows), num_stages or STAGES
    at_once = launch.at_once(fmt, dim, value_dim, num_warps, num_stages)
    splits = splits or launch.splits(batch * heads, read, at_once, count)
    exact_tile = exact_tile or launch.exact_tile(fmt)
    exact_shares = exact_shares or launch.exact_shares(
        triton.cdiv(ring, exact_tile), read, splits, at_once * count // (batch * heads)
    )
    # One warp would spill a block that it has at once.
    one = every and splits >= blocks and num_warps >= launch.FEW_WARPS
    shares = Shares.empty(arguments, heads, value_dim, exact_shares + splits)
    _decode_packed_kernel[(batch * heads, exact_shares + splits)](
        q, k, v, start, part["block_start"], part.get("sink_key", none),
        part.get("sink_value", none), part.get("table"), part["key"], part["key_scale"],
        part["key_zero"], part["value"], part["value_scale"], part.get("value_zero", none),
        part["recent_key"], part["recent_value"], none if rank is None else rank,
        none if windows is None else windows, listed, listed_count, shares.partial,
        shares.top, shares.total,
        start.new_empty(3) if counts is None else counts, queries, blocks, ring,
        fmt.residual + fmt.sink, listed.shape[-1] if kept else 0,
        0 if rank is None else rank.stride(0), arguments.scale, arguments.softcap,
        H=heads, G=group, D=dim, DV=value_dim, GROUP=fmt.group, SINK=fmt.sink,
        K_BITS=width(fmt.key_bits), V_BITS=width(fmt.value_bits), CAUSAL=arguments.causal,
        HAS_RANK=rank is not None, HAS_WINDOW=windows is not None,
        HAS_SOFTCAP=arguments.softcap > 0, UPCAST=DOT_UPCAST, ASM=not INTERPRETED,
        R=tile(rows, least=4), TILE=exact_tile, EXACT=exact_shares, HAS_LIST=kept is not None,
        OVERLAP=overlaps(q.device), ONE=one, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return shares
