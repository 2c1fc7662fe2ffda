"""Lists of tiles turned around: for each key tile, which query tiles have it on their lists.

A kernel counts the visits of each key tile, for some query tiles a program; sums of the counts are
places; the same kernel writes the visitors there. Nothing is sorted, and the order is that of the
queries whatever runs first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.attention.blocks import TileLists

TURNED_AT_ONCE = 64
"""Query tiles whose lists one program turns around."""


@triton.jit
def _turn(
    partial_count_ptr, partial_ptr, full_count_ptr, full_ptr, place_ptr, visitor_ptr,
    tiles, partial_max, full_max, chunks, key_tiles,
    WRITE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count, for some query tiles, how many of them visit each key tile; or, where the counts have
    become places, write them there in their order, as 2 * tile + (is it seen in part)."""
    line = tl.program_id(0)
    chunk = tl.program_id(1)
    places = place_ptr + (line * chunks + chunk).to(tl.int64) * key_tiles
    for query_tile in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tiles)):
        row = line.to(tl.int64) * tiles + query_tile
        for partial in tl.static_range(2):
            if partial:
                count = tl.load(partial_count_ptr + row)
                listed = partial_ptr + row * partial_max
            else:
                count = tl.load(full_count_ptr + row)
                listed = full_ptr + row * full_max
            for start in range(0, count, BLOCK):
                entry = start + tl.arange(0, BLOCK)
                key_tile = tl.load(listed + entry, mask=entry < count, other=0)
                place = tl.load(places + key_tile, mask=entry < count, other=0)
                if WRITE:
                    tl.store(visitor_ptr + place, 2 * query_tile + partial, mask=entry < count)
                # A line names no tile twice, and the next one reads what this one wrote.
                tl.store(places + key_tile, place + 1, mask=entry < count)
                tl.debug_barrier()


@dataclass(frozen=True)
class Visitors:
    """`visitor` [begin, end) are the query tiles that visit a key tile, ascending, as 2 * tile + 1
    where it is seen in part; begin and end int32 [lines, key tiles]."""

    begin: Tensor
    end: Tensor
    visitor: Tensor


def turned(lists: TileLists, keys: int) -> Visitors:
    """For each key tile, which query tiles have it on their lists; nothing waits for the device.

    Time follows the entries, memory the room of `lists`.
    """
    batch, heads, tiles, _ = lists.partial.shape
    lines, key_tiles = batch * heads, triton.cdiv(keys, lists.key_tile)
    chunks = triton.cdiv(tiles, TURNED_AT_ONCE)
    device = lists.partial.device
    places = torch.zeros((lines, chunks, key_tiles), dtype=torch.int32, device=device)
    visitor = torch.empty(
        lists.partial.numel() + lists.full.numel(), dtype=torch.int32, device=device
    )

    def run(write: bool) -> None:
        _turn[(lines, chunks)](
            lists.partial_count, lists.partial, lists.full_count, lists.full, places, visitor,
            tiles, lists.partial.shape[3], lists.full.shape[3], chunks, key_tiles,
            WRITE=write, CHUNK=TURNED_AT_ONCE, BLOCK=128, num_warps=4,
        )  # fmt: skip

    run(False)
    counts = places.transpose(1, 2)  # the chunks of a key tile follow each other
    begin = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape).to(torch.int32)
    # A copy in any case: with one chunk, `begin` would be written as well.
    places = begin.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    run(True)
    return Visitors(begin[:, :, 0].contiguous(), places[:, -1].contiguous(), visitor)
