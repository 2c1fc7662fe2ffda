"""Key tiles that cannot matter, left out while attention runs (BLASST, arXiv 2512.12087).

A tile of QUERY_TILE queries visits tiles of KEY_TILE keys, both counted from the first: those that
some of its queries see in part, as on the diagonal, at the edges of a window and of padding, and
those of sink tokens; then the ones that all of them see whole, from the first on. The former and
the first of the latter are always computed. Any other is left out where in each row its largest
score lies further below the largest that the row has seen, its sink logit included, than the
head's limit. Limits are positive, so a tile that is left out never raises that maximum: which
tiles are left out does not depend on what was left out before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_TILE, KEY_TILE = 128, 64
LEAST_QUERIES = 256
"""Calls that bring no more, decoding among these, leave nothing out."""
UNIT = 0.01
"""Nats in which `skip` counts."""
DOUBLINGS = 16
"""Steps of a running maximum, where there is no operator for it: 4 million keys."""


def count(length: int, tile: int) -> int:
    """Tiles that cover `length`; when exporting one more, as no size of a trace may be 1."""
    return (length + tile - 1) // tile + int(torch.compiler.is_exporting())


def tiles(queries: int, keys: int, window: int = 0) -> tuple[int, int]:
    """Key tiles that the last `queries` of `keys` tokens visit in a head, one count for each tile
    of queries, and how many of these may be left out. Without padding and sink tokens."""
    visited = may = 0
    for start in range(keys - queries, keys, QUERY_TILE):
        last = min(start + QUERY_TILE, keys) - 1
        begin, low = (max(0, at - window + 1) if window else 0 for at in (start, last))
        visited += last // KEY_TILE + 1 - begin // KEY_TILE
        may += max((start + 1) // KEY_TILE - -(-low // KEY_TILE) - 1, 0)
    return visited, may if queries > LEAST_QUERIES else 0


def limits(skip: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of each query head in nats, infinite where nothing is left out, [H]."""
    values = [UNIT * s if s else math.inf for s in skip]
    return torch.tensor(values, dtype=dtype, device=device)


@functools.cache
def limits_on(device: torch.device, skip: tuple[int, ...]) -> Tensor:
    """`limits` in float32; kept, so that a captured CUDA graph copies nothing."""
    with torch.inference_mode(False):
        return limits(skip, torch.float32, torch.device("cpu")).to(device)


def kept(
    scores: Tensor, queries: Tensor, keys: int, mask: Tensor | None, window: Tensor | None,
    limit: Tensor, logit: Tensor | None,
) -> Tensor:  # fmt: skip
    """Which keys lie in tiles that are computed, bool [B, ..., N, T].

    scores [B, ..., N, T] are those of whole tiles of queries, at positions `queries` [N], and of
    the first T of `keys` keys, hidden ones -inf. `window` (0: none), `limit` in nats and the sink
    `logit` broadcast to [B, ..., 1, 1]; mask [B, keys].
    """
    gap, may = gaps(scores, queries, keys, mask, window, logit)
    out = may & (gap > limit)
    rows = torch.arange(scores.shape[-2], device=scores.device) // QUERY_TILE
    columns = torch.arange(scores.shape[-1], device=scores.device) // KEY_TILE
    return ~out.index_select(-2, rows).index_select(-1, columns)


def gaps(
    scores: Tensor, queries: Tensor, keys: int, mask: Tensor | None, window: Tensor | None,
    logit: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How far below what its rows have seen a tile's scores lie in the row where that is least, and
    whether it may be left out: [B, ..., query tiles, key tiles]. Arguments as of `kept`."""
    (rows, columns), lead = scores.shape[-2:], scores.shape[:-2]
    high, wide = count(rows, QUERY_TILE), count(columns, KEY_TILE)
    more = (0, wide * KEY_TILE - columns, 0, high * QUERY_TILE - rows)
    padded = F.pad(scores, more, value=-torch.inf)
    largest = padded.reshape(*lead, high, QUERY_TILE, wide, KEY_TILE).amax(-1)
    whole = _whole(queries, keys, mask, window, high, wide, scores.dim())
    among = whole[..., :, None, :]
    start = largest.masked_fill(among, -torch.inf).amax(-1, keepdim=True)
    if logit is not None:
        start = torch.maximum(start, logit[..., None])
    later = _running_maximum(largest.masked_fill(~among, -torch.inf))
    gap = torch.maximum(F.pad(later, (1, -1), value=-torch.inf), start) - largest
    # Rows that have seen nothing are no reason to leave a tile out: -inf - -inf is no number.
    gap = torch.where(gap == gap, gap, -torch.inf)
    exists = torch.arange(high * QUERY_TILE, device=scores.device) < rows
    gap = gap.masked_fill(~exists.view(high, QUERY_TILE, 1), torch.inf).amin(-2)
    return gap, whole & (whole.to(torch.int64).cumsum(-1) > 1)


def _whole(
    queries: Tensor, keys: int, mask: Tensor | None, window: Tensor | None, high: int, wide: int,
    dims: int,
) -> Tensor:  # fmt: skip
    """Whether all queries of a tile see all keys of one, [B or 1, ..., query tiles, key tiles]."""
    device = queries.device
    at = torch.arange(high, device=device) * QUERY_TILE
    first = queries.index_select(0, at.clamp(max=queries.shape[0] - 1))
    last = queries.index_select(0, (at + QUERY_TILE - 1).clamp(max=queries.shape[0] - 1))
    starts = torch.arange(wide, device=device) * KEY_TILE
    begin, end = _solid(mask, keys, device)
    shape = (-1, *(1,) * (dims - 1))
    low, up = begin.view(shape), torch.minimum(end.view(shape), (first + 1)[:, None])
    if window is not None:
        reach = torch.where(window > 0, last[:, None] - window + 1, 0)
        low = torch.maximum(low, reach)
    return (starts >= low) & (starts + KEY_TILE <= up)


def _solid(mask: Tensor | None, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The range of keys [B or 1] that are not hidden, empty where there are hidden ones within."""
    if mask is None:
        none = torch.zeros(1, dtype=torch.int64, device=device)
        return none, none + keys
    shown = mask != 0
    places = torch.arange(keys, device=device)
    begin = torch.where(shown, places, keys).amin(1)
    behind = torch.where(shown, places + 1, 0).amax(1)
    return begin, torch.where(behind - begin == shown.sum(1), behind, begin)


def _running_maximum(x: Tensor) -> Tensor:
    if not torch.compiler.is_exporting():
        return x.cummax(-1).values
    places = torch.arange(x.shape[-1], device=x.device)
    for step in range(DOUBLINGS):
        # The first entry is among all that are before.
        x = torch.maximum(x, x.index_select(-1, (places - 2**step).clamp(min=0)))
    return x
