"""Which key tiles a query tile visits where it keeps those of the most estimated attention.

Queries are averaged over POOL positions and attend to all keys; what falls on a tile of keys,
summed over the pools of a query tile, is the estimate of its mass (as in XAttention and
FlexPrefill, whose antidiagonals and pools average keys as well and see single ones less). Of the
tiles that a query tile can see it keeps a share, the sink's and the nearest among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
"""Queries and keys of a tile; a call of fewer queries (decoding) sees all keys."""
POOL = 32
"""Queries of an average: QKᵀ of the estimate costs 1 / (2 * POOL) of attention's products."""
LEAST = 8
"""Tiles that are kept in any case: short rows cost little and lose much."""
FORCED = 8.0
"""More than any tile's mass, which is at most one a pool."""


def hides(queries: int, keys: int) -> bool:
    """Whether a call is long enough that tiles are left out."""
    return queries >= TILE and keys > LEAST * TILE


def hides_some(queries: int, keys: int, top: int) -> bool:
    """Whether a call at `top` per mille leaves out a tile, padding aside."""
    tiles = -(-keys // TILE)
    return hides(queries, keys) and kept_tiles(tiles, top) < tiles


def kept_tiles(seen: int, top: int) -> int:
    """How many of `seen` tiles are kept at `top` per mille; 0 for all."""
    return min(seen, max(LEAST, -(-seen * top // 1000))) if top else seen


def most_tiles(keys: int, top: Sequence[int]) -> int:
    """The longest row of kept tiles."""
    seen = -(-keys // TILE)
    return max(kept_tiles(seen, t) for t in top)


def pooled(q: Tensor) -> Tensor:
    """Means over POOL queries of q [B, H, N, D], whole tiles of them, in q's dtype; the last query
    fills the last tile."""
    queries = q.shape[2]
    rows = torch.arange((queries + TILE - 1) // TILE * TILE, device=q.device)
    whole = q.index_select(2, rows.clamp(max=queries - 1))
    batch, heads, _, dim = q.shape
    sums = torch.promote_types(q.dtype, torch.float32)
    return whole.reshape(batch, heads, -1, POOL, dim).mean(3, dtype=sums).to(q.dtype)


def estimate(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """The mass that falls on each key tile, [B, KV, H / KV, query tiles, key tiles]."""
    batch, heads, queries, dim = q.shape
    kv, keys = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    means = pooled(q).to(dtype).reshape(batch, kv, -1, dim) * scale
    scores = (means @ k.to(dtype).mT).reshape(batch, kv, heads // kv, -1, keys)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    pools = torch.arange(scores.shape[3], device=q.device)
    last = ((pools + 1) * POOL).clamp(max=queries) - 1 + (keys - queries)
    seen = torch.arange(keys, device=q.device) <= last[:, None]
    if mask is not None:
        seen = seen & (mask != 0)[:, None, None, None]
    # A pool that sees no key has no mass: the least finite number instead of infinities.
    scores = scores.masked_fill(~seen, torch.finfo(dtype).min)
    weights = F.pad(scores.softmax(-1) * seen, (0, -keys % TILE))
    tiles = weights.reshape(
        batch, kv, heads // kv, -1, TILE // POOL, (keys + TILE - 1) // TILE, TILE
    )
    return tiles.sum((-3, -1))


def chosen_tiles(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float, top: Sequence[int]
) -> Tensor:
    """Which key tiles are kept, bool [B, KV, H / KV, query tiles, key tiles].

    Arguments as of causal `fxopt::attention`, `top` with one entry a KV head. Tiles of equal mass
    are kept in their order. Whole tiles count from the first query and the first key.
    """
    queries, keys, device = q.shape[2], k.shape[2], q.device
    mass = estimate(q, k, mask, scale, softcap)
    starts = torch.arange(mass.shape[4], device=device) * TILE
    first = (torch.arange(mass.shape[3], device=device) * TILE + (keys - queries))[:, None]
    seen = (starts <= (first + TILE - 1).clamp(max=keys - 1))[None]
    sinks = (starts == 0)[None, None]
    if mask is not None:
        some = F.pad(mask != 0, (0, -keys % TILE)).reshape(mask.shape[0], -1, TILE).any(-1)
        seen = seen & some[:, None]
        sinks = (some.to(torch.int64).cumsum(1) == 1)[:, None]
    near = starts > first - 2 * TILE  # of the diagonal, and of the TILE keys before it
    per_mille = torch.tensor([t or 1000 for t in top], device=device)[:, None]
    count = (seen.sum(-1)[:, None] * per_mille + 999) // 1000
    kept = count.clamp(min=LEAST)[:, :, None, :, None]
    seen, forced = seen[:, None, None], (near | sinks)[:, None, None]
    value = mass.masked_fill(forced, FORCED).masked_fill(~seen, -1.0)
    order = value.argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < kept) & seen
