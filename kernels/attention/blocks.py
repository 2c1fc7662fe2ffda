"""Block-sparse attention: each query tile visits the key tiles that stand on its lists.

A full tile is seen whole by all rows of the query tile; in a partial one the masks of the call
(causal, window, padding, ragged ends) hide single keys; a tile on neither list is not seen.
Results over disjoint lists merge into the whole by their log-sum-exp.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._triton import AVAILABLE
from . import grid as grids
from .spec import Attention, bind
from .tiles import Tile, explicit, sum_dtype
from .traceable import visible_from


@dataclass(frozen=True)
class TileLists:
    """Counts [B or 1, Hm, tiles] and key tiles [B or 1, Hm, tiles, max], int32, contiguous.

    Hm divides the query heads: 1, the KV heads, or each its own. Entries behind a count are never
    read. Rows that run past the queries or keys belong to a tile like others.
    """

    partial_count: Tensor
    partial: Tensor
    full_count: Tensor
    full: Tensor
    query_tile: int
    key_tile: int

    @property
    def num_heads(self) -> int:
        return self.partial.shape[1]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.partial_count, self.partial, self.full_count, self.full

    def strides(self) -> tuple[int, int, int, int]:
        """Lines of a batch entry and of a head, and the lengths of a line of each list."""
        batch, heads, tiles, most = self.partial.shape
        return heads * tiles if batch > 1 else 0, tiles, most, self.full.shape[3]


def lists_from_map(
    visited: Tensor, queries: int, keys: int, causal: bool, query_tile: int, key_tile: int,
    most: int | None = None,
) -> TileLists:  # fmt: skip
    """From which tiles are visited, bool [B or 1, Hm, query tiles, key tiles], where no mask but
    causality hides single keys. `most` bounds the visits of a query tile; without it a line has
    room for all key tiles, as asking would stall the device."""
    device = visited.device
    starts = torch.arange(visited.shape[3], device=device) * key_tile
    first = torch.arange(visited.shape[2], device=device)[:, None] * query_tile + keys - queries
    full = starts + key_tile <= keys
    if causal:
        last = (first + query_tile).clamp(max=keys) - 1
        visited = visited & (starts <= last)
        full = full & (starts + key_tile - 1 <= first)
    partial = _compact(visited & ~full, most)
    return TileLists(*partial, *_compact(visited & full, most), query_tile, key_tile)


def lists_of_every(call: Attention, step: int, tile: int = 128) -> TileLists:
    """What every `step`-th query of a causal call sees, `tile` of these and of the keys a tile.
    Under a mask all tiles are partial."""
    keys, device = call.k.shape[2], call.q.device
    starts = torch.arange(0, call.q.shape[2], step * tile, device=device) + call.offset
    last = (starts + step * tile).clamp(max=keys) - 1
    whole = torch.zeros_like(starts) if call.mask is not None else (starts + 1) // tile
    seen = last // tile + 1
    every = torch.arange(-(-keys // tile), device=device, dtype=torch.int32)
    full = every.expand(1, 1, len(starts), -1).contiguous()
    partial = (full + whole[:, None]).to(torch.int32)
    counts = (count.to(torch.int32)[None, None] for count in (seen - whole, whole))
    partial_count, full_count = counts
    return TileLists(partial_count, partial, full_count, full, tile, tile)


@functools.cache
def lists_of_grid(
    grid: tuple[int, ...], near: tuple[int, ...], dilation: grids.Dilation, device: torch.device
) -> TileLists:
    """What each KV head sees of a call whose tokens are `in_order`, 0 for all; made once."""
    seen = torch.from_numpy(grids.seen_by_heads(grid, near, dilation)[None])
    count, most = grids.tokens(grid), int(seen.sum(-1).max())
    return lists_from_map(
        seen.to(device), count, count, False, grids.TILE, grids.TILE, most=most
    )  # fmt: skip


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, lists: TileLists, *,
    mask: Tensor | None = None, sinks: Tensor | None = None, scale: float, causal: bool,
    window: Sequence[int] = (0,), softcap: float = 0.0, sink_tokens: Sequence[int] = (0,),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over the tiles on `lists`: output [B, N, H, Dv] and log-sum-exp [B, H, N] as in
    `attention_with_lse`. Rows whose lists are empty are 0. Not differentiable."""
    call = bind(q, k, v, mask, None, sinks, scale, causal, window, softcap, sink_tokens)
    _check(call, lists)
    own = q.is_cuda and AVAILABLE and q.dtype != torch.float64
    if not own or not q.numel() or not k.shape[2]:
        return block_sparse_reference(call, lists)
    from .triton import attention_forward

    return attention_forward(call, lists)


