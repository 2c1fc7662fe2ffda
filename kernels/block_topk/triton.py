"""The tiles of the most estimated attention on a GPU: two kernels, no wait for the device.

`_tile_sums_kernel` multiplies every STRIDE-th query with all keys and keeps, of each of these and
each key tile, the logarithm of the sum of exponentials. `_select_kernel` makes masses of them,
finds the largest by bisecting bits, and writes the lists that attention walks. Where a part of the
mass is asked for, what is above a trial is summed besides. Queries go in runs, so that the sums
stay small where their square would not.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.attention import LOG2E, descriptor, has_rows, is_hopper, load_rows
from fxopt.kernels._triton.common import DOT_UPCAST, dot
from fxopt.kernels.attention.blocks import TileLists
from fxopt.kernels.attention.spec import Attention
from fxopt.kernels.attention.triton import with_positive_scale

from . import reference as topk

ASKED = topk.TILE // topk.STRIDE
TILE = tl.constexpr(topk.TILE)
STRIDE, FORCED = tl.constexpr(topk.STRIDE), tl.constexpr(topk.FORCED)
SPARED = tl.constexpr(topk.SPARED)


@triton.jit
def _tile_sums_kernel(
    asked_ptr, k_ptr, mask_ptr, sums_ptr,
    k_b, k_h, k_t, k_d, mask_b,
    num_heads, group, count, first, run_count, queries, keys, tiles, scale, softcap,
    HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, STEPS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # Programs that run together read the same keys: fewer queries a program, or keys first, would
    # read more from the L2 cache than it gives in the time of the products.
    batch = tl.program_id(2) // num_heads
    head = tl.program_id(2) % num_heads
    start = tl.program_id(0) * BLOCK_M
    own = start + tl.arange(0, BLOCK_M)
    # Positions; behind the queries there is the last one again.
    seen = tl.minimum((first + own + 1) * STRIDE, queries) - 1 + keys - queries
    lowest = tl.minimum((first + start + 1) * STRIDE, queries) - 1 + keys - queries
    highest = tl.minimum((first + start + BLOCK_M) * STRIDE, queries) - 1 + keys - queries

    q = load_rows(
        asked_ptr + (batch * num_heads + head).to(tl.int64) * count * DIM, 0 * batch, 0 * head,
        first + start, 0, 0, DIM, 1, count, DIM, BLOCK_M, BLOCK_D, False, False,
    )  # fmt: skip
    sums = sums_ptr + (batch * num_heads + head).to(tl.int64) * run_count * tiles
    begin = tl.program_id(1) * STEPS
    end = tl.minimum(begin + STEPS, tl.minimum(highest // TILE + 1, tiles))
    for step in range(end - begin):
        tile = begin + step
        columns = tile * TILE + tl.arange(0, TILE)
        k = load_rows(
            k_ptr, batch, head // group, tile * TILE, k_b, k_h, k_t, k_d, keys,
            DIM, TILE, BLOCK_D, TMA, EVEN,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, TILE], tl.float32), UPCAST)
        factor = scale * LOG2E
        if HAS_SOFTCAP:
            # softcap * tanh(scores / softcap), in powers of two
            grown = 1.0 + tl.exp2(scores * (2.0 * LOG2E * scale / softcap))
            scores = softcap * LOG2E - (2.0 * LOG2E * softcap) / grown
            factor = 1.0
        if HAS_MASK:
            shown = tl.load(mask_ptr + batch * mask_b + columns, mask=columns < keys, other=0)
            scores = tl.where((shown != 0)[None, :], scores, float("-inf"))
        if tile * TILE + TILE - 1 > lowest:
            scores = tl.where(columns[None, :] <= seen[:, None], scores, float("-inf"))
        most = tl.max(scores, 1) * factor
        least = tl.where(most == float("-inf"), 0.0, most)
        total = tl.sum(tl.exp2(scores * factor - least[:, None]), 1)
        at = sums + own.to(tl.int64) * tiles + tile
        tl.store(at, least + tl.log2(total), mask=own < run_count)


@triton.jit
def largest(numbers, kept):
    """Which of `numbers`, int32 and not negative where they may be kept, are the `kept` largest, of
    equal ones the first; found by bisecting bits."""
    least = kept * 0
    for place in tl.static_range(31):
        trial = least | (1 << (30 - place))
        least = tl.where(tl.sum((numbers >= trial).to(tl.int32), 0) >= kept, trial, least)
    above, equal = numbers > least, numbers == least
    room = kept - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))


@triton.jit
def holding(numbers, mass, forced, kept, wanted):
    """`largest`, or of these the first that hold `wanted` of the mass, and those that are forced.
    `numbers` are the bits of the mass, but for larger ones where it is forced."""
    least = kept * 0
    for place in tl.static_range(31):
        trial = least | (1 << (30 - place))
        enough = tl.sum((numbers >= trial).to(tl.int32), 0) >= kept
        enough |= tl.sum(tl.where(numbers >= trial, mass, 0.0), 0) >= wanted
        least = tl.where(enough, trial, least)
    above, equal = numbers > least, numbers == least
    nth = tl.cumsum(equal.to(tl.int32), 0)
    each = tl.max(tl.where(equal, mass, 0.0), 0)
    held = tl.sum(tl.where(above, mass, 0.0), 0) + (nth - 1) * each
    chosen = above | (equal & (nth <= kept - tl.sum(above.to(tl.int32), 0)))
    return chosen & (above | forced | (held < wanted))


@triton.jit
def put(chosen, tile, count_ptr, list_ptr, row, most, before):
    """Write the chosen tiles to line `row` of lists of `most` entries, behind `before` of them."""
    some = chosen.to(tl.int32)
    tl.store(list_ptr + row * most + before + tl.cumsum(some, 0) - 1, tile, mask=chosen)
    before += tl.sum(some, 0)
    tl.store(count_ptr + row, before)
    return before


@triton.jit
def _select_kernel(
    sums_ptr, state_ptr, share_ptr,
    partial_count_ptr, partial_ptr, full_count_ptr, full_ptr,
    state_b, num_heads, group, first_tile, run_tiles, query_tiles, queries, keys, tiles,
    partial_max, full_max,
    HAS_MASS: tl.constexpr, ASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    line = tl.program_id(1)
    batch = line // num_heads
    head = line % num_heads
    query_tile = first_tile + own
    first = query_tile * TILE + keys - queries
    last = tl.minimum(first + TILE, keys) - 1

    tile = tl.arange(0, BLOCK)
    inside = (tile < tiles) & (tile * TILE <= last)
    state = tl.load(state_ptr + batch * state_b + tile, mask=inside, other=0)
    seen = inside & (state > 0)
    mass = tl.zeros([BLOCK], tl.float32)
    at = sums_ptr + ((line * run_tiles + own) * ASKED).to(tl.int64) * tiles + tile
    for row in tl.static_range(ASKED):
        sums = tl.load(at + row * tiles, mask=seen, other=float("-inf"))
        highest = tl.max(sums, 0)
        weights = tl.exp2(sums - tl.where(highest == float("-inf"), 0.0, highest))
        total = tl.sum(weights, 0)
        mass += weights / tl.where(total == 0.0, 1.0, total)

    sink = tl.min(tl.where(seen, tile, BLOCK), 0)
    forced = seen & ((tile == sink) | (tile * TILE > first - 2 * TILE))
    bits = tl.where(forced, FORCED, mass).to(tl.int32, bitcast=True)
    bits = tl.where(seen, bits, -1)
    count = tl.sum(seen.to(tl.int32), 0)
    share_at = share_ptr + 3 * (head // group)
    kept = tl.maximum((count * tl.load(share_at) + 999) // 1000, tl.load(share_at + 1))
    spared = query_tile >= query_tiles - SPARED
    kept = tl.where(spared, count, tl.minimum(kept, count))
    # Bits of floats above zero are in their order.
    if HAS_MASS:
        mass = tl.where(seen, mass, 0.0)
        part = tl.load(share_at + 2)
        some = (part > 0) & (part < 1000) & (spared == 0)
        wanted = tl.where(some, part / 1000 * tl.sum(mass, 0), float("inf"))
        chosen = holding(bits, mass, forced, kept, wanted)
    else:
        chosen = largest(bits, kept)

    whole = (state == 2) & (tile * TILE + TILE - 1 <= first)
    row = line.to(tl.int64) * query_tiles + query_tile
    put(chosen & whole, tile, full_count_ptr, full_ptr, row, full_max, 0)
    put(chosen & (whole == 0), tile, partial_count_ptr, partial_ptr, row, partial_max, 0)


def heads_at_once(call: Attention) -> int:
    """KV heads whose lists may exist together."""
    batch, _, queries, _ = call.q.shape
    lines = batch * call.group_size * topk.tiles(queries)
    lists = 1 if call.mask is None else 2
    return max(1, topk.MOST_ENTRIES // (lines * topk.tiles(call.k.shape[2]) * lists))


def kept_lists(call: Attention, **sizes: int) -> TileLists:
    """The tiles that `topk.chosen_tiles` keeps, as lists of each query head. `sizes` replace those
    of `sizes_for`."""
    call = with_positive_scale(call)
    q, k, device = call.q, call.k, call.q.device
    batch, heads, queries, dim = q.shape
    keys, tiles, query_tiles = k.shape[2], topk.tiles(k.shape[2]), topk.tiles(queries)
    asked, state = topk.asked(q).contiguous(), tile_states(call)
    lists = empty_lists(call)
    run = max(1, min(query_tiles, topk.MOST_SUMS // (batch * heads * ASKED * tiles)))
    sums = torch.empty(batch * heads * run * ASKED * tiles, device=device)
    block_d = max(16, triton.next_power_of_2(dim))
    chosen = sizes_for(q.element_size()) | sizes
    tma = is_hopper(device) and q.element_size() == 2 and has_rows(k)
    rows = descriptor(k, topk.TILE, block_d) if tma else k
    mask = None if call.mask is None else (call.mask != 0).to(torch.uint8)
    for first in range(0, query_tiles, run):
        many = min(run, query_tiles - first)
        blocks, shares = -(-many * ASKED // chosen["BLOCK_M"]), -(-tiles // chosen["STEPS"])
        _tile_sums_kernel[blocks, shares, batch * heads](
            asked, rows, asked if mask is None else mask, sums,
            *k.stride(), 0 if mask is None else mask.stride(0),
            heads, call.group_size, asked.shape[2], first * ASKED, many * ASKED,
            queries, keys, tiles, float(call.scale), float(call.softcap),
            HAS_MASK=mask is not None, HAS_SOFTCAP=call.softcap > 0, TMA=tma,
            EVEN=keys % topk.TILE == 0, DIM=dim, BLOCK_D=block_d, UPCAST=DOT_UPCAST, **chosen,
        )  # fmt: skip
        block = max(16, triton.next_power_of_2(tiles))
        _select_kernel[(many, batch * heads)](
            sums, state, _shares(call.top, call.mass, device),
            *lists.tensors(),
            tiles if state.shape[0] > 1 else 0, heads, call.group_size,
            first, many, query_tiles, queries, keys, tiles, *lists.strides()[2:],
            HAS_MASS=any(0 < m < 1000 for m in call.mass), ASKED=ASKED, BLOCK=block,
            num_warps=select_warps(block),
        )  # fmt: skip
    return lists


def empty_lists(call: Attention) -> TileLists:
    """Room for the tiles of each query head."""
    tiles, query_tiles = topk.tiles(call.k.shape[2]), topk.tiles(call.q.shape[2])
    # Without a mask only tiles on the diagonal are partial, and two of them cover a query tile.
    longest = min(tiles, 2) if call.mask is None else tiles
    lines = (*call.q.shape[:2], query_tiles)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=call.q.device)

    return TileLists(
        empty(*lines), empty(*lines, longest), empty(*lines), empty(*lines, tiles),
        topk.TILE, topk.TILE,
    )  # fmt: skip


def sizes_for(element_size: int) -> dict[str, int]:
    """Queries of a program and the key tiles that it visits, warps and stages."""
    if element_size == 4:
        return {"BLOCK_M": 64, "STEPS": 8, "num_warps": 4, "num_stages": 2}
    # Two programs of 128 channels fit a multiprocessor: one multiplies while one exponentiates,
    # which takes as long.
    return {"BLOCK_M": 128, "STEPS": 32, "num_warps": 8, "num_stages": 2}


def select_warps(block: int) -> int:
    """Few, as they wait for each other at each bit; more where tiles would not fit registers."""
    return 1 if block <= 256 else 4 if block <= 1024 else 8


def tile_states(call: Attention) -> Tensor:
    """[B or 1, key tiles] int32: 2 where every key may be seen, 1 where some may, 0 where none."""
    keys = call.k.shape[2]
    if call.mask is None:
        tiles = torch.arange(topk.tiles(keys), device=call.k.device)
        return ((tiles + 1) * topk.TILE <= keys).to(torch.int32)[None] + 1
    shown = torch.nn.functional.pad(call.mask != 0, (0, -keys % topk.TILE))
    shown = shown.unflatten(1, (-1, topk.TILE))
    return shown.any(2).to(torch.int32) + shown.all(2).to(torch.int32)


@functools.cache
def _shares(top: tuple[int, ...], mass: tuple[int, ...], device: torch.device) -> Tensor:
    """[KV, 3] int32: tiles per mille and at least, and mass per mille. On the device; kept, so that
    a captured CUDA graph copies nothing."""
    shares = [(t or 1000, topk.least(m), m) for t, m in zip(top, mass, strict=True)]
    return torch.tensor(shares, dtype=torch.int32).to(device)
