"""Attention forward on a GPU: output and log-sum-exp, skipping tiles that no query sees.

One program makes BLOCK_M rows of one query head. It walks key tiles: those of the sink tokens,
then those of the window, so that time follows the window. Softmax runs online (Milakov and
Gimelshein, 2018; Dao et al., FlashAttention, 2022), in float32 and powers of two.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.common import DOT_UPCAST, dot, tile
from .spec import Attention


@triton.jit
def _attention_forward(
    q_ptr, k_ptr, v_ptr, rank_ptr, bias_ptr, sinks_ptr, window_ptr, span_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_n, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    bias_b, bias_h, bias_n, bias_t,
    num_heads, num_kv_heads, queries, keys, scale, softcap,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    kv_head = head // (num_heads // num_kv_heads)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = rows + (keys - queries)
    first = tl.program_id(0) * BLOCK_M + keys - queries
    last = tl.minimum(tl.program_id(0) * BLOCK_M + BLOCK_M, queries) - 1 + keys - queries
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_V)

    window = 0
    sink_tokens = 0
    if HAS_WINDOW:
        window = tl.load(window_ptr + 2 * kv_head)
        sink_tokens = tl.load(window_ptr + 2 * kv_head + 1)
    # Keys [begin, end) by causality, window and padding; sink tokens lie in [sink, sink_end).
    begin = 0
    end = keys
    sink = 0
    sink_end = 0
    if HAS_MASK:
        begin = tl.load(span_ptr + 2 * (batch * num_kv_heads + kv_head))
        if HAS_WINDOW:
            sink = begin
            sink_end = tl.load(span_ptr + 2 * (batch * num_kv_heads + kv_head) + 1)
    elif HAS_WINDOW:
        sink_end = tl.minimum(sink_tokens, keys)
    if HAS_WINDOW and window > 0:
        begin = tl.maximum(begin, first - window + 1)
        if not CAUSAL:
            end = tl.minimum(end, last + window)
    if CAUSAL:
        end = tl.minimum(end, last + 1)
        sink_end = tl.minimum(sink_end, last + 1)
    begin_tile = tl.maximum(begin, 0) // BLOCK_N
    end_tile = tl.maximum(tl.cdiv(tl.maximum(end, 0), BLOCK_N), begin_tile)
    sink_tile = sink // BLOCK_N
    sink_tiles = tl.maximum(tl.cdiv(tl.maximum(sink_end, 0), BLOCK_N) - sink_tile, 0)
    # Ranges that touch become one, so that no tile is visited twice.
    touch = (sink_tile <= end_tile) & (sink_tile + sink_tiles >= begin_tile)
    if (sink_tiles > 0) & touch:
        end_tile = tl.maximum(end_tile, sink_tile + sink_tiles)
        begin_tile = tl.minimum(begin_tile, sink_tile)
        sink_tiles = 0

    q_mask = (rows[:, None] < queries) & (dims[None, :] < DIM)
    q_at = q_ptr + batch * q_b + head * q_h
    q = tl.load(
        q_at + rows[:, None].to(tl.int64) * q_n + dims[None, :] * q_d, mask=q_mask, other=0.0
    )
    k_at = k_ptr + batch * k_b + kv_head * k_h
    v_at = v_ptr + batch * v_b + kv_head * v_h

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        logit = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        highest = tl.zeros([BLOCK_M], tl.float32) + logit
        total += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    for step in range(0, sink_tiles + end_tile - begin_tile):
        index = tl.where(step < sink_tiles, sink_tile + step, begin_tile + step - sink_tiles)
        columns = index * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = columns < keys
        at = columns.to(tl.int64)
        k = tl.load(
            k_at + at[None, :] * k_t + dims[:, None] * k_d,
            mask=inside[None, :] & (dims[:, None] < DIM), other=0.0,
        )  # fmt: skip
        scores = dot(q, k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST) * scale
        if HAS_SOFTCAP:
            # softcap * tanh(scores / softcap)
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        if HAS_BIAS:
            bias_at = bias_ptr + batch * bias_b + head * bias_h + at[None, :] * bias_t
            scores += tl.load(
                bias_at + rows[:, None].to(tl.int64) * bias_n,
                mask=(rows[:, None] < queries) & inside[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip

        seen = inside[None, :] & (rows[:, None] < queries)
        rank = columns + 1
        if HAS_MASK:
            rank = tl.load(rank_ptr + batch * keys + at, mask=inside, other=0)
            seen &= (rank > 0)[None, :]
        if CAUSAL:
            seen &= columns[None, :] <= positions[:, None]
        if HAS_WINDOW:
            distance = positions[:, None] - columns[None, :]
            near = (distance < window) & (distance > -window)
            seen &= near | (rank <= sink_tokens)[None, :] | (window == 0)
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))

        higher = tl.maximum(highest, tl.max(scores, 1))
        # Rows that have seen nothing stay at -inf, and -inf - -inf is no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(
            v_at + at[:, None] * v_t + value_dims[None, :] * v_d,
            mask=inside[:, None] & (value_dims[None, :] < VALUE_DIM), other=0.0,
        )  # fmt: skip
        acc = dot(weights.to(v.dtype), v, acc * shrink[:, None], UPCAST)
        highest = higher

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (highest + tl.log2(total)) * 0.6931471805599453
    place = (batch * queries + rows) * num_heads + head
    tl.store(
        out_ptr + place[:, None] * VALUE_DIM + value_dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(rows[:, None] < queries) & (value_dims[None, :] < VALUE_DIM),
    )
    tl.store(lse_ptr + (batch * num_heads + head) * queries + rows, lse, mask=rows < queries)


def attention_forward(call: Attention) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, Dv] in q's dtype and log-sum-exp [B, H, N] in float32.

    Takes float32, float16 and bfloat16, any strides, head sizes up to 256; at least one key.
    """
    q, k, v = call.q, call.k, call.v
    batch, heads, queries, dim = q.shape
    kv, keys, value_dim = v.shape[1:]
    out = torch.empty((batch, queries, heads, value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    rank = None if call.mask is None else _rank(call.mask)
    bias = None if call.bias is None else call.bias.expand(batch, heads, queries, keys)
    has_window = not call.dense
    sizes = tiles_for(dim, value_dim, queries, q.element_size())
    grid = (triton.cdiv(queries, sizes["BLOCK_M"]), batch * heads)
    # Absent tensors are never read; q stands in for their pointers.
    _attention_forward[grid](
        q, k, v,
        q if rank is None else rank,
        q if bias is None else bias,
        q if call.sinks is None else call.sinks,
        _choices(call.window, call.sink_tokens, q.device) if has_window else q,
        q if rank is None else _spans(rank, call.sink_tokens),
        out, lse,
        *q.stride(), *k.stride(), *v.stride(), *((0, 0, 0, 0) if bias is None else bias.stride()),
        heads, kv, queries, keys, call.scale, call.softcap,
        CAUSAL=call.causal, HAS_MASK=rank is not None, HAS_BIAS=bias is not None,
        HAS_SINKS=call.sinks is not None, HAS_WINDOW=has_window, HAS_SOFTCAP=call.softcap > 0,
        DIM=dim, VALUE_DIM=value_dim, UPCAST=DOT_UPCAST, **sizes,
    )  # fmt: skip
    return out, lse


def tiles_for(dim: int, value_dim: int, queries: int, element_size: int) -> dict[str, int]:
    """Tile sizes, warps and stages that fit registers and shared memory of sm_80 and later."""
    block_d, block_v = tile(dim, most=1024), tile(value_dim, most=1024)
    # Exact float32 products run outside the tensor cores, element by element.
    small = element_size == 4 or max(block_d, block_v) > 128
    return {
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
        "BLOCK_M": tile(queries, most=64 if small else 128),
        "BLOCK_N": 32 if small else 64,
        "num_warps": 8 if max(block_d, block_v) > 64 and queries > 64 else 4,
        "num_stages": 2,
    }


def _rank(mask: Tensor) -> Tensor:
    """[B, T] int32: how many unmasked keys there are up to each one; 0 for masked ones."""
    unmasked = mask != 0
    return (unmasked.cumsum(1) * unmasked).to(torch.int32)


def _spans(rank: Tensor, sink_tokens: tuple[int, ...]) -> Tensor:
    """[B, KV, 2] int32: the first unmasked key, and the one behind the last sink token."""
    positions = torch.arange(rank.shape[1], device=rank.device, dtype=torch.int32)
    first = torch.where(rank > 0, positions, rank.shape[1]).amin(1)
    limits = _choices(sink_tokens, sink_tokens, rank.device)[:, 0]
    sinks = (rank[:, None] > 0) & (rank[:, None] <= limits[None, :, None])
    behind = torch.where(sinks, positions + 1, 0).amax(2)
    return torch.stack([first[:, None].expand_as(behind), behind], -1).to(torch.int32).contiguous()


@functools.cache
def _choices(window: tuple[int, ...], sink_tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """[KV, 2] int32 on the device; kept, so that a captured CUDA graph copies nothing."""
    return torch.tensor([window, sink_tokens], dtype=torch.int32).T.contiguous().to(device)