def block_sparse_reference(call: Attention, lists: TileLists) -> tuple[Tensor, Tensor]:
    """`block_sparse` in plain PyTorch, one query tile at a time."""
    batch, heads, queries, _ = call.q.shape
    out = call.q.new_empty(batch, queries, heads, call.v.shape[3])
    lse = torch.empty(call.q.shape[:3], dtype=sum_dtype(call.q), device=call.q.device)
    for number, start in enumerate(range(0, queries, lists.query_tile)):
        stop = min(start + lists.query_tile, queries)
        seen = _visible(call, lists, number, start, stop)
        rows = call.q[:, :, start:stop]
        values, sums = explicit(
            Tile(rows, call.k, call.v, seen, None, call.sinks, call.scale, call.softcap)
        )
        out[:, start:stop] = values.transpose(1, 2)
        lse[:, :, start:stop] = sums
    return out, lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over all keys from outputs [B, N, H, Dv] and log-sum-exps [B, H, N] over
    disjoint sets of them (Rabe and Staats, 2021); sink logits belong to one part only."""
    sums = torch.stack([lse for _, lse in parts])
    lse = sums.logsumexp(0)
    weights = (sums - lse.masked_fill(lse == -torch.inf, 0.0)).exp().transpose(2, 3)[..., None]
    terms = [weight * out for weight, (out, _) in zip(weights, parts, strict=True)]
    return torch.stack(terms).sum(0).to(parts[0][0].dtype), lse


def _visible(call: Attention, lists: TileLists, number: int, start: int, stop: int) -> Tensor:
    """Which keys the rows [start, stop) of a query tile see, [B or 1, H, n, T]."""
    heads, keys = call.q.shape[1], call.k.shape[2]

    def listed(count: Tensor, tiles: Tensor) -> Tensor:
        count, tiles = count[:, :, number, None], tiles[:, :, number].long()
        room = torch.arange(tiles.shape[2], device=tiles.device) < count
        found = tiles.new_zeros(*tiles.shape[:2], -(-keys // lists.key_tile) + 1)
        # What lies behind a count goes to a tile behind the last.
        found.scatter_(2, tiles.masked_fill(~room, found.shape[2] - 1), 1)
        by_key = found[:, :, :-1].bool().repeat_interleave(lists.key_tile, 2)[:, :, :keys]
        return by_key.repeat_interleave(heads // tiles.shape[1], 1)[:, :, None]

    rows = torch.arange(start, stop, device=call.q.device) + call.offset
    own = visible_from(rows, keys, call.mask, call.causal, call.window, call.sink_tokens)
    seen = listed(lists.partial_count, lists.partial)
    if own is not None:
        seen = seen & own.flatten(1, 2).repeat_interleave(heads // own.shape[1], 1)
    seen = seen | listed(lists.full_count, lists.full)
    return seen.expand(-1, -1, stop - start, -1)


def _check(call: Attention, lists: TileLists) -> None:
    batch, heads, queries, _ = call.q.shape
    tiles = -(-queries // lists.query_tile)
    for count, entries in ((lists.partial_count, lists.partial), (lists.full_count, lists.full)):
        b, h, n = count.shape
        if b not in (1, batch) or heads % h or n != tiles or entries.shape[:3] != count.shape:
            raise ValueError(
                f"block_sparse: lists {list(entries.shape)} with counts {list(count.shape)} do not "
                f"serve {batch} x {heads} heads of {tiles} query tiles"
            )


def _compact(chosen: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """Counts and ascending places of True in the last dimension."""
    places = (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    return chosen.sum(-1, dtype=torch.int32), places.to(torch.int32).contiguous()
