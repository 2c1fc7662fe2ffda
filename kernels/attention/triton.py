"""Attention forward on a GPU: output and log-sum-exp, over the key tiles that a query sees.

One program makes BLOCK_M rows of one query head. It visits partial tiles first (diagonal, edges
of the window, sink tokens, ragged end), where each score is compared with the mask, then full
tiles, where none is. Which tiles these are follows from causality, window and sink by arithmetic,
or stands in lists. With limits, a full tile behind the first is left out where no row can mind; see
`skip`. Softmax runs online (Milakov and Gimelshein, 2018; Dao et al.,
FlashAttention, 2022), in float32 and powers of two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.attention import (
    LOG2E,
    choices,
    descriptor,
    has_rows,
    is_hopper,
    is_seen,
    limits,
    load_rows,
    rank_of,
    spans_of,
    visited,
    visits,
)
from .._triton.common import DOT_UPCAST, dot, tile
from . import skip as skipping
from .blocks import TileLists
from .spec import Attention


@triton.jit
def _visit(
    index, hidden, bound, acc, highest, total, q, rows, lower, upper, last, limit, batch, kv_head,
    k_ptr, v_ptr, rank_at, bias_at,
    k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, bias_n, bias_t,
    queries, keys, scale, softcap, sink_tokens,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SKIPS: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One key tile; `hidden`: whether some row does not see all of it; `bound`: whether it is
    computed whatever its scores are."""
    start = index * BLOCK_N
    columns = start + tl.arange(0, BLOCK_N)
    k = load_rows(
        k_ptr, batch, kv_head, start, k_b, k_h, k_t, k_d, keys, DIM, BLOCK_N, BLOCK_D, TMA, EVEN
    )
    scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
    # Scores are left as they are where one factor brings them to powers of two.
    factor = scale * LOG2E
    if HAS_SOFTCAP:
        # softcap * tanh(scores / softcap)
        grown = 1.0 + tl.exp2(scores * (2.0 * LOG2E * scale / softcap))
        scores = softcap * LOG2E - (2.0 * LOG2E * softcap) / grown
        factor = 1.0
    if HAS_BIAS:
        bias = tl.load(
            bias_at + rows[:, None].to(tl.int64) * bias_n + columns[None, :].to(tl.int64) * bias_t,
            mask=(rows[:, None] < queries) & (columns[None, :] < keys), other=0.0,
        )  # fmt: skip
        scores = scores * factor + bias.to(tl.float32) * LOG2E
        factor = 1.0
    if hidden:
        rank = columns + 1
        if HAS_MASK:
            rank = tl.load(rank_at + columns, mask=columns < keys, other=0)
        seen = is_seen(
            columns[None, :], lower[:, None], upper[:, None], last[:, None],
            (rank <= sink_tokens)[None, :], CAUSAL, HAS_WINDOW,
        )  # fmt: skip
        if HAS_MASK:
            seen &= (rank > 0)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    largest = tl.max(scores, 1) * factor
    matters = True
    if SKIPS:
        some = (largest >= highest - limit) & (rows < queries)
        matters = bound | (tl.max(some.to(tl.int32), 0) > 0)
    if matters:
        higher = tl.maximum(highest, largest)
        # Rows that have seen nothing stay at -inf, and -inf - -inf is no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * factor - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, 1)
        v = load_rows(
            v_ptr, batch, kv_head, start, v_b, v_h, v_t, v_d, keys,
            VALUE_DIM, BLOCK_N, BLOCK_V, TMA, EVEN,
        )  # fmt: skip
        acc = dot(weights.to(v.dtype), v, acc * shrink[:, None], UPCAST)
        highest = higher
    return acc, highest, total


