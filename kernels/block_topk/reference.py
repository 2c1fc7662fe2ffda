"""Which key tiles a query tile visits where it keeps those of the most estimated attention.

Every STRIDE-th query attends to all keys; what of that falls on a tile of keys, summed over the
queries asked of a tile, is the estimate of its mass (SampleAttention). Averages of neighbouring
queries, as in SeerAttention and by antidiagonals in XAttention, blur what rotary positions tell
apart: at equal cost they lost what the trained model of examples/ retrieves.
Of the tiles that a query tile can see it keeps a share, the sink's and the nearest among them, or
of these as few as hold a part of the mass (XAttention, FlexPrefill), which sharp heads have in few.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
"""Queries and keys of a tile."""
STRIDE = 16
"""One query of so many is asked: 1 / (2 * STRIDE) of attention's products."""
SPARED = 2
"""Last tiles of queries that see all keys: a prompt's question stands there. So does a call that
has no more of them, decoding among these."""
LEAST = 8
"""Tiles that are kept in any case: short rows cost little and lose much."""
FEWEST = 4
"""Tiles that are kept whatever part of the mass is asked for: the sink's and, where tiles of
queries and keys do not begin together, three near the queries."""
MOST_SUMS = 2**25
"""float32 sums over tiles that exist at once on a GPU (128 MiB)."""
MOST_ENTRIES = 2**26
"""Entries of the lists of tiles that exist at once on a GPU (256 MiB)."""
FORCED = 2.0 * TILE / STRIDE
"""More than any tile's mass, which is at most one a query that is asked."""


def tiles(length: int) -> int:
    """Tiles that cover `length` queries or keys."""
    return (length + TILE - 1) // TILE


def room(length: int) -> int:
    """Tiles that cover `length`; when exporting one more, as no size of a trace may be 1."""
    return tiles(length) + int(torch.compiler.is_exporting())


def least(mass: int) -> int:
    """Tiles that a share keeps at least; at a `mass` of 1000 per mille it has no such minimum."""
    return FEWEST if mass == 1000 else LEAST


def hides(queries: int, keys: int, mass: int = 0) -> bool:
    """Whether a call is long enough that tiles are left out."""
    return queries > SPARED * TILE and keys > (FEWEST if mass else LEAST) * TILE


def hides_some(queries: int, keys: int, top: int, mass: int = 0) -> bool:
    """Whether a call at `top` per mille leaves out a tile, padding aside; with `mass`, whether it
    may."""
    spared = queries - (tiles(queries) - SPARED) * TILE
    seen = tiles(keys - spared)
    fewest = FEWEST if 0 < mass < 1000 else kept_tiles(seen, top, mass)
    return hides(queries, keys, mass) and fewest < seen


