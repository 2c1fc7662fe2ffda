"""Decoding through a cache: the Triton kernels of `cached_attention`.

Decoding splits the blocks of one KV head among programs; each keeps an online softmax over its
share, and the shares are joined by their log-sum-exp (Flash-Decoding, 2023). The query heads of a
KV head are the rows of one tile. Lengths are read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._epilogue import contiguous
from fxopt.kernels._triton.common import DOT_UPCAST, dot, overlaps, processors, tile
from fxopt.kernels._triton.splits import start_dependents

from .heads import Arguments
from .layout import Blocks
from .packing import width
from .pages import room


@triton.jit
def _code(b_stored, shift, BITS: tl.constexpr):
    """What is stored as float32: e4m3 numbers, or the integers that begin at bit `shift`."""
    if b_stored.dtype.is_fp8():
        return b_stored.to(tl.float32)
    else:  # what follows a return is compiled as well
        return ((b_stored.to(tl.int32) >> shift) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _load_keys(
    packed, scale, zero, rows, channels, m_rows, m_channels,
    D: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Keys `rows` of one block, [rows, channels] in `dtype`; pointers are at the block."""
    mask = m_rows[:, None] & m_channels[None, :]
    if BITS == 16:
        return tl.load(packed + rows[:, None] * D + channels[None, :], mask=mask, other=0.0)
    W: tl.constexpr = D * BITS // 8
    b_stored = tl.load(packed + rows[:, None] * W + (channels % W)[None, :], mask=mask)
    b_code = _code(b_stored, ((channels // W) * BITS)[None, :], BITS)
    b_scale = tl.load(scale + channels, mask=m_channels, other=0.0).to(tl.float32)[None, :]
    b_zero = tl.load(zero + channels, mask=m_channels, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask, b_code * b_scale + b_zero, 0.0).to(dtype)


@triton.jit
def _load_values(
    packed, scale, zero, rows, channels, m_rows, m_channels,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Values `rows` of one block, [rows, channels] in `dtype`; pointers are at the block."""
    mask = m_rows[:, None] & m_channels[None, :]
    if BITS == 16:
        return tl.load(packed + rows[:, None] * D + channels[None, :], mask=mask, other=0.0)
    W: tl.constexpr = GROUP * BITS // 8
    b_stored = tl.load(packed + channels[None, :] * W + (rows % W)[:, None], mask=mask)
    b_x = _code(b_stored, ((rows // W) * BITS)[:, None], BITS)
    b_x *= tl.load(scale + rows, mask=m_rows, other=0.0).to(tl.float32)[:, None]
    if not b_stored.dtype.is_fp8():
        b_x += tl.load(zero + rows, mask=m_rows, other=0.0).to(tl.float32)[:, None]
    return tl.where(mask, b_x, 0.0).to(dtype)


@triton.jit
def softmax_step(
    b_q, b_k, b_v, b_m, b_l, b_acc, position, m_t, q_position, m_q,
    rank, bias, p_bias, bias_t, scale, softcap, window, sink_tokens,
    CAUSAL: tl.constexpr, HAS_RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys at `position` joins the online softmax."""
    b_s = dot(b_q, tl.trans(b_k), tl.zeros((b_q.shape[0], b_k.shape[0]), tl.float32), UPCAST)
    b_s *= scale
    if HAS_SOFTCAP:
        b_s = softcap * (1 - 2 / (tl.exp(2 * b_s / softcap) + 1))
    if HAS_BIAS:
        p_t = bias + p_bias[:, None] + position[None, :] * bias_t
        b_s += tl.load(p_t, mask=m_q[:, None] & m_t[None, :], other=0.0).to(tl.float32)
    b_rank = (position + 1).to(tl.int32)
    if HAS_RANK:
        b_rank = tl.load(rank + position, mask=m_t, other=0)
        m_t = m_t & (b_rank != 0)
    m_s = m_q[:, None] & m_t[None, :]
    distance = q_position[:, None] - position[None, :]
    if CAUSAL:
        m_s = m_s & (distance >= 0)
    if HAS_WINDOW:
        near = (tl.abs(distance) < window) | (window <= 0)
        m_s = m_s & (near | (b_rank <= sink_tokens)[None, :])
    b_s = tl.where(m_s, b_s, -float("inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_p = tl.exp(b_s - b_base[:, None])
    b_alpha = tl.exp(b_m - b_base)
    b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], UPCAST)
    return b_new, b_l * b_alpha + tl.sum(b_p, 1), b_acc


@triton.jit
def near_tiles(start, window, sink_tokens, sinks, TILE: tl.constexpr, HAS_RANK: tl.constexpr):
    """How many tiles of keys no query sees: those between the `sinks` tiles of sink tokens and
    the window of the first query. Padding moves sink tokens anywhere, so that none is left out."""
    begin = tl.where(window > 0, tl.maximum(start - window + 1, 0), 0)
    if HAS_RANK:
        begin = tl.where(sink_tokens > 0, 0, begin)
    return tl.maximum(begin // TILE - sinks, 0)


@triton.jit
def blocks_used(block_start, packed, GROUP: tl.constexpr):
    """Blocks that hold tokens. Those that a crop cut short hold fewer, so that more are in use
    than `packed` tokens need."""
    used = tl.cdiv(packed, GROUP)
    while tl.load(block_start + used) < packed:
        used += 1
    return used


@triton.jit
def first_block(table, i_bh, BLOCKS, H):
    """Where the blocks of a KV head begin: the first of its own, or its place on a page."""
    if table is None:
        return i_bh * BLOCKS
    else:
        return i_bh % H


@triton.jit
def block_at(table, i_n, H):
    """How far on the `i_n`-th block lies; `table` is that of the row, None without pages."""
    if table is None:
        return i_n
    else:
        return tl.load(table + i_n).to(tl.int64) * H


@triton.jit
def note_due(counts, used, packed, start, N, kept, GROUP: tl.constexpr):
    """What there is to pack after this call, for the kernel that will: int64 [3], blocks in use,
    tokens packed before, tokens packed after. `kept` tokens, residual and sink, are not."""
    due = tl.maximum((start + N - kept) // GROUP * GROUP, packed)
    tl.store(counts, used.to(tl.int64))
    tl.store(counts + 1, packed)
    tl.store(counts + 2, due)


@triton.jit
def exact_tokens(
    i_e, shares, b_q, k, v, sink_k, sink_v, recent_k, recent_v, b_m, b_l, b_acc,
    i_bh, start, packed, q_position, m_q, rank, bias, p_bias, bias_t, scale, softcap, window,
    sink_tokens, N, RING,
    D: tl.constexpr, DV: tl.constexpr, SINK: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_RANK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What is stored exactly joins: sink, recent and new tokens, each from its first position.

    With several shares it is the `i_e`-th: tiles are dealt out, of each part to another one first.
    """
    o_d, o_v, o_t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_T)
    m_d, m_v = o_d < D, o_v < DV
    for i_part in tl.static_range(3):
        if i_part == 0:
            first, count, rows = start * 0, tl.minimum(start, SINK), SINK
            x_k, x_v = sink_k, sink_v
        elif i_part == 1:
            first, count, rows = SINK + packed, start - SINK - packed, RING
            x_k, x_v = recent_k, recent_v
        else:
            first, count, rows = start, N + start * 0, N
            x_k, x_v = k, v
        for i_t in range((i_e + i_part) % shares * BLOCK_T, count, shares * BLOCK_T):
            o_x = i_t + o_t
            m_t = o_x < count
            slot = o_x
            if i_part == 1:
                slot = (packed + o_x) % tl.maximum(RING, 1)
            o_row = (i_bh * rows + slot)[:, None]
            m_k, m_w = m_t[:, None] & m_d[None, :], m_t[:, None] & m_v[None, :]
            b_k = tl.load(x_k + o_row * D + o_d[None, :], mask=m_k, other=0.0)
            b_v = tl.load(x_v + o_row * DV + o_v[None, :], mask=m_w, other=0.0)
            b_m, b_l, b_acc = softmax_step(
                b_q, b_k, b_v, b_m, b_l, b_acc, first + o_x, m_t, q_position, m_q,
                rank, bias, p_bias, bias_t, scale, softcap, window, sink_tokens,
                CAUSAL, HAS_RANK, HAS_BIAS, HAS_WINDOW, HAS_SOFTCAP, UPCAST,
            )  # fmt: skip
    return b_m, b_l, b_acc


@triton.jit
def _decode_kernel(
    q, k, v, start_ptr, block_start, sink_k, sink_v, table, key, key_scale, key_zero,
    value, value_scale, value_zero, recent_k, recent_v, rank, bias, windows, listed, listed_count,
    out, out_m, out_l, counts, N, BLOCKS, RING, kept, LISTED, rank_b, bias_b, bias_h, bias_n,
    bias_t, scale, softcap,
    H, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    GROUP: tl.constexpr, SINK: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_LIST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Partial softmax sums of one KV head's queries over one share of the keys.

    q [B, H*G, N, D]; k, v [B, H, N, D]; out [splits, B*H, G*N, DV], out_m and out_l
    [splits, B*H, G*N], all contiguous. Row r is query head r // N at new token r % N.
    """
    start_dependents(OVERLAP)
    i_bh = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    i_h = i_bh % H
    i_b = i_bh // H
    o_m, o_d, o_v, o_t = (
        tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_T),
    )  # fmt: skip
    m_m, m_d, m_v = o_m < G * N, o_d < D, o_v < DV
    start = tl.load(start_ptr)
    packed = tl.load(block_start + BLOCKS)
    used = blocks_used(block_start, packed, GROUP)
    if (i_bh == 0) & (i_s == 0):
        note_due(counts, used, packed, start, N, kept, GROUP)
    p_q = q + (i_bh * G * N + o_m)[:, None] * D + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
    q_position = start + o_m % N
    rank += i_b * rank_b
    p_bias = i_b * bias_b + (i_h * G + o_m // N) * bias_h + (o_m % N) * bias_n
    window = start * 0
    sink_tokens = start * 0
    if HAS_WINDOW:
        window = tl.load(windows + 2 * i_h)
        sink_tokens = tl.load(windows + 2 * i_h + 1)
    b_m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_l = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    shares = tl.num_programs(1)
    if HAS_LIST:
        used = tl.load(listed_count + i_bh)
    if table is not None:
        table += i_b * BLOCKS
    first = (i_s * used // shares).to(tl.int32)
    end = ((i_s + 1) * used // shares).to(tl.int32)

    for i_x in range(first, end):
        i_n = i_x
        if HAS_LIST:
            i_n = tl.load(listed + i_bh * LISTED + i_x)
        low = tl.load(block_start + i_n)
        m_t = o_t < tl.load(block_start + i_n + 1) - low
        i_block = first_block(table, i_bh, BLOCKS, H) + block_at(table, i_n, H)
        p_k = key + i_block * GROUP * (D if K_BITS == 16 else D * K_BITS // 8)
        p_v = value + i_block * GROUP * (DV if V_BITS == 16 else DV * V_BITS // 8)
        b_k = _load_keys(
            p_k, key_scale + i_block * D, key_zero + i_block * D, o_t, o_d, m_t, m_d,
            D, K_BITS, b_q.dtype,
        )  # fmt: skip
        b_v = _load_values(
            p_v, value_scale + i_block * GROUP, value_zero + i_block * GROUP, o_t, o_v,
            m_t, m_v, DV, GROUP, V_BITS, b_q.dtype,
        )  # fmt: skip
        b_m, b_l, b_acc = softmax_step(
            b_q, b_k, b_v, b_m, b_l, b_acc, SINK + low + o_t, m_t, q_position, m_m,
            rank, bias, p_bias, bias_t, scale, softcap, window, sink_tokens,
            CAUSAL, HAS_RANK, HAS_BIAS, HAS_WINDOW, HAS_SOFTCAP, UPCAST,
        )  # fmt: skip

    if i_s == shares - 1:
        b_m, b_l, b_acc = exact_tokens(
            0, 1, b_q, k, v, sink_k, sink_v, recent_k, recent_v, b_m, b_l, b_acc,
            i_bh, start, packed, q_position, m_m, rank, bias, p_bias, bias_t, scale, softcap,
            window, sink_tokens, N, RING, D, DV, SINK, CAUSAL, HAS_RANK, HAS_BIAS, HAS_WINDOW,
            HAS_SOFTCAP, UPCAST, BLOCK_D, BLOCK_V, BLOCK_T,
        )  # fmt: skip

    o_row = (i_s * tl.num_programs(0) + i_bh) * G * N + o_m
    tl.store(out_m + o_row, b_m, mask=m_m)
    tl.store(out_l + o_row, b_l, mask=m_m)
    tl.store(out + o_row[:, None] * DV + o_v[None, :], b_acc, mask=m_m[:, None] & m_v[None, :])


@triton.jit
def join_row(
    partial, top, total, sinks, out, i_row, i_v, rows, N, splits,
    H, G: tl.constexpr, DV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Shares of one of `rows`, joined into the `i_v`-th BLOCK_V channels of out [B, N, H*G, DV];
    no key gives 0."""
    i_row = i_row.to(tl.int64)
    i_bh, i_m = i_row // (G * N), i_row % (G * N)
    head = i_bh % H * G + i_m // N
    o_s, o_v = tl.arange(0, BLOCK_S), i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_s = o_s < splits
    p_s = o_s * rows + i_row
    b_m = tl.load(top + p_s, mask=m_s, other=-float("inf"))
    b_l = tl.load(total + p_s, mask=m_s, other=0.0)
    highest = tl.max(b_m, 0)
    if sinks is not None:
        logit = tl.load(sinks + head).to(tl.float32)
        highest = tl.maximum(highest, logit)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    b_w = tl.exp(b_m - base)
    whole = tl.sum(b_w * b_l, 0)
    if sinks is not None:
        whole += tl.exp(logit - base)
    m_x = m_s[:, None] & (o_v < DV)[None, :]
    b_x = tl.load(partial + p_s[:, None] * DV + o_v[None, :], mask=m_x, other=0.0)
    b_o = tl.sum(b_x * b_w[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    p_o = out + ((i_bh // H * N + i_m % N) * H * G + head) * DV + o_v
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=o_v < DV)


def decode(
    arguments: Arguments,
    new: dict[str, Tensor],
    part: dict[str, Tensor],
    start: Tensor,
    rank: Tensor | None,
    fmt: Blocks,
    splits: int | None = None,
    counts: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Shares:
    """One packed head class: shares of what its queries read, the stored and the new tokens.

    `rank` [B, T] is 0 where a key is hidden; where there are windows, it counts the others.
    `counts` int64 [3] takes what `append` then has to do (`note_due`). `kept` is the list of
    blocks that are read, and how many of it, as of `decode_topk`.
    """
    q, k, v = arguments.q.contiguous(), new["key"], new["value"]
    batch, heads, queries, dim = k.shape
    value_dim, group = v.shape[3], q.shape[1] // heads
    rows, blocks = group * queries, room(part)
    wanted = 4 * processors(q.device) // max(1, batch * heads)
    listed, listed_count = kept or (start, start)
    read = min(blocks, listed.shape[1]) if kept else blocks
    splits = splits or max(1, min(64, read, wanted))
    shares = Shares.empty(arguments, heads, value_dim, splits)
    bias, none = arguments.bias, q
    strides = (0, 0, 0, 0) if bias is None else broadcast_strides(bias)
    windows = window_table(arguments, heads)
    _decode_kernel[(batch * heads, splits)](
        q, k, v, start, part["block_start"], part.get("sink_key", none),
        part.get("sink_value", none), part.get("table"), part["key"], part.get("key_scale", none),
        part.get("key_zero", none), part["value"], part.get("value_scale", none),
        part.get("value_zero", none), part["recent_key"], part["recent_value"],
        none if rank is None else rank, none if bias is None else bias,
        none if windows is None else windows, listed, listed_count,
        shares.partial, shares.top, shares.total, start.new_empty(3) if counts is None else counts,
        queries, blocks, part["recent_key"].shape[2], fmt.residual + fmt.sink,
        listed.shape[-1] if kept else 0, 0 if rank is None else rank.stride(0), *strides,
        arguments.scale, arguments.softcap,
        H=heads, G=group, D=dim, DV=value_dim, GROUP=fmt.group, SINK=fmt.sink,
        K_BITS=width(fmt.key_bits), V_BITS=width(fmt.value_bits), CAUSAL=arguments.causal,
        HAS_RANK=rank is not None, HAS_BIAS=bias is not None, HAS_WINDOW=windows is not None,
        HAS_SOFTCAP=arguments.softcap > 0, UPCAST=DOT_UPCAST,
        BLOCK_M=tile(rows), BLOCK_D=tile(dim, most=256), BLOCK_V=tile(value_dim, most=256),
        BLOCK_T=fmt.group, HAS_LIST=kept is not None, OVERLAP=overlaps(q.device),
    )  # fmt: skip
    return shares


@triton.jit
def _join_kernel(
    partial, top, total, sinks, out, N, splits,
    H, G: tl.constexpr, DV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    join_row(
        partial, top, total, sinks, out, tl.program_id(0), tl.program_id(1), tl.num_programs(0), N,
        splits, H, G, DV, BLOCK_S, BLOCK_V,
    )  # fmt: skip


@dataclass(frozen=True)
class Shares:
    """What each share of the keys gives: `partial` [splits, B * KV, rows, Dv] sums of values by
    weight, `top` and `total` [splits, B * KV, rows] the largest scores and sums of weights; and
    where they are joined, `out` [B, N, heads, Dv]. `sinks` [heads] are further logits."""

    partial: Tensor
    top: Tensor
    total: Tensor
    sinks: Tensor | None
    out: Tensor

    @classmethod
    def empty(cls, arguments: Arguments, kv_heads: int, value_dim: int, splits: int) -> Shares:
        """Room for `splits` shares."""
        batch, heads, queries, _ = arguments.q.shape
        rows = heads // kv_heads * queries
        sizes = (splits, batch * kv_heads, rows, value_dim)
        partial = arguments.q.new_empty(sizes, dtype=torch.float32)
        top, total = (partial.new_empty(sizes[:3]) for _ in range(2))
        out = arguments.q.new_empty((batch, queries, heads, value_dim))
        return cls(partial, top, total, contiguous(arguments.sinks), out)

    @property
    def rows(self) -> int:
        """Those of all KV heads."""
        return self.top[0].numel()

    def tiles(self, channels: int = 32) -> dict[str, int]:
        """What a kernel that joins them is compiled for, so many channels of a row a program."""
        value_dim = self.partial.shape[3]
        return {
            "BLOCK_S": triton.next_power_of_2(len(self.partial)),
            "BLOCK_V": tile(value_dim, most=channels),
        }

    def joined(self) -> Tensor:
        """`out`, in a launch of its own."""
        _, queries, heads, value_dim = self.out.shape
        group, tiles = self.top.shape[2] // queries, self.tiles()
        _join_kernel[(self.rows, triton.cdiv(value_dim, tiles["BLOCK_V"]))](
            self.partial, self.top, self.total, self.sinks, self.out, queries, len(self.partial),
            H=heads // group, G=group, DV=value_dim, **tiles,
        )  # fmt: skip
        return self.out


def window_table(arguments: Arguments, heads: int) -> Tensor | None:
    """int64 [KV, 2]: window and sink tokens of each KV head, on the device of the queries."""
    windows = _per_head(arguments.window, heads), _per_head(arguments.sink_tokens, heads)
    if not any(windows[0]):
        return None
    return _windows(tuple(zip(*windows, strict=True)), arguments.q.device)


@cache
def _windows(values: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Kept for good: captured CUDA graphs read it in every replay."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def _per_head(values: object, heads: int) -> list[int]:
    listed = list(values)  # type: ignore[call-overload]
    return listed * heads if len(listed) == 1 else listed


def broadcast_strides(bias: Tensor) -> tuple[int, ...]:
    return tuple(
        0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True)
    )
