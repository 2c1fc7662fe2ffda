"""Which key tiles a query tile visits where it finds them by halving chunks (HiP Attention,
arXiv 2406.09827).

The keys are cut into chunks of some tiles, at least twice as many as are kept. Of these the best go
on, each as its two halves; what is left when a chunk is a tile is kept. So a query tile looks at
about as many chunks as it keeps tiles, whatever lies in the others.

The paper looks at one key of a chunk. Here a chunk is BOXES runs of neighbouring keys, of each of
which the range of every channel is known; the logarithm of the mean of a run's exponentials is
estimated from these as for decoded tokens (`kernels/decode_topk/reference.py`), which sees a single
key that is unlike the others. Both were measured on the trained model of examples/
(docs/attention.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.block_topk import reference as topk
from fxopt.kernels.block_topk.reference import TILE
from fxopt.kernels.decode_topk import reference as ranges

STRIDE = 8
"""One query of so many is asked."""
BOXES = 4
"""Runs of a chunk whose channels have ranges of their own."""
FORCED = 2.0 * TILE / STRIDE
"""More than the mass of any chunk."""

Boxes = list[tuple[Tensor, Tensor, Tensor]]
"""Of chunks of 1, 2, 4, ... tiles: low and high [B, KV, BOXES * chunks, D], and where a run has a
visible key, [B or 1, BOXES * chunks]."""


def halvings(top: int) -> int:
    """How often chunks are halved where `top` per mille of the tiles are kept: chunks of
    2**halvings tiles are at least twice as many as that."""
    return max(0, (500 // top).bit_length() - 1) if top else 0


def chunks(keys: int, depth: int) -> int:
    """Tiles that cover `keys` keys in whole chunks of 2**depth."""
    whole = -(-topk.tiles(keys) // 2**depth) + int(torch.compiler.is_exporting())
    return whole * 2**depth


def boxes(k: Tensor, mask: Tensor | None, depth: int) -> Boxes:
    """The ranges of k [B, KV, T, D] for chunks of up to 2**depth tiles, of what mask [B, T] shows;
    0 in runs that are hidden, as those behind the last key are."""
    size, keys = TILE // BOXES, k.shape[2]
    more = chunks(keys, depth) * TILE - keys
    padded = torch.compiler.is_exporting() or more > 0
    runs = torch.cat([k, k[:, :, -1:].expand(-1, -1, more, -1)], 2) if padded else k
    runs, shown = runs.unflatten(2, (-1, size)), _shown(keys, mask, more, k.device)
    shown = shown.unflatten(1, (-1, size))
    if mask is None:
        low, high = torch.aminmax(runs, dim=3)
    else:
        hidden = ~shown[:, None, :, :, None]
        low = runs.masked_fill(hidden, torch.inf).amin(3)
        high = runs.masked_fill(hidden, -torch.inf).amax(3)
    some = shown.any(2)
    found: Boxes = []
    for level in range(depth + 1):
        if level:
            low, high = low.unflatten(2, (-1, 2)).amin(3), high.unflatten(2, (-1, 2)).amax(3)
            some = some.unflatten(1, (-1, 2)).any(2)
        none = ~some[:, None, :, None]
        found.append((low.masked_fill(none, 0.0), high.masked_fill(none, 0.0), some))
    return found


def _shown(keys: int, mask: Tensor | None, more: int, device: torch.device) -> Tensor:
    """Where `keys` and `more` behind them are visible, [B or 1, keys + more]."""
    if mask is None:
        return (torch.arange(keys + more, device=device) < keys)[None]
    return F.pad(mask != 0, (0, more))


def chosen_tiles(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float, top: Sequence[int],
    spared: int = topk.SPARED,
) -> Tensor:  # fmt: skip
    """Which key tiles are kept, as `block_topk.reference.chosen_tiles`."""
    known = boxes(k, mask, max(map(halvings, top)))
    return choose(q, known, k.shape[2], mask, scale, softcap, top, spared)


def choose(
    q: Tensor, known: Boxes, keys: int, mask: Tensor | None, scale: float, softcap: float,
    top: Sequence[int], spared: int = topk.SPARED,
) -> Tensor:  # fmt: skip
    """`chosen_tiles` by the `boxes` of at least the first `keys` keys, which mask [B, keys] is of.
    What lies behind these in a chunk with the last of them is not looked at."""
    depths = [halvings(t) for t in top]
    depth, device = max(depths), q.device
    asked = topk.asked(q, STRIDE).unflatten(1, (len(top), -1))  # [B, KV, G, rows, D]
    seen, near, sinks = topk.standing(q.shape[2], keys, mask, device)
    more = chunks(keys, depth) - seen.shape[-1]
    seen, near, sinks = (F.pad(x, (0, more)) for x in (seen, near, sinks))
    count = topk.kept_count(seen, q.shape[2], keys, top, spared)
    alive: Tensor | None = None
    mass = value = seen
    for level in range(depth, -1, -1):
        step = 2**level
        visible, close, first = (x.unflatten(-1, (-1, step)).any(-1) for x in (seen, near, sinks))
        forced = (close | first)[:, None, None]
        visible, close = visible[:, None, None], close[:, None, None]
        alive = visible if alive is None else alive.repeat_interleave(2, -1) & visible
        mass = _mass(asked, known[level], alive & ~close, scale, softcap)
        value = mass.masked_fill(forced, FORCED).masked_fill(~alive, -1.0)
        # Heads that begin with smaller chunks keep all larger ones.
        begins = torch.tensor([d >= level for d in depths], device=device)[:, None, None, None]
        alive = alive & ((topk.ranks(value, chunks(keys, depth) // step) < count) | ~begins)
    assert alive is not None
    return alive[..., : topk.room(keys)]


def _mass(
    asked: Tensor, known: tuple[Tensor, Tensor, Tensor], alive: Tensor, scale: float, softcap: float
) -> Tensor:
    """What the asked queries of a tile give each chunk of what they give all that are `alive`
    [B or 1, KV or 1, G or 1, tiles, chunks], summed over these queries."""
    low, high, some = known
    number = alive.shape[-1] * BOXES
    low, high, some = low[:, :, :number], high[:, :, :number], some[:, :number]
    q = asked.flatten(1, 2)
    scores = ranges.estimate(q, low, high, scale)  # [B, KV, G, rows, runs]
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    least = torch.finfo(scores.dtype).min
    scores = scores.unflatten(3, (-1, TILE // STRIDE)).unflatten(-1, (-1, BOXES))
    shown = some.unflatten(1, (-1, BOXES))[:, None, None, None, None]
    shown = shown & alive[..., None, :, None]
    scores = scores.masked_fill(~shown, least)
    weights = scores.flatten(-2).softmax(-1).unflatten(-1, (-1, BOXES)) * shown
    return weights.sum((-3, -1))
