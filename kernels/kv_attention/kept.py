"""Decoding that reads some tiles of the cache: those of the most estimated attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxopt.kernels.decode_topk.reference import (
    TILE,
    as_bias,
    behind_best,
    is_due,
    ranges,
    shown_tiles,
    tiles_read,
)

from .heads import Arguments, Attend
from .layout import CHOICE, RANGES, Blocks
from .packing import code_range, unpack_side, wide
from .pages import lines, stored


@dataclass(frozen=True)
class Tiles:
    """What of a head class is stored in whole tiles of `size` tokens, from position `first` on.

    Tile i begins at position `starts[i]` of [tiles + 1] and holds tokens up to the next one's;
    `ends()` finds between what the channels of its keys lie, two of [B, h, tiles, D].
    """

    size: int
    first: int
    starts: Tensor
    ends: Callable[[], tuple[Tensor, Tensor]]

    @property
    def count(self) -> int:
        return len(self.starts) - 1


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


def chooses(arguments: Arguments, tiles: int, size: int) -> bool:
    """Whether a call reads by a choice among `tiles` whole tiles: one of a single token does, where
    some are left out, or what it chooses is kept for others."""
    top_keys, keeps = arguments.top_keys[0], arguments.refresh[0] > 1
    if not top_keys or arguments.q.shape[2] != 1:
        return False
    return tiles > (0 if keeps else tiles_read(top_keys, size))


def leaves_some(arguments: Arguments, tiles: Tiles) -> bool:
    """Whether some of the tiles are not read; a choice of fewer is made for later tokens alone."""
    return tiles.count > tiles_read(arguments.top_keys[0], tiles.size)


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
    low, high = (part[name][:, :, :whole] for name in RANGES)
    return Tiles(TILE, 0, starts, lambda: (low, high))


def packed_tiles(part: dict[str, Tensor], fmt: Blocks, used: int) -> Tiles:
    """The first `used` blocks of a packed class."""
    starts = fmt.sink + part["block_start"][: used + 1]

    def ends() -> tuple[Tensor, Tensor]:
        return packed_ranges(stored(part, ("key_scale", "key_zero"), used), fmt)

    return Tiles(fmt.group, fmt.sink, starts, ends)


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
    begin: int,
) -> Tensor:
    """One new token, at position `begin`, over the kept tiles of what `stored` holds, which alone
    are gathered, and over the `rest` [B, h, tokens, D] of the keys and values, which lies in no
    tile."""
    part, fmt = stored
    if CHOICE[0] in part:
        places, counts = kept_places(chosen, part, tiles, mask, begin)
    else:
        # Tiles without a visible key fill up what a short row leaves: their keys are hidden below.
        (places, _), counts = _best_places(chosen, tiles, mask), None
    keys, values = (
        torch.cat([_gathered(part, side, fmt, tiles, places, chosen.q.dtype), own], 2)
        for side, own in zip(("key", "value"), rest, strict=True)
    )
    seen = _seen(tiles, places, counts, mask)
    if seen is not None:
        outside = seen.new_ones(*seen.shape[:2], rest[0].shape[2])
        if mask is not None:
            others = torch.cat([mask[:, : tiles.first], mask[:, tiles.starts[-1] :]], 1) != 0
            outside = others[:, None].expand(outside.shape)
        seen = as_bias(torch.cat([seen, outside], 2)[:, :, None], chosen.q)
    return replace(chosen, bias=seen, causal=False).attend(attention, keys, values, None)


def _best_places(chosen: Arguments, tiles: Tiles, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tiles that the query chooses, [B, h, count], and how many of them it can read [B, h]."""
    shown, whole = shown_tiles(mask, tiles.starts), tiles.starts.new_full((1,), tiles.count)
    behind = behind_best(chosen.q, *tiles.ends(), shown, whole, tiles.size, chosen.scale)[:, :, 0]
    places = behind.argsort(dim=-1, stable=True)
    places = places[..., : tiles_read(chosen.top_keys[0], tiles.size)]
    return places, (behind < torch.inf).sum(-1).clamp(max=places.shape[-1])


def kept_places(
    chosen: Arguments, part: dict[str, Tensor], tiles: Tiles, mask: Tensor | None, begin: int
) -> tuple[Tensor, Tensor]:
    """The tiles that are read, [B, h, count], and which of these: those of the choice, which is
    made anew where it is due, and those that have become whole since."""
    choice, chosen_at = (part[name] for name in CHOICE)
    due = is_due(chosen_at, begin, tiles.count, chosen.refresh[0], tiles.size)[..., None]
    if bool(due.any()):
        places, read = _best_places(chosen, tiles, mask)
        listed = choice[..., : places.shape[2]]
        listed.copy_(torch.where(due, places.to(listed.dtype), listed))
        facts = torch.stack([torch.full_like(read, x) for x in (begin, tiles.count)] + [read], -1)
        chosen_at.copy_(torch.where(due, facts.to(chosen_at.dtype), chosen_at))
    then, read = chosen_at[..., 1:2], chosen_at[..., 2:]
    total = read + tiles.count - then
    slot = torch.arange(int(total.max()), device=choice.device)
    places = torch.where(slot < read, choice[..., : len(slot)], then + slot - read)
    return places.clamp(max=tiles.count - 1).long(), slot < total


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


def _seen(
    tiles: Tiles, places: Tensor, counts: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """Which tokens of the tiles at `places`, of those that `counts` names, are there and visible,
    [B, h, count * size]; None where all are."""
    lengths = tiles.starts.diff()
    every = counts is None or bool(counts.all())
    if mask is None and every and bool((lengths == tiles.size).all()):
        return None
    slot = torch.arange(tiles.size, device=places.device)
    there = slot < lengths[places][..., None]
    if counts is not None:
        there = there & counts[..., None]
    if mask is not None:
        positions = (tiles.starts[places][..., None] + slot).clamp(max=mask.shape[1] - 1)
        rows = (mask != 0)[:, None].expand(-1, places.shape[1], -1)
        there = there & rows.gather(2, positions.flatten(2)).view_as(there)
    return there.flatten(2)
