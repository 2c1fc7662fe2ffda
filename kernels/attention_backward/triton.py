"""Attention backward on a GPU, over the tiles that the forward kernel visits.

One kernel goes from query tiles to key tiles and makes dQ, another from key tiles to query tiles
and makes dK and dV, the query heads of a KV head one after the other. Weights are computed again
from the log-sum-exp (Dao et al., FlashAttention, 2022). Nothing is added up in an order that
varies, so gradients are the same in each run; one kernel for all would add dQ with atomics.
Lists of tiles are turned around first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.attention import (
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
from fxopt.kernels._triton.common import DOT_UPCAST, dot, tile
from fxopt.kernels.attention.blocks import TileLists
from fxopt.kernels.attention.spec import Attention
from fxopt.kernels.turned_lists.triton import turned


@triton.jit
def _weights(scores, lse, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Weights of raw scores, and the derivative of the softcap at them; `lse` in powers of two."""
    slope = 1.0
    if HAS_SOFTCAP:
        capped = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2E * scale / softcap)))
        weights = tl.exp2(capped * (softcap * LOG2E) - lse)
        slope = 1.0 - capped * capped
    else:
        weights = tl.exp2(scores * (scale * LOG2E) - lse)
    return weights, slope


@triton.jit
def _load_lse(at, rows, queries):
    """In powers of two: infinite behind the last query, whose weights are 0 then, and 0 where a
    row sees nothing, as -inf - -inf is no number."""
    lse = tl.load(at + rows, mask=rows < queries, other=float("inf"))
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)


