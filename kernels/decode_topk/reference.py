"""Which tiles of a cache a decoded token reads: those of the most estimated attention.

Of each tile the cache knows the range of every channel of its keys. Were these independent and
Gaussian about the middle of their ranges, the exponentials of a query's products with the keys
would have the mean

    exp(q . (low + high) / 2 + (q * q) . (high - low)^2 / 12)

whose logarithm is the estimate, at twice the variance of numbers that are anywhere in their ranges
alike: found to tell tiles apart better than that, and than what a key can score at most (Quest,
arXiv 2406.10774). Means and deviations in place of ranges miss a single key that is unlike the
others (docs/attention.md). The query heads of a KV head read the same tiles: a tile counts as much
as it does for the head whose best tile it falls least behind of. A KV head thus reads a number of
keys that is known before its data are.

A choice may be kept for some tokens, as HiP Attention keeps its masks in decoding (arXiv
2406.09827): each of them reads the tiles that the first one's query chose, and whatever was in no
whole tile then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels.block_topk.reference import ranks

TILE = 32
"""Keys of a tile of what is stored exactly; a packed block is a tile of its own. Fewer keys are
told apart better, and more has to be read for it: two numbers a channel and tile."""
NEAREST = 64
"""Newest keys whose whole tiles are read in any case; so are the first tile with a visible key, and
what lies in no whole tile."""


def tiles_read(top_keys: int, size: int = TILE) -> int:
    """How many tiles of `size` keys a decoded token reads."""
    return max(1 + nearest(size), top_keys // size)


def nearest(size: int) -> int:
    """How many of the newest whole tiles are read in any case."""
    return max(1, NEAREST // size)


def grown(refresh: int, size: int) -> int:
    """How many tiles may become whole while a choice is kept for `refresh` tokens. Where crops
    cut one block again and again there are more, and tiles are chosen before that."""
    return (refresh - 1) // size + 1


def is_due(chosen_at: Tensor, begin: int, whole: int, refresh: int, size: int) -> Tensor:
    """Whether the token at position `begin`, which finds `whole` tiles, chooses: bool [B, KV].

    `chosen_at` int32 [B, KV, 3] is of the choice before: the position of its token, 0 if there is
    none; how many tiles were whole then, and how many of them it read. A token that comes a second
    time, as after a crop, chooses again.
    """
    position, then, _ = chosen_at.unbind(-1)
    old = (position == 0) | (begin <= position) | (begin >= position + refresh)
    return old | (whole - then > grown(refresh, size))


def choosers(rows: Tensor, first: int, refresh: int) -> Tensor:
    """The positions of the tokens that choose what those at `rows` read: where one by one is
    decoded from `first` on, each `refresh`-th; earlier ones choose themselves."""
    return rows - (rows - first).clamp(min=0) % refresh


def ranges(k: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The least and the largest of each channel, [B, h, tiles, D], of the keys of the whole tiles
    of k [B, h, T, D] that mask [B, T] shows; 0 where it shows none."""
    whole = k.shape[2] // TILE
    tiles = k[:, :, : whole * TILE].unflatten(2, (whole, TILE))
    if mask is None:
        return tiles.amin(3), tiles.amax(3)
    shown = (mask[:, : whole * TILE] != 0).unflatten(1, (whole, TILE))[:, None, :, :, None]
    low, high = (torch.where(shown, tiles, end) for end in (torch.inf, -torch.inf))
    low, high, none = low.amin(3), high.amax(3), ~shown.any(3)
    return low.masked_fill(none, 0.0), high.masked_fill(none, 0.0)


def estimate(q: Tensor, low: Tensor, high: Tensor, scale: float) -> Tensor:
    """The logarithm of the mean of a tile's exponentials, [B, KV, H / KV, N, tiles], in float32 at
    least.

    q [B, H, N, D]; low and high [B, KV, tiles, D].
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.to(dtype).unflatten(1, (low.shape[1], -1)) * scale
    low, high = (x.to(dtype).unsqueeze(2).mT for x in (low, high))
    return q @ ((low + high) / 2) + q.square() @ ((high - low).square() / 12)


def behind_best(
    q: Tensor, low: Tensor, high: Tensor, shown: Tensor | None, whole: Tensor, size: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """How far each query's tiles are behind its best one, [B, KV, N, tiles]; -1 for those that are
    read in any case, infinite for those that cannot be read.

    `whole` [N] is how many tiles of `size` keys are whole when a query comes, `shown` [B, tiles]
    where a tile has a visible key.
    """
    number = torch.arange(low.shape[2], device=q.device)
    seen, first = (number < whole[:, None])[None, None], (number == 0)[None, None, None]
    if shown is not None:
        seen = seen & shown[:, None, None]
        first = (shown.to(torch.int64).cumsum(1) == 1)[:, None, None]
    mass = estimate(q, low, high, scale)
    mass = mass.masked_fill(~seen.unsqueeze(2), torch.finfo(mass.dtype).min)
    behind = (mass.amax(-1, keepdim=True) - mass).amin(2)
    behind = behind.masked_fill(first | (number >= whole[:, None] - nearest(size)), -1.0)
    return behind.masked_fill(~seen, torch.inf)


def kept_tiles(
    q: Tensor, low: Tensor, high: Tensor, shown: Tensor | None, whole: Tensor, top_keys: int,
    size: int, scale: float,
) -> Tensor:  # fmt: skip
    """Which tiles each query reads, bool [B, KV, N, tiles]: `tiles_read(top_keys, size)` of those
    that can be read, or all if there are fewer; of equal ones the first. Arguments as of
    `behind_best`."""
    behind = behind_best(q, low, high, shown, whole, size, scale)
    kept = ranks(-behind, low.shape[2]) < tiles_read(top_keys, size)
    return kept & (behind < torch.inf)


def shown_tiles(mask: Tensor | None, starts: Tensor) -> Tensor | None:
    """Whether a key of a tile is visible, [B, tiles], by mask [B, T]; tile i begins at position
    `starts[i]` and ends where the next one begins."""
    if mask is None:
        return None
    before = torch.nn.functional.pad((mask != 0).to(torch.int64).cumsum(1), (1, 0))
    before = before.index_select(1, starts.clamp(max=mask.shape[1]))
    return before[:, 1:] > before[:, :-1]


def kept_keys(kept: Tensor, whole: Tensor, keys: int, first: int, size: int) -> Tensor:
    """Which of `keys` positions each query reads, bool [B, KV, N, keys].

    Tiles of `size` keys begin at position `first`; what lies in no whole tile is read.
    """
    place = torch.arange(keys, device=kept.device) - first
    tile = place.clamp(min=0) // size
    inside = (place >= 0) & (tile < whole[:, None])
    return ~inside | kept.index_select(-1, tile.clamp(max=kept.shape[-1] - 1))


def as_bias(seen: Tensor, q: Tensor) -> Tensor:
    """[B, H, N, T] that hides what is not `seen` [B, KV, N, T] when added to scores."""
    hidden = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    return hidden.repeat_interleave(q.shape[1] // seen.shape[1], 1)
