"""Decoding through an exact cache whose length the host need not know.

A library takes the length as a number, which a CUDA graph would keep from the step it was captured
in. Tiles are loaded without a condition around them, so that several are under way at a time: what
a window hides is left out by counting tiles differently.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.common import DOT_UPCAST, overlaps, processors, tile
from fxopt.kernels._triton.splits import start_dependents
from fxopt.kernels.decode_topk import reference as topk
from fxopt.kernels.kv_attention.heads import Arguments
from fxopt.kernels.kv_attention.triton import (
    Shares,
    broadcast_strides,
    near_tiles,
    softmax_step,
    window_table,
)

# One program a multiprocessor, whose tiles in flight fill its shared memory, read 4.4 TB/s on an
# H200: what cuDNN reads. Two programs of smaller tiles were as fast, four were not.
TILE, WARPS, STAGES = 128, 8, 3
TILE_BYTES, MOST_SPLITS = 64 * 1024, 128


@triton.jit
def _tile(
    b_q, k, v, b_m, b_l, b_acc, o_x, m_t, o_t, q_position, m_q,
    rank, bias, p_bias, bias_t, scale, softcap, window, sink_tokens,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, HAS_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Rows `o_x` of k and v, at positions `o_t`, join the online softmax."""
    o_d, o_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    m_k, m_v = m_t[:, None] & (o_d < D)[None, :], m_t[:, None] & (o_v < DV)[None, :]
    b_k = tl.load(k + o_x[:, None] * D + o_d[None, :], mask=m_k, other=0.0)
    b_v = tl.load(v + o_x[:, None] * DV + o_v[None, :], mask=m_v, other=0.0)
    return softmax_step(
        b_q, b_k, b_v, b_m, b_l, b_acc, o_t, m_t, q_position, m_q,
        rank, bias, p_bias, bias_t, scale, softcap, window, sink_tokens,
        CAUSAL, HAS_RANK, HAS_BIAS, HAS_WINDOW, HAS_SOFTCAP, UPCAST,
    )  # fmt: skip


