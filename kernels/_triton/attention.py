"""What the kernels of attention share: which key tiles a query tile visits, loads and masks."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def ranges(
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
def range_tile(step, sink_tile, sink_tiles, begin_tile, end_tile, full_begin, full_end):
    """The tile of a step: sink, before the full range, behind it, then the full range."""
    before = full_begin - begin_tile
    partial = sink_tiles + before + end_tile - full_end
    index = tl.where(step < sink_tiles, sink_tile + step, begin_tile + step - sink_tiles)
    index += tl.where(step >= sink_tiles + before, full_end - full_begin, 0)
    return tl.where(step >= partial, full_begin + step - partial, index)


@triton.jit
def listed_tile(step, partial, total, partial_at, full_at, SPLITS: tl.constexpr):
    """The tile of a step from the lists, whose tiles hold SPLITS tiles of the kernel."""
    step = tl.minimum(step, total - 1)
    at = tl.where(step < partial, partial_at + step // SPLITS, full_at + (step - partial) // SPLITS)
    # An empty row still asks once, for a tile that it does not visit.
    return tl.load(at, mask=total > 0, other=0) * SPLITS + step % SPLITS


@triton.jit
def visits(
    query_tile, batch, head, kv_head, window, sink_tokens, span_ptr,
    partial_count_ptr, partial_ptr, full_count_ptr, full_ptr,
    list_b, list_h, partial_max, full_max, list_group, num_kv_heads, queries, keys,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    LIST_M: tl.constexpr, LIST_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Key tiles that a query tile visits, those of them that it sees in part, which come first,
    and six numbers or addresses by which `visited` tells which they are."""
    if LIST_N:
        line = batch * list_b + head // list_group * list_h + query_tile * BLOCK_M // LIST_M
        partial_at = partial_ptr + line.to(tl.int64) * partial_max
        full_at = full_ptr + line.to(tl.int64) * full_max
        partial = tl.load(partial_count_ptr + line) * (LIST_N // BLOCK_N)
        steps = partial + tl.load(full_count_ptr + line) * (LIST_N // BLOCK_N)
        return steps, partial, partial_at, full_at, 0, 0, 0, 0
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
        sink_tile, sink_tiles, begin_tile, end_tile, full_begin, full_end = ranges(
            first, last, begin, solid_begin, solid_end, sink_end, keys, window,
            CAUSAL, HAS_WINDOW, BLOCK_N,
        )  # fmt: skip
        steps = sink_tiles + end_tile - begin_tile
        partial = steps - (full_end - full_begin)
        return steps, partial, sink_tile, sink_tiles, begin_tile, end_tile, full_begin, full_end


@triton.jit
def visited(step, steps, partial, a, b, c, d, e, f, LIST_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """The key tile of a step, from what `visits` returned."""
    if LIST_N:
        index = listed_tile(step, partial, steps, a, b, LIST_N // BLOCK_N)
    else:
        index = range_tile(step, a, b, c, d, e, f)
    return index


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
def limits(positions, keys, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The first and last key of each row's window, and the last key that it may see at all."""
    lower = tl.zeros_like(positions)
    last = lower + keys - 1
    upper = last
    if CAUSAL:
        last = tl.minimum(last, positions)
    if HAS_WINDOW and window > 0:
        lower = positions - window + 1
        upper = positions + window - 1
    return lower, upper, last


@triton.jit
def is_seen(
    columns, lower, upper, last, sink, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr
):  # fmt: skip
    """Which of `columns` the rows with these limits see; `sink`: the keys that all rows see."""
    seen = columns <= last
    if HAS_WINDOW:
        near = columns >= lower
        if not CAUSAL:
            near &= columns <= upper
        seen &= near | sink
    return seen


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


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


def rank_of(mask: Tensor) -> Tensor:
    """[B, T] int32: how many unmasked keys there are up to each one; 0 for masked ones."""
    unmasked = mask != 0
    return (unmasked.cumsum(1) * unmasked).to(torch.int32)


def spans_of(rank: Tensor, sink_tokens: tuple[int, ...]) -> Tensor:
    """[B, KV, 4] int32: the first unmasked key; a range without masked ones, which is all that
    there are or empty; and the key behind the last sink token."""
    keys = rank.shape[1]
    positions = torch.arange(keys, device=rank.device, dtype=torch.int32)
    unmasked = rank > 0
    first = torch.where(unmasked, positions, keys).amin(1)
    behind = torch.where(unmasked, positions + 1, 0).amax(1)
    solid = torch.where(behind - first == unmasked.sum(1), behind, first)
    limits = choices(sink_tokens, sink_tokens, rank.device)[:, 0]
    sinks = unmasked[:, None] & (rank[:, None] <= limits[None, :, None])
    sink_end = torch.where(sinks, positions + 1, 0).amax(2)
    shared = (x[:, None].expand_as(sink_end) for x in (first, first, solid))
    return torch.stack([*shared, sink_end], -1).to(torch.int32).contiguous()


@functools.cache
def choices(window: tuple[int, ...], sink_tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """[KV, 2] int32 on the device; kept, so that a captured CUDA graph copies nothing."""
    return torch.tensor([window, sink_tokens], dtype=torch.int32).T.contiguous().to(device)
