"""The tiles that a decoded token reads, on a GPU: no wait for the device.

`_estimate_kernel` reads the ranges of each tile and writes an estimate for each query head;
`_choose_kernel` finds the largest of these by bisecting bits and writes the list of tiles that the
decoding kernels walk. Where a choice is kept, list and age lie in the cache: both kernels read on
the device whether it is due, and leave the list as it is but for what became whole since.
`_note_kernel` writes the ranges of what has become whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.block_topk.triton import largest, select_warps
from fxopt.kernels.kv_attention.heads import Arguments
from fxopt.kernels.kv_attention.layout import CHOICE, RANGES, Blocks
from fxopt.kernels.kv_attention.packing import code_range
from fxopt.kernels.kv_attention.pages import sizes
from fxopt.kernels.kv_attention.triton import block_at, blocks_used, first_block

from . import reference as topk

TILE = tl.constexpr(topk.TILE)
BLOCK_T = 32
"""Tiles of a program that estimates."""


@triton.jit
def _whole_tiles(start_ptr, block_start, BLOCKS, GROUP: tl.constexpr):
    """How many tiles are whole; GROUP is 0 where they are stored exactly."""
    if GROUP == 0:
        whole = tl.load(start_ptr) // TILE
    else:
        whole = blocks_used(block_start, tl.load(block_start + BLOCKS), GROUP)
    return whole.to(tl.int32)


@triton.jit
def _is_due(chosen_at, i_bh, start_ptr, whole, REFRESH, GROWN):
    """As `reference.is_due`, of one row and KV head."""
    start = tl.load(start_ptr)
    position = tl.load(chosen_at + 3 * i_bh)
    then = tl.load(chosen_at + 3 * i_bh + 1)
    old = (position == 0) | (start <= position) | (start >= position + REFRESH)
    return old | (whole - then > GROWN)


@triton.jit
def _estimate_kernel(
    q, low, high, start_ptr, block_start, table, chosen_at, out, TILES, scale, least, width,
    REFRESH, GROWN,
    H, G: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Estimates [B * KV, G, TILES] of q [B * KV, G, D], where a choice is due. Of packed keys `low`
    and `high` are zero and scale; the least key is `least` scales from the zero and the largest
    `width` scales on."""
    i_bh = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    whole = _whole_tiles(start_ptr, block_start, TILES, GROUP)
    some = tl.program_id(1) * BLOCK_T < whole
    if chosen_at is not None:
        some = some & _is_due(chosen_at, i_bh, start_ptr, whole, REFRESH, GROWN)
    if some:
        o_d = tl.arange(0, BLOCK_D)
        m_t, m_d = tile < whole, o_d < D
        place = tile
        if table is not None:
            table += i_bh // H * TILES
            place = tl.minimum(tile, TILES - 1)
        at = first_block(table, i_bh, TILES, H) + block_at(table, place, H)
        at = at[:, None] * D + o_d[None, :]
        b_low = tl.load(low + at, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_high = tl.load(high + at, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_width = b_high - b_low
        if GROUP > 0:
            b_low += b_high * least
            b_width = b_high * width
        b_middle = b_low + b_width / 2
        b_width *= b_width / 12
        for i_g in tl.static_range(G):
            b_q = tl.load(q + (i_bh * G + i_g) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_q = (b_q * scale)[None, :]
            b_mass = tl.sum(b_q * b_middle + b_q * b_q * b_width, 1)
            tl.store(out + (i_bh * G + i_g) * TILES + tile, b_mass, mask=m_t)


@triton.jit
def _chosen(
    mass, shown, row, i_bh, whole, TILES, most, nearest, shown_b, H, G, HAS_SHOWN, BLOCK,
):  # fmt: skip
    """Write the kept tiles of one KV head to its `row`; how many they are."""
    tile = tl.arange(0, BLOCK)
    seen = tile < whole
    if HAS_SHOWN:
        seen = seen & (tl.load(shown + i_bh // H * shown_b + tile, mask=seen, other=0) != 0)
    behind = tl.full((BLOCK,), 3.0e38, tl.float32)
    for i_g in tl.static_range(G):
        b_mass = tl.load(mass + (i_bh * G + i_g) * TILES + tile, mask=seen, other=-3.0e38)
        behind = tl.minimum(behind, tl.max(b_mass, 0) - b_mass)
    # Bits of floats above zero are in their order; the least behind comes first.
    rank = 0x7F800000 - behind.to(tl.int32, bitcast=True)
    first = tl.min(tl.where(seen, tile, BLOCK), 0)
    rank = tl.where((tile == first) | (tile >= whole - nearest), 0x7F800001, rank)
    rank = tl.where(seen, rank, -1)
    kept = tl.minimum(tl.sum(seen.to(tl.int32), 0), most)
    chosen = largest(rank, kept) & seen
    tl.store(row + tl.cumsum(chosen.to(tl.int32), 0) - 1, tile, mask=chosen)
    return kept


@triton.jit
def _choose_kernel(
    mass, shown, start_ptr, block_start, chosen_at, tiles_ptr, count_ptr, TILES, LISTED, most,
    nearest, shown_b, REFRESH, GROWN,
    H, G: tl.constexpr, GROUP: tl.constexpr, HAS_SHOWN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The list [B * KV, LISTED] of the kept tiles of one KV head and how many they are: those of
    the choice, which is made where it is due, and those that became whole since; behind them the
    first tile that is not whole, which of exact keys is one of the list."""
    i_bh = tl.program_id(0).to(tl.int64)
    row = tiles_ptr + i_bh * LISTED
    whole = _whole_tiles(start_ptr, block_start, TILES, GROUP)
    then = whole
    if chosen_at is None:
        kept = _chosen(
            mass, shown, row, i_bh, whole, TILES, most, nearest, shown_b, H, G, HAS_SHOWN, BLOCK
        )
    else:
        then = tl.load(chosen_at + 3 * i_bh + 1)
        kept = tl.load(chosen_at + 3 * i_bh + 2)
        if _is_due(chosen_at, i_bh, start_ptr, whole, REFRESH, GROWN):
            kept = _chosen(
                mass, shown, row, i_bh, whole, TILES, most, nearest, shown_b, H, G, HAS_SHOWN, BLOCK
            )
            then = whole
            # Where nothing is whole nothing was chosen.
            position = tl.where(whole > 0, tl.load(start_ptr), 0)
            tl.store(chosen_at + 3 * i_bh, position.to(tl.int32))
            tl.store(chosen_at + 3 * i_bh + 1, then)
            tl.store(chosen_at + 3 * i_bh + 2, kept)
    o_n = tl.arange(0, BLOCK_N)
    more = whole - then
    tl.store(row + kept + o_n, then + o_n, mask=o_n <= more)
    tl.store(count_ptr + i_bh, kept + more + (1 if GROUP == 0 else 0))


@triton.jit
def _note_kernel(
    key, shown, low, high, start_ptr, N, TOKENS, TILES, shown_b,
    H, D: tl.constexpr, HAS_SHOWN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The ranges of one tile that the N new tokens behind `start` may have filled."""
    i_bh = tl.program_id(0).to(tl.int64)
    start = tl.load(start_ptr)
    tile = start // TILE + tl.program_id(1)
    if (tile + 1) * TILE <= start + N:
        o_t, o_d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
        m_d = o_d < D
        at = (i_bh * TOKENS + tile * TILE + o_t)[:, None] * D + o_d[None, :]
        b_k = tl.load(key + at, mask=m_d[None, :], other=0.0).to(tl.float32)
        if HAS_SHOWN:
            b_shown = tl.load(shown + i_bh // H * shown_b + tile * TILE + o_t)
            m_k = (b_shown != 0)[:, None]
            b_low = tl.min(tl.where(m_k, b_k, float("inf")), 0)
            b_high = tl.max(tl.where(m_k, b_k, float("-inf")), 0)
            m_none = b_low > b_high
            b_low, b_high = tl.where(m_none, 0.0, b_low), tl.where(m_none, 0.0, b_high)
        else:
            b_low, b_high = tl.min(b_k, 0), tl.max(b_k, 0)
        row = (i_bh * TILES + tile) * D + o_d
        tl.store(low + row, b_low.to(low.dtype.element_ty), mask=m_d)
        tl.store(high + row, b_high.to(high.dtype.element_ty), mask=m_d)


def kept_list(
    arguments: Arguments, part: dict[str, Tensor], start: Tensor, mask: Tensor | None,
    fmt: Blocks | None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The tiles of one head class that a single new token reads, int32 [B * KV, entries], and how
    many of these count [B * KV]; None where it reads them all. Where a choice is kept the tiles are
    those of the state, which the kernels change."""
    top_keys = arguments.top_keys[0]
    names = RANGES if fmt is None else ("key_zero", "key_scale")
    q = arguments.q.contiguous()
    if not top_keys or q.shape[2] != 1:
        return None
    batch, heads, tiles = sizes(part, names[0]) if fmt else part[names[0]].shape[:3]
    if not tiles:
        return None
    size = topk.TILE if fmt is None else fmt.group
    group, dim = q.shape[1] // heads, q.shape[3]
    starts = part.get("block_start", start)
    refresh = arguments.refresh[0]
    kind = {"G": group, "GROUP": 0 if fmt is None else size}
    age = part.get(CHOICE[1])
    keeping = {"chosen_at": age, "REFRESH": refresh, "GROWN": topk.grown(refresh, size)}
    mass = torch.empty((batch * heads, group, tiles), device=q.device)
    least, largest = (0.0, 0.0) if fmt is None else code_range(fmt.key_bits)
    _estimate_kernel[(batch * heads, triton.cdiv(tiles, BLOCK_T))](
        q, part[names[0]], part[names[1]], start, starts, part.get("table"), out=mass, TILES=tiles,
        scale=float(arguments.scale), least=least, width=largest - least,
        H=heads, D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_T=BLOCK_T, **kind, **keeping,
    )  # fmt: skip
    most = topk.tiles_read(top_keys, size)
    count = torch.empty(batch * heads, dtype=torch.int32, device=q.device)
    if age is None:
        listed = count.new_empty((batch * heads, most + 1))
    else:
        listed = part[CHOICE[0]].flatten(0, 1)
    begins = starts + fmt.sink if fmt else torch.arange(tiles + 1, device=q.device) * size
    shown = topk.shown_tiles(mask, begins)
    block = max(16, triton.next_power_of_2(tiles))
    _choose_kernel[(batch * heads,)](
        mass, mass if shown is None else shown.view(torch.uint8), start, starts, tiles_ptr=listed,
        count_ptr=count, TILES=tiles, LISTED=listed.shape[1], most=most,
        nearest=topk.nearest(size), shown_b=tiles, H=heads, HAS_SHOWN=shown is not None,
        BLOCK=block, BLOCK_N=triton.next_power_of_2(listed.shape[1] - most),
        num_warps=select_warps(block), **kind, **keeping,
    )  # fmt: skip
    return listed, count


def note_ranges(part: dict[str, Tensor], start: Tensor, queries: int, shown: Tensor | None) -> None:
    """Write the ranges of the tiles of an exact class that new tokens filled; `shown` [B, T] is 0
    where a key is hidden."""
    if RANGES[0] not in part:
        return
    low, high = (part[name] for name in RANGES)
    batch, heads, tiles, dim = low.shape
    _note_kernel[(batch * heads, queries // topk.TILE + 1)](
        part["key"], part["key"] if shown is None else shown, low, high, start, queries,
        part["key"].shape[2], tiles, 0 if shown is None else shown.stride(0),
        H=heads, D=dim, HAS_SHOWN=shown is not None, BLOCK_D=triton.next_power_of_2(dim),
    )  # fmt: skip
