"""Decoding that reads some tiles of the cache: those of the most estimated attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxopt.kernels.decode_topk.reference import (
    TILE,
    as_bias,
    behind_best,
    ranges,
    shown_tiles,
    tiles_read,
)

from .heads import Arguments, Attend
from .layout import RANGES, Blocks
from .packing import code_range, unpack_side, wide
from .pages import lines, stored


@dataclass(frozen=True)
class Tiles:
    """What of a head class is stored in whole tiles of `size` tokens, from position `first` on.

    Tile i begins at position `starts[i]` of [tiles + 1] and holds tokens up to the next one's;
    the channels of its keys lie between `low` and `high` [B, h, tiles, D].
    """

    size: int
    first: int
    starts: Tensor
    low: Tensor
    high: Tensor

    @property
    def count(self) -> int:
        return self.low.shape[2]


def check(arguments: Arguments) -> None:
    """ValueError where some tiles are to be read beside what the choice does not know."""
    if not any(arguments.top_keys):
        return
    wrong = {
        "needs causal attention": not arguments.causal,
        "does not look at a bias": arguments.bias is not None,
        "and window exclude each other in one head": any(arguments.window),
        "and tiles kept in prompts exclude each other in one head": any(arguments.top),
    }
    for reason, holds in wrong.items():
        if holds:
            raise ValueError(f"cached attention: a layout that reads some tiles {reason}")


def leaves_some(arguments: Arguments, tiles: int, size: int) -> bool:
    """Whether a call leaves out some of `tiles` whole tiles: one of a single token does."""
    top_keys = arguments.top_keys[0]
    single = arguments.q.shape[2] == 1
    return top_keys > 0 and single and tiles > tiles_read(top_keys, size)


def note_ranges(part: dict[str, Tensor], begin: int, end: int, mask: Tensor | None) -> None:
    """Write the ranges of the tiles of an exact class that tokens from `begin` to `end` filled;
    `mask` is that of all tokens so far."""
    first, last = begin // TILE, end // TILE
    if RANGES[0] in part and last > first:
        filled = slice(first * TILE, last * TILE)
        found = ranges(part["key"][:, :, filled], None if mask is None else mask[:, filled])
        for name, x in zip(RANGES, found, strict=True):
            part[name][:, :, first:last] = x


def exact_tiles(part: dict[str, Tensor], begin: int) -> Tiles:
    """The tiles of an exact class of `begin` tokens."""
    whole = begin // TILE
    starts = torch.arange(whole + 1, device=part["key"].device) * TILE
    return Tiles(TILE, 0, starts, *(part[name][:, :, :whole] for name in RANGES))


def packed_tiles(part: dict[str, Tensor], fmt: Blocks, used: int) -> Tiles:
    """The first `used` blocks of a packed class."""
    starts = fmt.sink + part["block_start"][: used + 1]
    blocks = stored(part, ("key_scale", "key_zero"), used)
    return Tiles(fmt.group, fmt.sink, starts, *packed_ranges(blocks, fmt))


def packed_ranges(part: dict[str, Tensor], fmt: Blocks) -> tuple[Tensor, Tensor]:
    """Between which numbers the channels of packed keys lie, [B, h, blocks, D]: a code times a
    scale from a zero on."""
    zero, scale = (wide(part[f"key_{name}"].squeeze(3)) for name in ("zero", "scale"))
    least, largest = code_range(fmt.key_bits)
    return zero + least * scale, zero + largest * scale


def attend_kept(
    attention: Attend,
    chosen: Arguments,
    tiles: Tiles,
    stored: tuple[dict[str, Tensor], Blocks | None],
    rest: Sequence[Tensor],
    mask: Tensor | None,
) -> Tensor:
    """One new token over the kept tiles of what `stored` holds, which alone are gathered, and over
    the `rest` [B, h, tokens, D] of the keys and values, which lies in no tile."""
    part, fmt = stored
    shown = shown_tiles(mask, tiles.starts)
    whole = tiles.starts.new_full((1,), tiles.count)
    ends = tiles.low, tiles.high
    behind = behind_best(chosen.q, *ends, shown, whole, tiles.size, chosen.scale)
    # Tiles without a visible key fill up what a short row leaves: their keys are hidden below.
    places = behind[:, :, 0].argsort(dim=-1, stable=True)
    places = places[..., : tiles_read(chosen.top_keys[0], tiles.size)]
    keys, values = (
        torch.cat([_gathered(part, side, fmt, tiles, places, chosen.q.dtype), own], 2)
        for side, own in zip(("key", "value"), rest, strict=True)
    )
    seen = _seen(tiles, places, mask)
    if seen is not None:
        outside = seen.new_ones(*seen.shape[:2], rest[0].shape[2])
        if mask is not None:
            others = torch.cat([mask[:, : tiles.first], mask[:, tiles.starts[-1] :]], 1) != 0
            outside = others[:, None].expand(outside.shape)
        seen = as_bias(torch.cat([seen, outside], 2)[:, :, None], chosen.q)
    return replace(chosen, bias=seen, causal=False).attend(attention, keys, values, None)


def _gathered(
    part: dict[str, Tensor], side: str, fmt: Blocks | None, tiles: Tiles, places: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The keys or values of the tiles at `places` [B, h, count], as [B, h, count * size, D]."""
    batch, heads = places.shape[:2]

    def picked(x: Tensor, index: Tensor) -> Tensor:
        """Rows of dimension 2; whole rows are copied."""
        rows = x.flatten(0, 2).index_select(0, index.flatten())
        return rows.view(batch, heads, -1, *x.shape[3:])

    if fmt is None:
        slot = torch.arange(tiles.size, device=places.device)
        row = torch.arange(batch * heads, device=places.device).view(batch, heads, 1)
        tokens = (places[..., None] * tiles.size + slot).flatten(2)
        return picked(part[side], row * part[side].shape[2] + tokens)
    names = (side, f"{side}_scale", f"{side}_zero")
    index = lines(part, side, places)
    some = {name: picked(part[name], index) for name in names if name in part}
    return unpack_side(some, side, fmt.bits(side), dtype).flatten(2, 3)


def _seen(tiles: Tiles, places: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which tokens of the tiles at `places` are there and visible, [B, h, count * size]; None
    where all are."""
    lengths = tiles.starts.diff()
    if mask is None and bool((lengths == tiles.size).all()):
        return None
    slot = torch.arange(tiles.size, device=places.device)
    there = slot < lengths[places][..., None]
    if mask is not None:
        positions = (tiles.starts[places][..., None] + slot).clamp(max=mask.shape[1] - 1)
        rows = (mask != 0)[:, None].expand(-1, places.shape[1], -1)
        there = there & rows.gather(2, positions.flatten(2)).view_as(there)
    return there.flatten(2)
