"""Attention forward on a GPU: output and log-sum-exp, over the key tiles that a query sees.

One program makes BLOCK_M rows of one query head. It visits partial tiles first (diagonal, edges
of the window, sink tokens, ragged end), where each score is compared with the mask, then full
tiles, where none is. Which tiles these are follows from causality, window and sink by arithmetic,
or stands in lists. Softmax runs online (Milakov and Gimelshein, 2018; Dao et al.,
FlashAttention, 2022), in float32 and powers of two.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._triton.common import DOT_UPCAST, dot, tile
from .blocks import TileLists
from .spec import Attention

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _ranges(
    first, last, begin, solid_begin, solid_end, sink_end, keys, window,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Key tiles that positions [first, last] see: sink tiles, then [begin, end) around the window.

    Of these, [full_begin, full_end) are seen whole by every row. Keys before `begin` are padding,
    those in [solid_begin, solid_end) are certainly not.
    """
    end = keys
    sink = begin
    full_begin = solid_begin
    full_end = solid_end
    if HAS_WINDOW and window > 0:
        begin = tl.maximum(begin, first - window + 1)
        full_begin = tl.maximum(full_begin, last - window + 1)
        if not CAUSAL:
            end = tl.minimum(end, last + window)
            full_end = tl.minimum(full_end, first + window)
    if CAUSAL:
        end = tl.minimum(end, last + 1)
        full_end = tl.minimum(full_end, first + 1)
        sink_end = tl.minimum(sink_end, last + 1)
    begin_tile = begin // BLOCK_N
    end_tile = tl.maximum(tl.cdiv(tl.maximum(end, 0), BLOCK_N), begin_tile)
    sink_tile = sink // BLOCK_N
    sink_tiles = tl.maximum(tl.cdiv(tl.maximum(sink_end, 0), BLOCK_N) - sink_tile, 0)
    # Ranges that touch become one, so that no tile is visited twice.
    touch = (sink_tile <= end_tile) & (sink_tile + sink_tiles >= begin_tile)
    if (sink_tiles > 0) & touch:
        end_tile = tl.maximum(end_tile, sink_tile + sink_tiles)
        begin_tile = tl.minimum(begin_tile, sink_tile)
        sink_tiles = 0
    full_begin = tl.maximum(tl.cdiv(tl.maximum(full_begin, 0), BLOCK_N), begin_tile)
    full_begin = tl.minimum(full_begin, end_tile)
    full_end = tl.minimum(tl.maximum(full_end, 0) // BLOCK_N, end_tile)
    full_end = tl.maximum(full_end, full_begin)
    return sink_tile, sink_tiles, begin_tile, end_tile, full_begin, full_end


@triton.jit
def _range_tile(step, sink_tile, sink_tiles, begin_tile, end_tile, full_begin, full_end):
    """The tile of a step: sink, before the full range, behind it, then the full range."""
    before = full_begin - begin_tile
    partial = sink_tiles + before + end_tile - full_end
    index = tl.where(step < sink_tiles, sink_tile + step, begin_tile + step - sink_tiles)
    index += tl.where(step >= sink_tiles + before, full_end - full_begin, 0)
    return tl.where(step >= partial, full_begin + step - partial, index)


@triton.jit
def _listed_tile(step, partial, total, partial_at, full_at, SPLITS: tl.constexpr):
    """The tile of a step from the lists, whose tiles hold SPLITS tiles of the kernel."""
    step = tl.minimum(step, total - 1)
    at = tl.where(step < partial, partial_at + step // SPLITS, full_at + (step - partial) // SPLITS)
    # An empty row still asks once, for a tile that it does not visit.
    return tl.load(at, mask=total > 0, other=0) * SPLITS + step % SPLITS


@triton.jit
def load_rows(
    source, batch, head, start, stride_b, stride_h, stride_t, stride_d, size,
    DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + BLOCK) of one head, [BLOCK, BLOCK_D]; zeros outside."""
    if TMA:
        block = source.load([batch, head, start, 0]).reshape(BLOCK, BLOCK_D)
    else:
        base = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        rows = tl.arange(0, BLOCK)
        dims = tl.arange(0, BLOCK_D)
        at = base + start.to(tl.int64) * stride_t + rows[:, None] * stride_t + dims * stride_d
        if EVEN and DIM == BLOCK_D:
            block = tl.load(at)
        else:
            block = tl.load(at, mask=(start + rows < size)[:, None] & (dims < DIM), other=0.0)
    return block


@triton.jit
def _limits(positions, keys, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The first and the last key that each row sees, sink tokens and padding aside."""
    lower = tl.zeros_like(positions)
    upper = lower + keys - 1
    if CAUSAL:
        upper = tl.minimum(upper, positions)
    if HAS_WINDOW and window > 0:
        lower = positions - window + 1
        upper = tl.minimum(upper, positions + window - 1)
    return lower, upper


@triton.jit
def _hide(
    scores, columns, lower, upper, rank_at, keys, sink_tokens,
    HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """-inf where a row does not see a key."""
    seen = columns[None, :] <= upper[:, None]
    rank = columns + 1
    if HAS_MASK:
        rank = tl.load(rank_at + columns, mask=columns < keys, other=0)
        seen &= (rank > 0)[None, :]
    if HAS_WINDOW:
        seen &= (columns[None, :] >= lower[:, None]) | (rank <= sink_tokens)[None, :]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _visit(
    index, hidden, acc, highest, total, q, rows, lower, upper, batch, kv_head,
    k_ptr, v_ptr, rank_at, bias_at,
    k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, bias_n, bias_t,
    queries, keys, scale, softcap, sink_tokens,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One key tile; `hidden`: whether some row does not see all of it."""
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
        scores = _hide(
            scores, columns, lower, upper, rank_at, keys, sink_tokens, HAS_MASK, HAS_WINDOW
        )
    higher = tl.maximum(highest, tl.max(scores, 1) * factor)
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
    return acc, higher, total


@triton.jit
def _attention_forward(
    q_ptr, k_ptr, v_ptr, rank_ptr, bias_ptr, sinks_ptr, window_ptr, span_ptr,
    partial_count_ptr, partial_ptr, full_count_ptr, full_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_n, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    bias_b, bias_h, bias_n, bias_t, list_b, list_h, partial_max, full_max,
    num_heads, num_kv_heads, list_group, queries, keys, scale, softcap,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
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
    lower, upper = _limits(rows + (keys - queries), keys, window, CAUSAL, HAS_WINDOW)

    if LIST_N:
        list_tile = query_tile * BLOCK_M // LIST_M
        line = batch * list_b + head // list_group * list_h + list_tile
        partial_at = partial_ptr + line.to(tl.int64) * partial_max
        full_at = full_ptr + line.to(tl.int64) * full_max
        partial = tl.load(partial_count_ptr + line) * (LIST_N // BLOCK_N)
        steps = partial + tl.load(full_count_ptr + line) * (LIST_N // BLOCK_N)
        index = _listed_tile(0, partial, steps, partial_at, full_at, LIST_N // BLOCK_N)
    else:
        begin = 0
        solid_begin = 0
        solid_end = keys
        sink_end = tl.minimum(sink_tokens, keys)
        if HAS_MASK:
            span_at = span_ptr + 4 * (batch * num_kv_heads + kv_head)
            begin = tl.load(span_at)
            solid_begin = tl.load(span_at + 1)
            solid_end = tl.load(span_at + 2)
            sink_end = tl.load(span_at + 3)
        first = query_tile * BLOCK_M + keys - queries
        last = tl.minimum(query_tile * BLOCK_M + BLOCK_M, queries) - 1 + keys - queries
        sink_tile, sink_tiles, begin_tile, end_tile, full_begin, full_end = _ranges(
            first, last, begin, solid_begin, solid_end, sink_end, keys, window,
            CAUSAL, HAS_WINDOW, BLOCK_N,
        )  # fmt: skip
        steps = sink_tiles + end_tile - begin_tile
        partial = steps - (full_end - full_begin)
        index = _range_tile(0, sink_tile, sink_tiles, begin_tile, end_tile, full_begin, full_end)

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
    rank_at = rank_ptr + batch.to(tl.int64) * keys
    bias_at = bias_ptr + batch.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h

    for step in range(steps):
        if LIST_N:
            following = _listed_tile(
                step + 1, partial, steps, partial_at, full_at, LIST_N // BLOCK_N
            )
        else:
            following = _range_tile(
                step + 1, sink_tile, sink_tiles, begin_tile, end_tile, full_begin, full_end
            )
        acc, highest, total = _visit(
            index, step < partial, acc, highest, total,
            q, rows, lower, upper, batch, kv_head, k_ptr, v_ptr, rank_at, bias_at,
            k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, bias_n, bias_t,
            queries, keys, scale, softcap, sink_tokens,
            HAS_MASK, HAS_BIAS, HAS_WINDOW, HAS_SOFTCAP, TMA, EVEN,
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
    call: Attention, lists: TileLists | None = None, **sizes: int
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, Dv] in q's dtype and log-sum-exp [B, H, N] in float32.

    Takes float32, float16 and bfloat16, any strides, head sizes up to 256; at least one key.
    With `lists`, only their tiles are visited. `sizes` replace those of `tiles_for`.
    """
    call = with_positive_scale(call)
    q, k, v = call.q, call.k, call.v
    batch, heads, queries, dim = q.shape
    kv, keys, value_dim = v.shape[1:]
    out = torch.empty((batch, queries, heads, value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    rank = None if call.mask is None else _rank(call.mask)
    bias = None if call.bias is None else call.bias.expand(batch, heads, queries, keys)
    has_window = not call.dense
    described = has_rows(k) and has_rows(v)
    # With a bias, 128 channels in 4 warps spill thousands of bytes (compiled, not timed).
    hopper = described and is_hopper(q.device) and (bias is None or max(dim, value_dim) <= 64)
    chosen: dict[str, Any] = tiles_for(dim, value_dim, queries, q.element_size(), hopper)
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
        q if call.sinks is None else call.sinks,
        _choices(call.window, call.sink_tokens, q.device) if has_window else q,
        q if rank is None else _spans(rank, call.sink_tokens),
        *((q, q, q, q) if lists is None else lists.tensors()),
        out, lse,
        *q.stride(), *k.stride(), *v.stride(), *((0, 0, 0, 0) if bias is None else bias.stride()),
        *((0, 0, 0, 0) if lists is None else lists.strides()),
        heads, kv, heads if lists is None else heads // lists.num_heads,
        queries, keys, float(call.scale), float(call.softcap),
        CAUSAL=call.causal, HAS_MASK=rank is not None, HAS_BIAS=bias is not None,
        HAS_SINKS=call.sinks is not None, HAS_WINDOW=has_window, HAS_SOFTCAP=call.softcap > 0,
        LIST_M=0 if lists is None else lists.query_tile,
        LIST_N=0 if lists is None else lists.key_tile,
        TMA=tma, EVEN=keys % chosen["BLOCK_N"] == 0,
        DIM=dim, VALUE_DIM=value_dim, UPCAST=DOT_UPCAST, **chosen,
    )  # fmt: skip
    return out, lse


# Measured on Hopper, bfloat16, by benchmarks/attention.py --sweep: the larger head size to
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


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def with_positive_scale(call: Attention) -> Attention:
    """The kernel takes the maximum before it scales."""
    if call.scale > 0:
        return call
    return replace(call, q=call.q * (-1.0 if call.scale < 0 else 0.0), scale=abs(call.scale) or 1.0)


def has_rows(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe x: rows without gaps, the rest 16-byte aligned."""
    size = x.element_size()
    strides = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    aligned = all(s > 0 and s * size % 16 == 0 for s in strides)
    return aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and x.shape[-1] * size >= 16


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of [B, H, T, D], a block a head; dimensions of one entry have any stride that is aligned."""
    step = 16 // x.element_size()
    strides = [s if n > 1 else step for s, n in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, 1, rows, columns])


def _rank(mask: Tensor) -> Tensor:
    """[B, T] int32: how many unmasked keys there are up to each one; 0 for masked ones."""
    unmasked = mask != 0
    return (unmasked.cumsum(1) * unmasked).to(torch.int32)


def _spans(rank: Tensor, sink_tokens: tuple[int, ...]) -> Tensor:
    """[B, KV, 4] int32: the first unmasked key; a range without masked ones, which is all that
    there are or empty; and the key behind the last sink token."""
    keys = rank.shape[1]
    positions = torch.arange(keys, device=rank.device, dtype=torch.int32)
    unmasked = rank > 0
    first = torch.where(unmasked, positions, keys).amin(1)
    behind = torch.where(unmasked, positions + 1, 0).amax(1)
    solid = torch.where(behind - first == unmasked.sum(1), behind, first)
    limits = _choices(sink_tokens, sink_tokens, rank.device)[:, 0]
    sinks = unmasked[:, None] & (rank[:, None] <= limits[None, :, None])
    sink_end = torch.where(sinks, positions + 1, 0).amax(2)
    shared = (x[:, None].expand_as(sink_end) for x in (first, first, solid))
    return torch.stack([*shared, sink_end], -1).to(torch.int32).contiguous()


@functools.cache
def _choices(window: tuple[int, ...], sink_tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """[KV, 2] int32 on the device; kept, so that a captured CUDA graph copies nothing."""
    return torch.tensor([window, sink_tokens], dtype=torch.int32).T.contiguous().to(device)