@triton.jit
def _attention_forward(
    q_ptr, k_ptr, v_ptr, rank_ptr, bias_ptr, sinks_ptr, window_ptr, limit_ptr, span_ptr,
    partial_count_ptr, partial_ptr, full_count_ptr, full_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_n, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    bias_b, bias_h, bias_n, bias_t, list_b, list_h, partial_max, full_max,
    num_heads, num_kv_heads, list_group, queries, keys, first_position, row_step, scale, softcap,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    SKIPS: tl.constexpr,
    LIST_M: tl.constexpr, LIST_N: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Heads that share keys run next to each other, and the longest rows first.
    group = num_heads // num_kv_heads
    tiles = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    query_tile = tiles - 1 - (pid // group) % tiles
    kv_head = (pid // group // tiles) % num_kv_heads
    batch = pid // group // tiles // num_kv_heads
    head = kv_head * group + pid % group

    rows = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    window = 0
    sink_tokens = 0
    if HAS_WINDOW:
        window = tl.load(window_ptr + 2 * kv_head)
        sink_tokens = tl.load(window_ptr + 2 * kv_head + 1)
    lower, upper, last = limits(first_position + rows * row_step, keys, window, CAUSAL, HAS_WINDOW)

    steps, partial, a, b, c, d, e, f = visits(
        query_tile, batch, head, kv_head, window, sink_tokens, span_ptr,
        partial_count_ptr, partial_ptr, full_count_ptr, full_ptr,
        list_b, list_h, partial_max, full_max, list_group, num_kv_heads, queries, keys,
        CAUSAL, HAS_MASK, HAS_WINDOW, LIST_M, LIST_N, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    index = visited(0, steps, partial, a, b, c, d, e, f, LIST_N, BLOCK_N)

    q = load_rows(
        q_ptr + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h, batch, head,
        query_tile * BLOCK_M, 0, 0, q_n, q_d, queries, DIM, BLOCK_M, BLOCK_D, False, False,
    )  # fmt: skip
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        highest = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    limit = 0.0
    if SKIPS:
        limit = tl.load(limit_ptr + head) * LOG2E
    rank_at = rank_ptr + batch.to(tl.int64) * keys
    bias_at = bias_ptr + batch.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h

    for step in range(steps):
        following = visited(step + 1, steps, partial, a, b, c, d, e, f, LIST_N, BLOCK_N)
        acc, highest, total = _visit(
            index, step < partial, step <= partial, acc, highest, total,
            q, rows, lower, upper, last, limit, batch, kv_head, k_ptr, v_ptr, rank_at, bias_at,
            k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, bias_n, bias_t,
            queries, keys, scale, softcap, sink_tokens,
            CAUSAL, HAS_MASK, HAS_BIAS, HAS_WINDOW, HAS_SOFTCAP, SKIPS, TMA, EVEN,
            DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, UPCAST,
        )  # fmt: skip
        index = following

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (highest + tl.log2(total)) * 0.6931471805599453
    value_dims = tl.arange(0, BLOCK_V)
    place = (batch.to(tl.int64) * queries + rows) * num_heads + head
    tl.store(
        out_ptr + place[:, None] * VALUE_DIM + value_dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(rows[:, None] < queries) & (value_dims[None, :] < VALUE_DIM),
    )
    line = (batch.to(tl.int64) * num_heads + head) * queries
    tl.store(lse_ptr + line + rows, lse, mask=rows < queries)


def attention_forward(
    call: Attention, lists: TileLists | None = None, first: int | None = None, step: int = 1,
    **sizes: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, N, H, Dv] in q's dtype and log-sum-exp [B, H, N] in float32.

    Takes float32, float16 and bfloat16, any strides, head sizes up to 256; at least one key.
    With `lists`, only their tiles are visited; query i may then stand at position
    `first` + i * `step` instead of i + T - N. `sizes` replace those of `tiles_for`.
    """
    call = with_positive_scale(call)
    q, k, v = call.q, call.k, call.v
    batch, heads, queries, dim = q.shape
    kv, keys, value_dim = v.shape[1:]
    out = torch.empty((batch, queries, heads, value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    rank = None if call.mask is None else rank_of(call.mask)
    bias = None if call.bias is None else call.bias.expand(batch, heads, queries, keys)
    has_window = not call.dense
    described = has_rows(k) and has_rows(v)
    # With a bias, 128 channels in 4 warps spill thousands of bytes (compiled, not timed).
    hopper = described and is_hopper(q.device) and (bias is None or max(dim, value_dim) <= 64)
    chosen: dict[str, Any] = tiles_for(dim, value_dim, queries, q.element_size(), hopper)
    skips = any(call.skip)
    if skips:
        # Tiles that are left out have a size that all backends share.
        chosen |= skip_tiles(chosen)
    chosen |= sizes
    if lists is not None:
        chosen["BLOCK_M"] = min(chosen["BLOCK_M"], lists.query_tile)
        chosen["BLOCK_N"] = min(chosen["BLOCK_N"], lists.key_tile)
    tma = bool(chosen.pop("TMA")) and described
    rows_k = descriptor(k, chosen["BLOCK_N"], chosen["BLOCK_D"]) if tma else k
    rows_v = descriptor(v, chosen["BLOCK_N"], chosen["BLOCK_V"]) if tma else v
    grid = (triton.cdiv(queries, chosen["BLOCK_M"]) * batch * heads,)
    # Absent tensors are never read; q stands in for their pointers.
    _attention_forward[grid](
        q, rows_k, rows_v,
        q if rank is None else rank,
        q if bias is None else bias,
        q if call.sinks is None else call.sinks.contiguous(),
        choices(call.window, call.sink_tokens, q.device) if has_window else q,
        skipping.limits_on(q.device, call.skip) if skips else q,
        q if rank is None else spans_of(rank, call.sink_tokens),
        *((q, q, q, q) if lists is None else lists.tensors()),
        out, lse,
        *q.stride(), *k.stride(), *v.stride(), *((0, 0, 0, 0) if bias is None else bias.stride()),
        *((0, 0, 0, 0) if lists is None else lists.strides()),
        heads, kv, heads if lists is None else heads // lists.num_heads,
        queries, keys, call.offset if first is None else first, step,
        float(call.scale), float(call.softcap),
        CAUSAL=call.causal, HAS_MASK=rank is not None, HAS_BIAS=bias is not None,
        HAS_SINKS=call.sinks is not None, HAS_WINDOW=has_window, HAS_SOFTCAP=call.softcap > 0,
        SKIPS=skips,
        LIST_M=0 if lists is None else lists.query_tile,
        LIST_N=0 if lists is None else lists.key_tile,
        TMA=tma, EVEN=keys % chosen["BLOCK_N"] == 0,
        DIM=dim, VALUE_DIM=value_dim, UPCAST=DOT_UPCAST, **chosen,
    )  # fmt: skip
    return out, lse


# Measured on Hopper, bfloat16, by benchmarks/attention_sweep.py: the larger head size to
# BLOCK_M, BLOCK_N, num_warps, num_stages; 16 and 32 are taken from 64. Only with tensor
# descriptors: without them, 4 warps of 128 rows take 2.8 times as long.
HOPPER_TILES = {
    16: (64, 128, 4, 2),
    32: (64, 128, 4, 2),
    64: (64, 128, 4, 2),
    128: (128, 64, 4, 2),
    256: (128, 64, 8, 2),
}


def tiles_for(
    dim: int, value_dim: int, queries: int, element_size: int, hopper: bool
) -> dict[str, int]:
    """Tile sizes, warps, stages, and whether keys come through tensor descriptors (TMA).

    `hopper`: the device has them, and the call is one that HOPPER_TILES is for.
    """
    block_d, block_v = tile(dim, most=1024), tile(value_dim, most=1024)
    widest = max(block_d, block_v)
    blocks = {"BLOCK_D": block_d, "BLOCK_V": block_v}
    if hopper and element_size == 2 and queries > 64 and widest in HOPPER_TILES:
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        return blocks | dict(zip(names, HOPPER_TILES[widest], strict=True)) | {"TMA": 1}
    # Exact float32 products run outside the tensor cores, element by element.
    small = element_size == 4 or widest > 128
    return blocks | {
        "BLOCK_M": tile(queries, most=64 if small else 128),
        "BLOCK_N": 32 if small else 64,
        "num_warps": 8 if widest > 64 and queries > 64 else 4,
        "num_stages": 2,
        "TMA": 0,
    }


def skip_tiles(chosen: dict[str, int]) -> dict[str, int]:
    """What replaces entries of `tiles_for` where tiles are left out: of a call of many queries."""
    wide = max(chosen["BLOCK_D"], chosen["BLOCK_V"]) > 64
    sizes = {"BLOCK_M": skipping.QUERY_TILE, "BLOCK_N": skipping.KEY_TILE}
    if chosen["TMA"]:
        return sizes
    return sizes | {"num_warps": 8 if wide else 4, "num_stages": 2}


def skip_bytes(dim: int, value_dim: int, element_size: int) -> int:
    """Shared memory of a program that leaves tiles out: its queries, one tile of keys, one of
    values, the weights of a tile, and a number a row to reduce over warps. What Triton 3.6 allots
    without tensor descriptors, for 16 bits to the byte."""
    high, wide = skipping.QUERY_TILE, skipping.KEY_TILE
    block_d, block_v = tile(dim, most=1024), tile(value_dim, most=1024)
    return element_size * (high * block_d + wide * (block_d + block_v) + high * wide) + 4 * high


def with_positive_scale(call: Attention) -> Attention:
    """The kernel takes the maximum before it scales."""
    if call.scale > 0:
        return call
    return replace(call, q=call.q * (-1.0 if call.scale < 0 else 0.0), scale=abs(call.scale) or 1.0)