@triton.jit
def _query_gradient(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    rank_ptr, window_ptr, span_ptr, partial_count_ptr, partial_ptr, full_count_ptr, full_ptr,
    q_b, q_h, q_n, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    list_b, list_h, partial_max, full_max,
    num_heads, num_kv_heads, list_group, queries, keys, scale, softcap,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, LIST_M: tl.constexpr, LIST_N: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of a query tile, and of each of its rows the sum of output times gradient."""
    group = num_heads // num_kv_heads
    tiles = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    query_tile = tiles - 1 - (pid // group) % tiles
    kv_head = (pid // group // tiles) % num_kv_heads
    batch = pid // group // tiles // num_kv_heads
    head = kv_head * group + pid % group

    start = query_tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    window = 0
    sink_tokens = 0
    if HAS_WINDOW:
        window = tl.load(window_ptr + 2 * kv_head)
        sink_tokens = tl.load(window_ptr + 2 * kv_head + 1)
    lower, upper, last = limits(rows + (keys - queries), keys, window, CAUSAL, HAS_WINDOW)
    steps, partial, a, b, c, d, e, f = visits(
        query_tile, batch, head, kv_head, window, sink_tokens, span_ptr,
        partial_count_ptr, partial_ptr, full_count_ptr, full_ptr,
        list_b, list_h, partial_max, full_max, list_group, num_kv_heads, queries, keys,
        CAUSAL, HAS_MASK, HAS_WINDOW, LIST_M, LIST_N, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    index = visited(0, steps, partial, a, b, c, d, e, f, LIST_N, BLOCK_N)

    q = load_rows(
        q_ptr + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h, batch, head,
        start, 0, 0, q_n, q_d, queries, DIM, BLOCK_M, BLOCK_D, False, False,
    )  # fmt: skip
    place = batch.to(tl.int64) * queries * num_heads + head
    row_stride = num_heads * VALUE_DIM
    grad = load_rows(
        grad_ptr + place * VALUE_DIM, batch, head, start, 0, 0, row_stride, 1, queries,
        VALUE_DIM, BLOCK_M, BLOCK_V, False, False,
    )  # fmt: skip
    out = load_rows(
        out_ptr + place * VALUE_DIM, batch, head, start, 0, 0, row_stride, 1, queries,
        VALUE_DIM, BLOCK_M, BLOCK_V, False, False,
    )  # fmt: skip
    line = (batch.to(tl.int64) * num_heads + head) * queries
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + line + rows, delta, mask=rows < queries)
    lse = _load_lse(lse_ptr + line, rows, queries)
    rank_at = rank_ptr + batch.to(tl.int64) * keys
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for step in range(steps):
        following = visited(step + 1, steps, partial, a, b, c, d, e, f, LIST_N, BLOCK_N)
        columns = index * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(
            k_ptr, batch, kv_head, index * BLOCK_N, k_b, k_h, k_t, k_d, keys,
            DIM, BLOCK_N, BLOCK_D, TMA, EVEN,
        )  # fmt: skip
        v = load_rows(
            v_ptr, batch, kv_head, index * BLOCK_N, v_b, v_h, v_t, v_d, keys,
            VALUE_DIM, BLOCK_N, BLOCK_V, TMA, EVEN,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
        slopes = dot(grad, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
        weights, slope = _weights(scores, lse[:, None], scale, softcap, HAS_SOFTCAP)
        if step < partial:
            rank = columns + 1
            if HAS_MASK:
                rank = tl.load(rank_at + columns, mask=columns < keys, other=0)
            seen = is_seen(
                columns[None, :], lower[:, None], upper[:, None], last[:, None],
                (rank <= sink_tokens)[None, :], CAUSAL, HAS_WINDOW,
            )  # fmt: skip
            if HAS_MASK:
                seen &= (rank > 0)[None, :]
            weights = tl.where(seen, weights, 0.0)
        changes = weights * (slopes - delta[:, None]) * slope
        acc = dot(changes.to(k.dtype), k, acc, UPCAST)
        index = following

    dims = tl.arange(0, BLOCK_D)
    tl.store(
        dq_ptr + (line + rows)[:, None] * DIM + dims[None, :],
        (acc * scale).to(dq_ptr.dtype.element_ty),
        mask=(rows[:, None] < queries) & (dims[None, :] < DIM),
    )


@triton.jit
def _visitors(
    start, queries, keys, window, sink_end,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Queries [begin, end) that see a key of the tile at `start`, of which those in
    [full_begin, full_end) see all."""
    shift = keys - queries
    last = tl.minimum(start + BLOCK_N, keys) - 1
    begin = 0
    end = queries
    full_begin = 0
    full_end = queries
    if CAUSAL:
        begin = start - shift
        full_begin = last - shift
    if HAS_WINDOW and window > 0:
        if not CAUSAL:
            begin = start - window + 1 - shift
            full_begin = last - window + 1 - shift
        end = last + window - shift
        full_end = start + window - shift
        if start < sink_end:
            end = queries
            if not CAUSAL:
                begin = 0
    begin = tl.maximum(begin, 0)
    end = tl.minimum(end, queries)
    return begin, end, full_begin, full_end


@triton.jit
def _key_gradients(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    rank_ptr, window_ptr, span_ptr, begin_ptr, end_ptr, visitor_ptr,
    q_b, q_h, q_n, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    grad_b, grad_h, grad_n, list_b, list_tiles,
    batches, num_heads, num_kv_heads, list_group, queries, keys, scale, softcap,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, LIST_M: tl.constexpr, LIST_N: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of a key tile. Products are made transposed, [keys, queries]: Triton 3.6 makes
    wrong code for a product with an accumulator that was transposed."""
    group = num_heads // num_kv_heads
    # The first tiles, which hold sinks or are seen by most, take the longest and start first.
    pid = tl.program_id(0)
    start = pid // (batches * num_kv_heads) * BLOCK_N
    batch = pid % (batches * num_kv_heads) // num_kv_heads
    kv_head = pid % num_kv_heads

    columns = start + tl.arange(0, BLOCK_N)
    window = 0
    sink_tokens = 0
    if HAS_WINDOW:
        window = tl.load(window_ptr + 2 * kv_head)
        sink_tokens = tl.load(window_ptr + 2 * kv_head + 1)
    rank = columns + 1
    sink_end = tl.minimum(sink_tokens, keys)
    if HAS_MASK:
        # Hidden keys get no gradient: their rows are set to 0 at the end.
        rank = tl.load(rank_ptr + batch.to(tl.int64) * keys + columns, mask=columns < keys, other=0)
        sink_end = tl.load(span_ptr + 4 * (batch * num_kv_heads + kv_head) + 3)
    sink = (rank <= sink_tokens)[:, None]
    k = load_rows(
        k_ptr + batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h, batch, kv_head,
        start, 0, 0, k_t, k_d, keys, DIM, BLOCK_N, BLOCK_D, False, False,
    )  # fmt: skip
    v = load_rows(
        v_ptr + batch.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h, batch, kv_head,
        start, 0, 0, v_t, v_d, keys, VALUE_DIM, BLOCK_N, BLOCK_V, False, False,
    )  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    begin, end, full_begin, full_end = _visitors(
        start, queries, keys, window, sink_end, CAUSAL, HAS_WINDOW, BLOCK_N
    )
    first_tile = begin // BLOCK_M
    steps = tl.maximum(tl.cdiv(end, BLOCK_M) - first_tile, 0)
    if HAS_MASK:
        steps = tl.where(tl.max(rank, 0) > 0, steps, 0)

    for member in range(group):
        head = kv_head * group + member
        line = (batch.to(tl.int64) * num_heads + head) * queries
        if LIST_N:
            list_line = (batch * list_b + head // list_group) * list_tiles + start // LIST_N
            visitors_at = visitor_ptr + tl.load(begin_ptr + list_line)
            steps = tl.load(end_ptr + list_line) - tl.load(begin_ptr + list_line)
            steps *= LIST_M // BLOCK_M
            entry = tl.load(visitors_at, mask=steps > 0, other=0)
        for step in range(steps):
            if LIST_N:
                index = entry // 2 * (LIST_M // BLOCK_M) + step % (LIST_M // BLOCK_M)
                hidden = entry % 2 == 1
                next_step = tl.minimum(step + 1, steps - 1) // (LIST_M // BLOCK_M)
                entry = tl.load(visitors_at + next_step)
            else:
                index = first_tile + step
                behind = tl.minimum((index + 1) * BLOCK_M, queries)
                hidden = (index * BLOCK_M < full_begin) | (behind > full_end)
            rows = index * BLOCK_M + tl.arange(0, BLOCK_M)
            q = load_rows(
                q_ptr, batch, head, index * BLOCK_M, q_b, q_h, q_n, q_d, queries,
                DIM, BLOCK_M, BLOCK_D, TMA, EVEN,
            )  # fmt: skip
            grad = load_rows(
                grad_ptr, batch, head, index * BLOCK_M, grad_b, grad_h, grad_n, 1, queries,
                VALUE_DIM, BLOCK_M, BLOCK_V, TMA, EVEN,
            )  # fmt: skip
            lse = _load_lse(lse_ptr + line, rows, queries)
            delta = tl.load(delta_ptr + line + rows, mask=rows < queries, other=0.0)
            scores = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), UPCAST)
            slopes = dot(v, tl.trans(grad), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), UPCAST)
            weights, slope = _weights(scores, lse[None, :], scale, softcap, HAS_SOFTCAP)
            if hidden:
                lower, upper, last = limits(
                    rows + (keys - queries), keys, window, CAUSAL, HAS_WINDOW
                )
                seen = is_seen(
                    columns[:, None], lower[None, :], upper[None, :], last[None, :], sink,
                    CAUSAL, HAS_WINDOW,
                )  # fmt: skip
                weights = tl.where(seen, weights, 0.0)
            dv = dot(weights.to(grad.dtype), grad, dv, UPCAST)
            changes = weights * (slopes - delta[None, :]) * slope
            dk = dot(changes.to(q.dtype), q, dk, UPCAST)

    if HAS_MASK:
        dk = tl.where((rank > 0)[:, None], dk, 0.0)
        dv = tl.where((rank > 0)[:, None], dv, 0.0)
    line = (batch.to(tl.int64) * num_kv_heads + kv_head) * keys + columns
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_V)
    tl.store(
        dk_ptr + line[:, None] * DIM + dims[None, :],
        (dk * scale).to(dk_ptr.dtype.element_ty),
        mask=(columns[:, None] < keys) & (dims[None, :] < DIM),
    )
    tl.store(
        dv_ptr + line[:, None] * VALUE_DIM + value_dims[None, :],
        dv.to(dv_ptr.dtype.element_ty),
        mask=(columns[:, None] < keys) & (value_dims[None, :] < VALUE_DIM),
    )


def attention_gradients(
    gradient: Tensor, out: Tensor, lse: Tensor, call: Attention, lists: TileLists | None = None,
    sizes: tuple[dict[str, int], dict[str, int]] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of q, k, v and, where they are given, the sink logits; contiguous, in their dtypes.

    `gradient` and `out` [B, N, H, Dv], `lse` [B, H, N] as `attention_forward` returns it for the
    same call and lists, which have no bias. `sizes`, of the kernel for dQ and of that for dK and
    dV, replace those of `sizes_for`.
    """
    assert call.bias is None
    q, k, v = call.q, call.k, call.v
    batch, heads, queries, dim = q.shape
    kv, keys, value_dim = v.shape[1:]
    gradient, out, lse = gradient.contiguous(), out.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    rank = None if call.mask is None else rank_of(call.mask)
    rows_of_gradient = gradient.transpose(1, 2)
    described = all(map(has_rows, (q, k, v, rows_of_gradient)))
    hopper = described and is_hopper(q.device)
    by_query, by_key = sizes or sizes_for(dim, value_dim, q.element_size(), hopper)
    tensors = (
        q if rank is None else rank,
        q if call.dense else choices(call.window, call.sink_tokens, q.device),
        q if rank is None else spans_of(rank, call.sink_tokens),
    )
    strides = (*q.stride(), *k.stride(), *v.stride())
    scalars = (queries, keys, float(call.scale), float(call.softcap))
    group = heads if lists is None else heads // lists.num_heads
    flags = {
        "CAUSAL": call.causal, "HAS_MASK": rank is not None, "HAS_WINDOW": not call.dense,
        "HAS_SOFTCAP": call.softcap > 0,
        "LIST_M": 0 if lists is None else lists.query_tile,
        "LIST_N": 0 if lists is None else lists.key_tile,
        "DIM": dim, "VALUE_DIM": value_dim, "UPCAST": DOT_UPCAST,
        "BLOCK_D": tile(dim, most=1024), "BLOCK_V": tile(value_dim, most=1024),
    }  # fmt: skip

    def rows(x: Tensor, block: str, channels: str, of: dict[str, int]) -> Tensor:
        return descriptor(x, of[block], flags[channels]) if of["TMA"] else x

    by_query = _within(by_query, lists) | {"EVEN": keys % by_query["BLOCK_N"] == 0}
    _query_gradient[(triton.cdiv(queries, by_query["BLOCK_M"]) * batch * heads,)](
        q, rows(k, "BLOCK_N", "BLOCK_D", by_query), rows(v, "BLOCK_N", "BLOCK_V", by_query),
        out, gradient, lse, delta, dq, *tensors,
        *((q, q, q, q) if lists is None else lists.tensors()), *strides,
        *((0, 0, 0, 0) if lists is None else lists.strides()), heads, kv, group, *scalars,
        **flags, **by_query,
    )  # fmt: skip
    by_key = _within(by_key, lists) | {"EVEN": queries % by_key["BLOCK_M"] == 0}
    turns = None if lists is None else turned(lists, keys)
    lines = 0 if lists is None or lists.partial.shape[0] == 1 else lists.num_heads
    _key_gradients[(triton.cdiv(keys, by_key["BLOCK_N"]) * batch * kv,)](
        rows(q, "BLOCK_M", "BLOCK_D", by_key), k, v,
        rows(rows_of_gradient, "BLOCK_M", "BLOCK_V", by_key), lse, delta, dk, dv, *tensors,
        *((q, q, q) if turns is None else (turns.begin, turns.end, turns.visitor)), *strides,
        *rows_of_gradient.stride()[:3], lines, 0 if turns is None else turns.begin.shape[1],
        batch, heads, kv, group, *scalars,
        **flags, **by_key,
    )  # fmt: skip
    found = {"q": dq, "k": dk, "v": dv}
    if call.sinks is not None:
        weights = torch.exp(call.sinks.float()[None, :, None] - lse)
        found["sinks"] = -(weights * delta).sum((0, 2)).to(call.sinks.dtype)
    return found


# BLOCK_M, BLOCK_N, num_warps, num_stages by the larger head size, of the kernel for dQ and of that
# for dK and dV.
HOPPER_SIZES = {
    64: ((128, 64, 4, 2), (64, 128, 8, 2)),
    128: ((128, 64, 8, 3), (64, 64, 4, 2)),
    256: ((64, 64, 8, 2), (64, 64, 8, 2)),
}


def sizes_for(
    dim: int, value_dim: int, element_size: int, hopper: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes, warps, stages and whether rows come through tensor descriptors (TMA)."""
    widest = tile(max(dim, value_dim), most=1024)
    if hopper and element_size == 2 and widest <= 256:
        chosen, tma = HOPPER_SIZES[max(64, widest)], 1
    else:
        # Exact float32 products run outside the tensor cores, element by element.
        edge = 32 if element_size == 4 or widest > 128 else 64
        chosen, tma = ((edge, edge, 4, 2),) * 2, 0
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    by_query, by_key = (dict(zip(names, c, strict=True)) | {"TMA": tma} for c in chosen)
    return by_query, by_key


def _within(sizes: dict[str, int], lists: TileLists | None) -> dict[str, int]:
    """No tile of a kernel lies in two of the lists'."""
    if lists is None:
        return sizes
    return sizes | {
        "BLOCK_M": min(sizes["BLOCK_M"], lists.query_tile),
        "BLOCK_N": min(sizes["BLOCK_N"], lists.key_tile),
    }