@triton.jit
def _decode_exact_kernel(
    q, k, v, start_ptr, key, value, rank, bias, windows, listed, counts, out, out_m, out_l,
    N, TOKENS, LISTED, rank_b, bias_b, bias_h, bias_n, bias_t, scale, softcap,
    H, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Partial softmax sums of one KV head's queries over one share of the keys.

    Tensors as in `_decode_kernel`; key and value [B, H, TOKENS, ...] hold `start` tokens. With a
    SIZE only the first `counts` tiles of so many tokens in `listed` [B * H, LISTED] are read.
    """
    start_dependents(OVERLAP)
    i_bh = tl.program_id(0).to(tl.int64)
    i_s, shares = tl.program_id(1), tl.num_programs(1)
    i_h, i_b = i_bh % H, i_bh // H
    o_m, o_d, o_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    o_t, o_n = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N)
    m_m, m_d, m_v = o_m < G * N, o_d < D, o_v < DV
    start = tl.load(start_ptr).to(tl.int32)
    p_q = q + (i_bh * G * N + o_m)[:, None] * D + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
    q_position = start + o_m % N
    rank += i_b * rank_b
    p_bias = i_b * bias_b + (i_h * G + o_m // N) * bias_h + (o_m % N) * bias_n
    key += i_bh * TOKENS * D
    value += i_bh * TOKENS * DV
    window, sink_tokens, sinks, skipped = 0, 0, 0, 0
    if HAS_WINDOW:
        window = tl.load(windows + 2 * i_h).to(tl.int32)
        sink_tokens = tl.load(windows + 2 * i_h + 1).to(tl.int32)
        sinks = tl.cdiv(sink_tokens, BLOCK_T)
        skipped = near_tiles(start, window, sink_tokens, sinks, BLOCK_T, HAS_RANK)
    b_m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_l = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)

    tiles = tl.cdiv(start, BLOCK_T) - skipped
    if SIZE > 0:
        listed += i_bh * LISTED
        read = tl.load(counts + i_bh) * SIZE
        tiles = tl.cdiv(read, BLOCK_T)
    for i_t in tl.range(i_s * tiles // shares, (i_s + 1) * tiles // shares, num_stages=STAGES):
        o_x = i_t * BLOCK_T + o_t
        if HAS_WINDOW:
            o_x += tl.where(i_t < sinks, 0, skipped * BLOCK_T)
        m_x = o_x < start
        if SIZE > 0:
            m_x = o_x < read
            o_x = tl.load(listed + o_x // SIZE, mask=m_x, other=0) * SIZE + o_x % SIZE
            m_x = m_x & (o_x < start)
        b_m, b_l, b_acc = _tile(
            b_q, key, value, b_m, b_l, b_acc, o_x, m_x, o_x, q_position, m_m,
            rank, bias, p_bias, bias_t, scale, softcap, window, sink_tokens,
            D, DV, CAUSAL, HAS_RANK, HAS_BIAS, HAS_WINDOW, HAS_SOFTCAP, UPCAST, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    if i_s == shares - 1:
        b_m, b_l, b_acc = _tile(
            b_q, k + i_bh * N * D, v + i_bh * N * DV, b_m, b_l, b_acc, o_n, o_n < N, start + o_n,
            q_position, m_m,
            rank, bias, p_bias, bias_t, scale, softcap, window, sink_tokens,
            D, DV, CAUSAL, HAS_RANK, HAS_BIAS, HAS_WINDOW, HAS_SOFTCAP, UPCAST, BLOCK_D, BLOCK_V,
        )  # fmt: skip

    o_row = (i_s * tl.num_programs(0) + i_bh) * G * N + o_m
    tl.store(out_m + o_row, b_m, mask=m_m)
    tl.store(out_l + o_row, b_l, mask=m_m)
    tl.store(out + o_row[:, None] * DV + o_v[None, :], b_acc, mask=m_m[:, None] & m_v[None, :])


def decode_exact(
    arguments: Arguments,
    new: dict[str, Tensor],
    part: dict[str, Tensor],
    start: Tensor,
    rank: Tensor | None,
    splits: int | None = None,
    block: int | None = None,
    num_warps: int = WARPS,
    num_stages: int = STAGES,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Shares:
    """One head class that is stored exactly: shares of what its queries read, the stored tokens, of
    which `start` says how many there are, and the new ones. `rank` as in `decode`;
    `kept` is the list of tiles that are read, and how many of it, as of `decode_topk`."""
    q, k, v = arguments.q.contiguous(), new["key"], new["value"]
    batch, heads, queries, dim = k.shape
    value_dim, group = v.shape[3], q.shape[1] // heads
    rows, tokens, none = group * queries, part["key"].shape[2], q
    wide = tile(dim, most=256), tile(value_dim, most=256)
    block = block or _tokens(sum(wide) * q.element_size())
    listed, counts = kept or (start, start)
    read = min(tokens, listed.shape[1] * topk.TILE) if kept else tokens
    splits = splits or _splits(batch * heads, triton.cdiv(read, block), q.device)
    shares = Shares.empty(arguments, heads, value_dim, splits)
    bias = arguments.bias
    strides = (0, 0, 0, 0) if bias is None else broadcast_strides(bias)
    windows = window_table(arguments, heads)
    _decode_exact_kernel[(batch * heads, splits)](
        q, k, v, start, part["key"], part["value"], none if rank is None else rank,
        none if bias is None else bias, none if windows is None else windows, listed, counts,
        shares.partial, shares.top, shares.total, queries, tokens, listed.shape[-1] if kept else 0,
        0 if rank is None else rank.stride(0), *strides, arguments.scale, arguments.softcap,
        H=heads, G=group, D=dim, DV=value_dim, CAUSAL=arguments.causal, HAS_RANK=rank is not None,
        HAS_BIAS=bias is not None, HAS_WINDOW=windows is not None,
        HAS_SOFTCAP=arguments.softcap > 0, UPCAST=DOT_UPCAST,
        BLOCK_M=tile(rows), BLOCK_D=wide[0], BLOCK_V=wide[1], BLOCK_T=block,
        BLOCK_N=tile(queries), STAGES=num_stages, SIZE=topk.TILE if kept else 0,
        OVERLAP=overlaps(q.device), num_warps=num_warps,
    )  # fmt: skip
    return shares


def _tokens(token_bytes: int) -> int:
    """Of a tile: a power of two, whose keys and values take up to TILE_BYTES."""
    return max(16, min(TILE, triton.next_power_of_2(TILE_BYTES // token_bytes + 1) // 2))


def _splits(heads: int, tiles: int, device: torch.device) -> int:
    """Shares of one KV head's keys: all run at a time, none of them for less than a tile."""
    return max(1, min(MOST_SPLITS, tiles, processors(device) // heads))