def kept_tiles(seen: int, top: int, mass: int = 0) -> int:
    """How many of `seen` tiles are kept at `top` per mille, with `mass` at most; 0 for all."""
    return min(seen, max(least(mass), -(-seen * top // 1000))) if top else seen


def asked(q: Tensor, stride: int = STRIDE) -> Tensor:
    """The last of each `stride` queries of q [B, H, N, D], for whole tiles of them; behind the last
    query there is that one."""
    count = TILE // stride * room(q.shape[2])
    rows = (torch.arange(count, device=q.device) + 1) * stride - 1
    return q.index_select(2, rows.clamp(max=q.shape[2] - 1))


def estimate(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """The mass that falls on each key tile, [B, KV, H / KV, query tiles, key tiles]."""
    batch, heads, queries, dim = q.shape
    kv, keys = k.shape[1:3]
    group, rows = heads // kv, TILE // STRIDE * room(queries)
    dtype = torch.promote_types(q.dtype, torch.float32)
    some = asked(q).to(dtype).reshape(batch, kv, group * rows, dim) * scale
    scores = (some @ k.to(dtype).mT).reshape(batch, kv, group, rows, keys)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    ends = (torch.arange(rows, device=q.device) + 1) * STRIDE
    positions = ends.clamp(max=queries) - 1 + (keys - queries)
    seen = torch.arange(keys, device=q.device) <= positions[:, None]
    if mask is not None:
        seen = seen & (mask != 0)[:, None, None, None]
    # A query that sees no key has no mass: the least finite number instead of infinities.
    scores = scores.masked_fill(~seen, torch.finfo(dtype).min)
    weights = F.pad(scores.softmax(-1) * seen, (0, room(keys) * TILE - keys))
    shape = (batch, kv, group, room(queries), TILE // STRIDE, room(keys), TILE)
    return weights.reshape(shape).sum((-3, -1))


def chosen_tiles(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float, top: Sequence[int],
    mass: Sequence[int] = (0,), spared: int = SPARED,
) -> Tensor:  # fmt: skip
    """Which key tiles are kept, bool [B, KV, H / KV, query tiles, key tiles].

    Arguments as of causal `fxopt::attention`, `top` and `mass` with one entry a KV head or one in
    all. Tiles of equal mass are kept in their order. Whole tiles count from the first query and the
    first key. The last `spared` query tiles keep all.
    """
    queries, keys = q.shape[2], k.shape[2]
    estimated = estimate(q, k, mask, scale, softcap)
    seen, near, sinks = standing(queries, keys, mask, q.device)
    kept = kept_count(seen, queries, keys, top, spared, mass)
    seen, forced = seen[:, None, None], (near | sinks)[:, None, None]
    value = estimated.masked_fill(forced, FORCED).masked_fill(~seen, -1.0)
    rank = ranks(value, room(keys))
    chosen = (rank < kept) & seen
    if not any(0 < m < 1000 for m in mass):
        return chosen
    parts = [m / 1000 if 0 < m < 1000 else torch.inf for m in mass]
    wanted = torch.tensor(parts, device=q.device)[:, None, None, None] * estimated.sum(-1, True)
    missing = _before(estimated, rank) < wanted
    return chosen & (missing | forced | _last(queries, spared, q.device)[:, None])


def _before(estimated: Tensor, rank: Tensor) -> Tensor:
    """The mass of all tiles of a lower rank."""
    by_rank = torch.zeros_like(estimated).scatter(-1, rank, estimated)
    return F.pad(by_rank.cumsum(-1), (1, -1)).gather(-1, rank)


def standing(
    queries: int, keys: int, mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Which key tiles a query tile can see [B or 1, query tiles, key tiles], which of them are near
    (its own, and that of the TILE keys before it) [1, query tiles, key tiles], and which is the
    sink's, the first with a visible key [B or 1, 1, key tiles]."""
    starts = torch.arange(room(keys), device=device) * TILE
    first = (torch.arange(room(queries), device=device) * TILE + (keys - queries))[:, None]
    seen = (starts <= (first + TILE - 1).clamp(max=keys - 1))[None]
    sinks = (starts == 0)[None, None]
    if mask is not None:
        some = F.pad(mask != 0, (0, room(keys) * TILE - keys))
        some = some.reshape(mask.shape[0], room(keys), TILE).any(-1)
        seen = seen & some[:, None]
        sinks = (some.to(torch.int64).cumsum(1) == 1)[:, None]
    return seen, (starts > first - 2 * TILE)[None], sinks


def kept_count(
    seen: Tensor, queries: int, keys: int, top: Sequence[int], spared: int,
    mass: Sequence[int] = (0,),
) -> Tensor:  # fmt: skip
    """How many of the tiles that are `seen` a query tile keeps, with `mass` at most,
    [B or 1, KV, 1, query tiles, 1]."""
    per_mille = torch.tensor([t or 1000 for t in top], device=seen.device)[:, None]
    fewest = torch.tensor([least(m) for m in mass], device=seen.device)[:, None]
    kept = torch.maximum((seen.sum(-1)[:, None] * per_mille + 999) // 1000, fewest)
    last = _last(queries, spared, seen.device)
    return torch.where(last, tiles(keys), kept)[:, :, None, :, None]


def _last(queries: int, spared: int, device: torch.device) -> Tensor:
    """Which tiles of queries keep all, [query tiles]."""
    return torch.arange(room(queries), device=device) >= tiles(queries) - spared


def ranks(value: Tensor, tiles: int) -> Tensor:
    """The place of each entry of the last dimension, the largest first, equal ones in order."""
    if torch.compiler.is_exporting():
        # ONNX sorts by TopK alone, which keeps the order of equal ones.
        order = value.topk(tiles, dim=-1).indices
        return order.topk(tiles, dim=-1, largest=False).indices
    return value.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
