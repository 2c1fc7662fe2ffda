"""Triton kernels that store new tokens in a cache: blocks that are due, sink, ring.

The bytes are those of `fxopt.kernels.kv_attention.packing`. Lengths are read on the device. After a
decoding kernel, what it computed is joined in the same launch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.common import overlaps, processors, tile
from fxopt.kernels._triton.kv_pack import copy_block, pack_float8, pack_keys, pack_values
from fxopt.kernels._triton.splits import wait
from fxopt.kernels.kv_attention.layout import Blocks
from fxopt.kernels.kv_attention.packing import width
from fxopt.kernels.kv_attention.pages import room
from fxopt.kernels.kv_attention.triton import Shares, block_at, first_block, join_row

# Programs of `_finish_kernel` that one multiprocessor of an H100 runs at a time, as compiled: by
# registers where it packs, and where it does not.
PLACES = 2, 16


@triton.jit
def _set_starts(
    block_start, used, old, due, BLOCKS, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The starts of blocks from `used` on, which hold tokens from `old` to `due`."""
    o_n = tl.arange(0, BLOCK)
    for i_n in range(0, BLOCKS + 1, BLOCK):
        entry = i_n + o_n
        b_start = tl.minimum((old // GROUP + entry - used) * GROUP, due)
        tl.store(block_start + entry, b_start, mask=(entry > used) & (entry <= BLOCKS))


@triton.jit
def _plan_kernel(
    start_ptr, block_start, counts, N, BLOCKS, kept,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which blocks are due, now that N tokens come: their starts, and `counts` int64 [3]: blocks
    in use, tokens packed before, tokens packed after the call.

    `kept` tokens, the residual and the sink, are not packed. One program: every start is read
    before the first one is written.
    """
    o_n = tl.arange(0, BLOCK)
    old = tl.load(block_start + BLOCKS)
    due = tl.maximum((tl.load(start_ptr) + N - kept) // GROUP * GROUP, old)
    used = old * 0
    for i_n in range(0, BLOCKS, BLOCK):
        m_n = i_n + o_n < BLOCKS
        b_low = tl.load(block_start + i_n + o_n, mask=m_n, other=0)
        b_high = tl.load(block_start + i_n + o_n + 1, mask=m_n, other=0)
        used += tl.sum((b_high > b_low).to(tl.int64), 0)
    tl.store(counts, used)
    tl.store(counts + 1, old)
    tl.store(counts + 2, due)
    tl.debug_barrier()
    _set_starts(block_start, used, old, due, BLOCKS, GROUP, BLOCK)


@triton.jit
def _pack_block(
    k, v, start, used, old, due, i_n, table, key, key_scale, key_zero,
    value, value_scale, value_zero, recent_k, recent_v, rank, i_bh, N, BLOCKS, RING, rank_b,
    H, D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, SINK: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, HAS_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Pack the i-th block that is due, if there are so many."""
    aligned = (old // GROUP + i_n) * GROUP
    low = tl.maximum(aligned, old)
    if (low < due) & (used + i_n < BLOCKS):
        fresh = tl.maximum(start - SINK, 0)
        # New tokens that fill the sink come before position 0 and are skipped.
        to_sink = tl.maximum(SINK - start, 0)
        end = aligned + GROUP
        rank += (i_bh // H) * rank_b + SINK
        if table is not None:
            table += i_bh // H * BLOCKS
        i_block = first_block(table, i_bh, BLOCKS, H) + block_at(table, used + i_n, H)
        k += to_sink * D
        v += to_sink * DV
        if K_BITS == 16:
            copy_block(key, recent_k, k, i_bh, i_block, low, end, fresh, RING, N, D, GROUP, BLOCK_K)
        elif key.dtype.element_ty.is_fp8():
            pack_float8(
                key, key_scale, key_zero, recent_k, k, i_bh, i_block, low, end, rank, fresh,
                RING, N, D, GROUP, True, HAS_RANK, BLOCK_K,
            )  # fmt: skip
        else:
            pack_keys(
                key, key_scale, key_zero, recent_k, k, i_bh, i_block, low, end, rank, fresh,
                RING, N, D, GROUP, K_BITS, HAS_RANK, BLOCK_K,
            )  # fmt: skip
        if V_BITS == 16:
            copy_block(
                value, recent_v, v, i_bh, i_block, low, end, fresh, RING, N, DV, GROUP, BLOCK_V
            )
        elif value.dtype.element_ty.is_fp8():
            pack_float8(
                value, value_scale, value_zero, recent_v, v, i_bh, i_block, low, end, rank, fresh,
                RING, N, DV, GROUP, False, HAS_RANK, BLOCK_V,
            )  # fmt: skip
        else:
            pack_values(
                value, value_scale, value_zero, recent_v, v, i_bh, i_block, low, end, rank, fresh,
                RING, N, DV, GROUP, V_BITS, HAS_RANK, BLOCK_V,
            )  # fmt: skip


@triton.jit
def _pack_kernel(
    k, v, start_ptr, counts, table, key, key_scale, key_zero, value, value_scale, value_zero,
    recent_k, recent_v, rank, N, BLOCKS, RING, rank_b,
    H, D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, SINK: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, HAS_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Pack the blocks that are due, each in a program."""
    _pack_block(
        k, v, tl.load(start_ptr), tl.load(counts), tl.load(counts + 1), tl.load(counts + 2),
        tl.program_id(1), table, key, key_scale, key_zero, value, value_scale, value_zero,
        recent_k, recent_v, rank, tl.program_id(0).to(tl.int64), N, BLOCKS, RING, rank_b,
        H, D, DV, GROUP, SINK, K_BITS, V_BITS, HAS_RANK, BLOCK_K, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _keep(
    k, v, start, due, sink_k, sink_v, recent_k, recent_v, i_bh, o_n, N, RING,
    D: tl.constexpr, DV: tl.constexpr, SINK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """New tokens `o_n` that are not packed, into the sink or the ring."""
    position = start + o_n
    p = position - SINK
    m_ring = (o_n < N) & (p >= due) & (RING > 0)
    o_ring = i_bh * RING + p % tl.maximum(RING, 1)
    for i_side in tl.static_range(2):
        if i_side == 0:
            new, sink, ring, o_d = k, sink_k, recent_k, tl.arange(0, BLOCK_D)
            size = D
        else:
            new, sink, ring, o_d = v, sink_v, recent_v, tl.arange(0, BLOCK_V)
            size = DV
        m_d = (o_d < size)[None, :]
        p_new = new + (i_bh * N + o_n)[:, None] * size + o_d[None, :]
        b_x = tl.load(p_new, mask=(o_n < N)[:, None] & m_d, other=0.0)
        if SINK > 0:
            m_sink = (o_n < N) & (p < 0)
            p_sink = sink + (i_bh * SINK + position)[:, None] * size + o_d[None, :]
            tl.store(p_sink, b_x, mask=m_sink[:, None] & m_d)
        tl.store(ring + o_ring[:, None] * size + o_d[None, :], b_x, mask=m_ring[:, None] & m_d)


@triton.jit
def _keep_kernel(
    k, v, start_ptr, counts, sink_k, sink_v, recent_k, recent_v, N, RING,
    D: tl.constexpr, DV: tl.constexpr, SINK: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """BLOCK_T new tokens, those that are not packed. With `EXACT` none is."""
    o_n = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    due = 0
    if not EXACT:
        due = tl.load(counts + 2)
    _keep(
        k, v, tl.load(start_ptr), due, sink_k, sink_v, recent_k, recent_v,
        tl.program_id(0).to(tl.int64), o_n, N, RING, D, DV, SINK, BLOCK_D, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _finish_kernel(
    partial, top, total, sinks, out, splits, rows, heads,
    k, v, start_ptr, counts, block_start, sink_k, sink_v, table, key, key_scale, key_zero,
    value, value_scale, value_zero, recent_k, recent_v, rank, N, BLOCKS, RING, rank_b,
    H, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, SINK: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, HAS_RANK: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """What follows the shares of a decoding step: in the first programs, one for each of `heads`
    KV heads, its few new tokens are stored and at most one block is packed (with EXACT none is);
    the others join the shares of a row each, or of some of its channels.

    `counts` was written before, so that no program reads the starts that one of them writes.
    """
    wait(WAITS)
    i_p = tl.program_id(0)
    if i_p >= heads:
        parts = tl.cdiv(DV, BLOCK_V)
        i_row, i_v = (i_p - heads) // parts, (i_p - heads) % parts
        join_row(
            partial, top, total, sinks, out, i_row, i_v, rows, N, splits, H, G, DV, BLOCK_S, BLOCK_V
        )
    else:
        i_bh = i_p.to(tl.int64)
        start = tl.load(start_ptr)
        due = start * 0
        if not EXACT:
            used, old, due = tl.load(counts), tl.load(counts + 1), tl.load(counts + 2)
            if old < due:
                _pack_block(
                    k, v, start, used, old, due, 0, table, key, key_scale, key_zero,
                    value, value_scale, value_zero, recent_k, recent_v, rank, i_bh, N, BLOCKS, RING,
                    rank_b, H, D, DV, GROUP, SINK, K_BITS, V_BITS, HAS_RANK, BLOCK_K, BLOCK_W,
                )  # fmt: skip
                if i_bh == 0:
                    _set_starts(block_start, used, old, due, BLOCKS, GROUP, BLOCK)
                tl.debug_barrier()  # a new token takes the place of one that was packed
        _keep(
            k, v, start, due, sink_k, sink_v, recent_k, recent_v, i_bh, tl.arange(0, BLOCK_T),
            N, RING, D, DV, SINK, BLOCK_D, BLOCK_W,
        )  # fmt: skip


def finish(
    shares: Shares,
    new: dict[str, Tensor],
    part: dict[str, Tensor],
    start: Tensor,
    rank: Tensor | None,
    fmt: Blocks | None,
    counts: Tensor | None,
) -> Tensor:
    """Join what a decoding kernel computed of one head class, and store its new tokens: with up to
    a block's tokens in one launch, where all of its programs run at a time, else in two. `counts`
    is what that kernel wrote (`note_due`)."""
    k, v = new["key"], new["value"]
    batch, heads, queries, dim = k.shape
    if fmt is not None and (counts is None or queries > fmt.group):
        append(new, part, start, rank, fmt)
        return shares.joined()
    none, overlap = k, overlaps(k.device)
    blocks = room(part) if fmt else 0
    kind = _packing(new, fmt, rank) if fmt else _keeping(new)
    # A class that is stored exactly is a ring that never wraps.
    stored = _stored(part, none) if fmt else [None, *[none] * 6, part["key"], part["value"]]
    ring = part["recent_key"] if fmt else part["key"]
    places = PLACES[fmt is None] * processors(k.device)
    programs = {
        channels: batch * heads + shares.rows * triton.cdiv(v.shape[3], channels)
        for channels in (32, 256)
    }
    channels = 32 if programs[32] <= places else 256
    together = programs[channels] <= places
    _finish_kernel[(programs[channels] if together else batch * heads,)](
        shares.partial, shares.top, shares.total, shares.sinks, shares.out, len(shares.partial),
        shares.rows, batch * heads, k, v, start, counts, part.get("block_start", none),
        part.get("sink_key", none), part.get("sink_value", none), *stored,
        none if rank is None else rank, queries, blocks, ring.shape[2],
        0 if rank is None else rank.stride(0),
        G=shares.top.shape[2] // queries, EXACT=fmt is None, BLOCK_T=tile(queries),
        BLOCK_D=tile(dim, most=256), BLOCK_W=tile(v.shape[3], most=256),
        BLOCK=tile(blocks + 1, most=1024), WAITS=overlap, launch_pdl=overlap, **kind,
        **shares.tiles(channels),
    )  # fmt: skip
    return shares.out if together else shares.joined()


def append(
    new: dict[str, Tensor],
    part: dict[str, Tensor],
    start: Tensor,
    rank: Tensor | None,
    fmt: Blocks | None,
) -> None:
    """Store the new tokens of one head class: blocks that are due, then sink and ring."""
    k, v = new["key"], new["value"]
    batch, heads, queries, dim = k.shape
    value_dim, none = v.shape[3], k
    wide = {"BLOCK_D": tile(dim, most=256), "BLOCK_V": tile(value_dim, most=256)}
    kept = part.get("sink_key", none), part.get("sink_value", none)
    counts = none if fmt is None else _pack(new, part, start, rank, fmt)
    # A class that is stored exactly is a ring that never wraps.
    ring_k, ring_v = (part["key"], part["value"]) if fmt is None else (
        part["recent_key"], part["recent_value"],
    )  # fmt: skip
    _keep_kernel[(batch * heads, triton.cdiv(queries, 32))](
        k, v, start, counts, *kept, ring_k, ring_v, queries, ring_k.shape[2],
        D=dim, DV=value_dim, SINK=0 if fmt is None else fmt.sink, EXACT=fmt is None, BLOCK_T=32,
        **wide,
    )  # fmt: skip


def _pack(
    new: dict[str, Tensor],
    part: dict[str, Tensor],
    start: Tensor,
    rank: Tensor | None,
    fmt: Blocks,
) -> Tensor:
    """Pack the blocks that are due; returns the counts of `_plan_kernel`."""
    k, v, starts = new["key"], new["value"], part["block_start"]
    batch, heads, queries, _ = k.shape
    blocks, none = room(part), k
    counts = starts.new_empty(3)
    _plan_kernel[(1,)](
        start, starts, counts, queries, blocks, fmt.sink + fmt.residual,
        GROUP=fmt.group, BLOCK=tile(blocks + 1, most=1024),
    )  # fmt: skip
    if blocks:
        _pack_kernel[(batch * heads, min(blocks, triton.cdiv(queries, fmt.group)))](
            k, v, start, counts, *_stored(part, none), none if rank is None else rank,
            queries, blocks, part["recent_key"].shape[2], 0 if rank is None else rank.stride(0),
            **_packing(new, fmt, rank), BLOCK_V=triton.next_power_of_2(v.shape[3]),
        )  # fmt: skip
    return counts


def _stored(part: dict[str, Tensor], none: Tensor) -> list[Tensor | None]:
    """The table, packed tensors and the ring, in the order in which kernels take them."""
    packed = (f"{side}{kind}" for side in ("key", "value") for kind in ("", "_scale", "_zero"))
    held = [part.get(name, none) for name in (*packed, "recent_key", "recent_value")]
    return [part.get("table"), *held]


def _keeping(new: dict[str, Tensor]) -> dict[str, Any]:
    """As `_packing`, where nothing is packed."""
    heads, dim = new["key"].shape[1], new["key"].shape[3]
    none = dict.fromkeys(("GROUP", "SINK", "K_BITS", "V_BITS", "BLOCK_K"), 0)
    return {"H": heads, "D": dim, "DV": new["value"].shape[3], "HAS_RANK": False, **none}


def _packing(new: dict[str, Tensor], fmt: Blocks, rank: Tensor | None) -> dict[str, Any]:
    """What a kernel that packs is compiled for."""
    heads, dim = new["key"].shape[1], new["key"].shape[3]
    key_bits, value_bits = width(fmt.key_bits), width(fmt.value_bits)
    return {
        "H": heads, "D": dim, "DV": new["value"].shape[3], "GROUP": fmt.group, "SINK": fmt.sink,
        "K_BITS": key_bits, "V_BITS": value_bits, "HAS_RANK": rank is not None,
        "BLOCK_K": triton.next_power_of_2(dim // max(1, 8 // key_bits)),
    }  # fmt: skip
