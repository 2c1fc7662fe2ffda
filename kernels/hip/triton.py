"""Halving chunks of keys on a GPU: two kernels a level, no wait for the device.

`_score_kernel` estimates the logarithms that some queries of a tile give the chunks on its list.
`_halve_kernel` makes masses of them and writes the halves of the best chunks as the list of the
next level, or, where chunks are tiles, the lists that attention walks. Queries go in runs, so that
the scores stay small.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.attention import LOG2E
from fxopt.kernels._triton.common import DOT_UPCAST, dot
from fxopt.kernels.attention.blocks import TileLists
from fxopt.kernels.attention.spec import Attention
from fxopt.kernels.attention.triton import with_positive_scale
from fxopt.kernels.block_topk import reference as topk
from fxopt.kernels.block_topk.triton import empty_lists, largest, put, select_warps, tile_states

from . import reference as hip

ROWS = tl.constexpr(topk.TILE // hip.STRIDE)
TILE, LEAST, SPARED = (tl.constexpr(x) for x in (topk.TILE, topk.LEAST, topk.SPARED))
BOXES, FORCED = tl.constexpr(hip.BOXES), tl.constexpr(hip.FORCED)
BLOCK_C = 64
"""Chunks of a program that scores."""


@triton.jit
def _score_kernel(
    asked_ptr, middle_ptr, width_ptr, shown_ptr, list_ptr, count_ptr, scores_ptr,
    run_b, shown_b, num_heads, group, count, first_tile, run_tiles, query_tiles, runs, most, scale,
    softcap,
    FIRST: tl.constexpr, HAS_SOFTCAP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores [B * H, run, ROWS, most] of the chunks on a list; at the FIRST level that is all."""
    own = tl.program_id(1)
    line = tl.program_id(2)
    batch = line // num_heads
    entry = (line.to(tl.int64) * run_tiles + own) * most
    place = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    listed = runs // BOXES
    if not FIRST:
        listed = tl.load(count_ptr + line * run_tiles + own)
    if first_tile + own >= query_tiles - SPARED:
        listed = 0
    if tl.program_id(0) * BLOCK_C < listed:
        known = place < listed
        chunk = place
        if not FIRST:
            chunk = tl.load(list_ptr + entry + place, mask=known, other=0)
        rows = tl.arange(0, ROWS)
        o_d = tl.arange(0, BLOCK_D)
        at = line.to(tl.int64) * count + (first_tile + own) * ROWS + rows
        at = asked_ptr + at[:, None] * DIM + o_d[None, :]
        wide = tl.load(at, mask=(o_d < DIM)[None, :], other=0.0).to(tl.float32) * scale
        q = wide.to(middle_ptr.dtype.element_ty)
        squares = (wide * wide).to(width_ptr.dtype.element_ty)
        kv_line = (batch * (num_heads // group) + line % num_heads // group).to(tl.int64)
        total = tl.full([ROWS, BLOCK_C], float("-inf"), tl.float32)
        for box in tl.static_range(BOXES):
            run = chunk * BOXES + box
            at = (kv_line * run_b + run)[:, None] * DIM + o_d[None, :]
            inside = known[:, None] & (o_d < DIM)[None, :]
            middle = tl.load(middle_ptr + at, mask=inside, other=0.0)
            width = tl.load(width_ptr + at, mask=inside, other=0.0)
            scores = dot(q, tl.trans(middle), tl.zeros([ROWS, BLOCK_C], tl.float32), UPCAST)
            scores = dot(squares, tl.trans(width), scores, UPCAST)
            if HAS_SOFTCAP:
                # softcap * tanh(scores / softcap)
                grown = 1.0 + tl.exp2(scores * (2.0 * LOG2E / softcap))
                scores = softcap - (2.0 * softcap) / grown
            shown = tl.load(shown_ptr + batch * shown_b + run, mask=known, other=0)
            scores = tl.where((shown != 0)[None, :], scores * LOG2E, float("-inf"))
            highest = tl.maximum(total, scores)
            base = tl.where(highest == float("-inf"), 0.0, highest)
            total = base + tl.log2(tl.exp2(total - base) + tl.exp2(scores - base))
        to = scores_ptr + entry * ROWS + rows[:, None] * most + place[None, :]
        tl.store(to, total, mask=known[None, :])


@triton.jit
def _halve_kernel(
    scores_ptr, list_ptr, listed_ptr, before_ptr, state_ptr, next_ptr, next_count_ptr,
    partial_count_ptr, partial_ptr, full_count_ptr, full_ptr,
    state_b, num_heads, first_tile, run_tiles, query_tiles, queries, keys, tiles, chunks, top, most,
    partial_max, full_max,
    STEP: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One level of one query tile, whose chunks are STEP tiles."""
    own = tl.program_id(0)
    line = tl.program_id(1)
    batch = line // num_heads
    query_tile = first_tile + own
    first = query_tile * TILE + keys - queries
    seen = tl.minimum(first + TILE - 1, keys - 1) // TILE + 1
    row = line.to(tl.int64) * query_tiles + query_tile
    before_ptr += batch * (state_b + (state_b > 0))
    state_ptr += batch * state_b
    spared = query_tile >= query_tiles - SPARED
    if spared:
        if STEP == 1:
            partial = first * 0
            full = first * 0
            for start in range(0, seen, BLOCK):
                tile = start + tl.arange(0, BLOCK)
                state = tl.load(state_ptr + tile, mask=tile < seen, other=0)
                whole = (state == 2) & (tile * TILE + TILE - 1 <= first)
                full = put(whole, tile, full_count_ptr, full_ptr, row, full_max, full)
                partial = put(
                    (state > 0) & (whole == 0), tile, partial_count_ptr, partial_ptr, row,
                    partial_max, partial,
                )  # fmt: skip
    else:
        place = tl.arange(0, BLOCK)
        at = line * run_tiles + own
        entry = at.to(tl.int64) * most
        listed = chunks
        chunk = place
        if not FIRST:
            listed = tl.load(listed_ptr + at)
            chunk = tl.load(list_ptr + entry + place, mask=place < listed, other=0)
        begin = tl.minimum(chunk * STEP, seen)
        end = tl.minimum(begin + STEP, seen)
        shown = tl.load(before_ptr + end) - tl.load(before_ptr + begin)
        alive = (place < listed) & (shown > 0)
        near = (chunk + 1) * STEP >= first // TILE
        counted = alive & (near == 0)
        mass = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(ROWS):
            scores = tl.load(
                scores_ptr + entry * ROWS + i * most + place, mask=counted, other=float("-inf")
            )
            highest = tl.max(scores, 0)
            weights = tl.exp2(scores - tl.where(highest == float("-inf"), 0.0, highest))
            total = tl.sum(weights, 0)
            mass += weights / tl.where(total == 0.0, 1.0, total)
        # Of all visible tiles, the sink's is the one that none comes before.
        sink = alive & (tl.load(before_ptr + begin) == 0)
        mass = tl.where(near | sink, FORCED, mass)
        bits = tl.where(alive, mass.to(tl.int32, bitcast=True), -1)
        visible = tl.load(before_ptr + seen)
        kept = tl.maximum((visible * top + 999) // 1000, LEAST)
        chosen = largest(bits, tl.minimum(kept, tl.sum(alive.to(tl.int32), 0))) & alive
        if STEP > 1:
            some = chosen.to(tl.int32)
            to = next_ptr + entry + 2 * (tl.cumsum(some, 0) - 1)
            tl.store(to, 2 * chunk, mask=chosen)
            tl.store(to + 1, 2 * chunk + 1, mask=chosen)
            tl.store(next_count_ptr + at, 2 * tl.sum(some, 0))
        else:
            state = tl.load(state_ptr + chunk, mask=alive, other=0)
            whole = (state == 2) & (chunk * TILE + TILE - 1 <= first)
            put(chosen & whole, chunk, full_count_ptr, full_ptr, row, full_max, 0)
            put(
                chosen & (whole == 0), chunk, partial_count_ptr, partial_ptr, row, partial_max, 0
            )  # fmt: skip


def kept_lists(call: Attention) -> TileLists:
    """The tiles that `reference.chosen_tiles` keeps, as lists of each query head, for KV heads that
    keep one share."""
    call = with_positive_scale(call)
    (top,) = {*call.top}
    q, k, device = call.q, call.k, call.q.device
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    tiles, query_tiles, depth = topk.tiles(keys), topk.tiles(queries), hip.halvings(top)
    asked, state = topk.asked(q, hip.STRIDE).contiguous(), tile_states(call)
    before = torch.nn.functional.pad((state > 0).cumsum(1, dtype=torch.int32), (1, 0))
    # Squares leave the range of float16.
    dtype = torch.float32 if k.element_size() == 4 else torch.bfloat16
    known = [_level(*level, dtype) for level in hip.boxes(k, call.mask, depth)]
    lists = empty_lists(call)
    number = hip.chunks(keys, depth) >> depth
    most = max(number, 2 * topk.kept_tiles(tiles, top))
    run = max(1, min(query_tiles, topk.MOST_SUMS // (batch * heads * ROWS.value * most)))
    scores = torch.empty(batch * heads * run * ROWS.value * most, device=device)
    turns = torch.empty((2, batch * heads * run, most), dtype=torch.int32, device=device)
    counts = torch.empty((2, batch * heads * run), dtype=torch.int32, device=device)
    block = max(16, triton.next_power_of_2(most))
    for first in range(0, query_tiles, run):
        many = min(run, query_tiles - first)
        for level in range(depth, -1, -1):
            middle, width, shown = known[level]
            mine, other = level % 2, 1 - level % 2
            start = level == depth
            _score_kernel[triton.cdiv(number if start else most, BLOCK_C), many, batch * heads](
                asked, middle, width, shown, turns[mine], counts[mine], scores,
                middle.shape[2], shown.shape[1] if shown.shape[0] > 1 else 0,
                heads, call.group_size, asked.shape[2], first, run, query_tiles, middle.shape[2],
                most, float(call.scale), float(call.softcap),
                FIRST=start, HAS_SOFTCAP=call.softcap > 0, DIM=dim,
                BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_C=BLOCK_C, UPCAST=DOT_UPCAST,
                num_warps=4,
            )  # fmt: skip
            _halve_kernel[many, batch * heads](
                scores, turns[mine], counts[mine], before, state, turns[other], counts[other],
                *lists.tensors(), tiles if state.shape[0] > 1 else 0,
                heads, first, run, query_tiles, queries, keys, tiles, number, top, most,
                *lists.strides()[2:],
                STEP=2**level, FIRST=start, BLOCK=block, num_warps=select_warps(block),
            )  # fmt: skip
    return lists


def _level(
    low: Tensor, high: Tensor, some: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Middles and a twelfth of the squared widths of ranges, and where there are some."""
    wide = low.float(), high.float()
    middle, width = (wide[0] + wide[1]) / 2, (wide[1] - wide[0]).square() / 12
    return middle.to(dtype), width.to(dtype), some.to(torch.uint8)
