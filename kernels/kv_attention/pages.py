"""Packed blocks by their place in a sequence: side by side, or on the pages that a table names.

    side by side   [B, h, blocks, ...]   block i of row b and head h at [b, h, i]
    paged          [pages, h, 1, ...]    at [table[b, i], h, 0], table int32 [B, blocks]

A page is one block of all heads of a class (PagedAttention, arXiv 2309.06180). Side by side is a
table that needs no look-up: row b has the blocks from b * blocks on. Blocks are packed once and
never changed, so that rows may share pages.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Part = dict[str, Tensor]

HIDDEN = 0
"""The page of every block whose tokens are all padding: what it holds is never seen."""


def room(part: Part) -> int:
    """How many blocks a row may have."""
    return part["block_start"].shape[0] - 1


def sizes(part: Part, name: str) -> tuple[int, int, int]:
    """(batch, heads, blocks) of a tensor of packed blocks."""
    batch, heads = part[name].shape[:2]
    return len(part["table"]) if "table" in part else batch, heads, room(part)


def stored(part: Part, names: Iterable[str], used: int) -> Part:
    """The first `used` blocks [B, h, used, ...] of the tensors that there are of `names`."""
    found = {name: part[name] for name in names if name in part}
    if "table" not in part:
        return {name: x[:, :, :used] for name, x in found.items()}
    pages = part["table"][:, :used].long()
    return {
        name: _plain(x)[pages].squeeze(3).transpose(1, 2).view(x.dtype) for name, x in found.items()
    }


def store(part: Part, name: str, first: int, blocks: Tensor) -> None:
    """Write `blocks` [B, h, count, ...], from the one at place `first` on."""
    places = slice(first, first + blocks.shape[2])
    if "table" not in part:
        part[name][:, :, places] = blocks
    else:
        pages = part["table"][:, places].long()
        _plain(part[name])[pages] = _plain(blocks).transpose(1, 2).unsqueeze(3)


def _plain(x: Tensor) -> Tensor:
    """e4m3 numbers as bytes, which every device copies by index."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def lines(part: Part, name: str, places: Tensor) -> Tensor:
    """Where the blocks at `places` [B, h, count] lie, dimensions 0 to 2 of a tensor counted as
    one."""
    batch, heads, blocks = sizes(part, name)
    row = torch.arange(batch * heads, device=places.device).view(batch, heads, 1)
    if "table" not in part:
        return row * blocks + places
    pages = part["table"].long()[:, None].expand(-1, heads, -1).gather(2, places)
    return pages * heads + row % heads
