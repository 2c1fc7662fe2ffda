"""The tokens of an image or a video in an order in which a window is whole tiles.

The grid is cut into bands about as high as a tile is wide, and walked band by band, each the other
way (Hassani et al., Faster Neighborhood Attention, 2024, permutes tokens tile by tile, which pads
sizes that a tile does not divide). So TILE tokens that follow each other are a box of about equal
sides, whatever the sizes are, and the window around a tile is a short list of tiles.
Whole tiles are seen: all tokens of a tile see the same keys, at least those of their own windows.
That is generalized neighborhood attention whose stride is the tile (arXiv 2504.16922); the kernel
has no element to hide then, and what more is seen costs nothing more.

A grid is (prefix, *sizes): tokens that come before it, a class token say, and tokens an axis, the
last of which varies fastest. Tables are made once a grid, on the host, in numpy: a trace that asks
for them gets constants.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE = 64
"""Tokens of a tile: 8 x 8 or 4 x 4 x 4 of them."""

Grid = tuple[int, ...]


def tokens(grid: Grid) -> int:
    """Tokens of the sequence, the prefix included."""
    return grid[0] + math.prod(grid[1:])


@functools.cache
def order(grid: Grid) -> NDArray[np.int64]:
    """The token that stands at each place [N]; those of the prefix last, so that tiles and bands
    begin together."""
    prefix, *sizes = grid
    places = _coordinates(sizes)
    edge, strip = round(TILE ** (1 / len(sizes))), np.zeros(places.shape[1], np.int64)
    for size, place in zip(sizes[:-1], places, strict=False):
        bands = max(1, round(size / edge))
        strip = _walked(strip, place * bands // size, bands)
    along = _walked(strip, places[-1], sizes[-1])
    return np.append(prefix + np.lexsort([*places[:-1], along]), np.arange(prefix))


def _walked(line: NDArray[np.int64], place: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Steps of a walk along lines of `count` places, every other one backwards."""
    return line * count + np.where(line % 2, count - 1 - place, place)


@functools.cache
def seen_tiles(grid: Grid, near: int) -> NDArray[np.bool_]:
    """Whether tiles see each other, [tiles, tiles]: they do where some token of the box around one
    is nearer than `near`, along each axis, to the box around the other. Tiles with tokens of the
    prefix see, and are seen by, all."""
    prefix, *sizes = grid
    places = _coordinates(sizes)[:, order(grid)[: math.prod(sizes)] - prefix]
    count = -(-tokens(grid) // TILE)
    # The last place stands for the prefix and for the end of the last tile.
    filled = np.pad(places, [(0, 0), (0, count * TILE - places.shape[1])], mode="edge")
    boxes = filled.reshape(len(sizes), count, TILE)
    first, last = boxes.min(2), boxes.max(2)
    seen = np.ones((count, count), bool)
    for low, high in zip(first, last, strict=True):
        apart = low[None, :] - high[:, None]
        seen &= np.maximum(apart, apart.T) < near
    whole = (np.arange(count) + 1) * TILE > places.shape[1]
    whole &= prefix > 0
    return seen | whole[:, None] | whole[None, :]


def seen_by_heads(grid: Grid, near: Sequence[int]) -> NDArray[np.bool_]:
    """`seen_tiles` of heads, [heads, tiles, tiles]; all where `near` is 0."""
    count = -(-tokens(grid) // TILE)
    whole = np.ones((count, count), bool)
    return np.stack([seen_tiles(grid, n) if n else whole for n in near])


def hides(grid: Grid, near: int) -> bool:
    """Whether some tile is not seen by another."""
    return bool(grid) and near > 0 and not seen_tiles(grid, near).all()


def density(grid: Grid, near: int) -> float:
    """Part of the pairs of tiles that is computed; 1 for `near` 0."""
    return float(seen_tiles(grid, near).mean()) if near else 1.0


def spans(grid: Grid, near: int, number: int) -> list[tuple[int, int]]:
    """The places that a tile of queries sees, as ranges."""
    steps = np.diff(seen_tiles(grid, near)[number].astype(np.int8), prepend=0, append=0)
    begins, ends = (np.flatnonzero(steps == sign) * TILE for sign in (1, -1))
    return [(int(b), min(int(e), tokens(grid))) for b, e in zip(begins, ends, strict=True)]


@functools.cache
def places(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """`order` on a device, and its inverse: the place of each token. Kept, so that a captured CUDA
    graph copies nothing, and as what a backward may save, whoever asks first."""
    with torch.inference_mode(False):
        there = torch.from_numpy(order(grid))
        return there.to(device), there.argsort().to(device)


def near_keys(
    length: int, grid: Grid, near: Sequence[int], device: torch.device, rows: Tensor | None = None
) -> Tensor:
    """Which of the tokens see each other, in the order of the sequence: [1, KV, 1, N, N]; with
    `rows` [R], what these see alone: [1, KV, 1, R, N].

    `near` has one entry a KV head, 0 where a head sees all keys; so do all heads where `length`
    is not that of the grid. Traceable for any length.
    """
    tile = torch.tensor((np.argsort(order(grid)) // TILE).tolist(), device=device)
    at = tile.index_select(0, torch.arange(length, device=device).clamp(max=tokens(grid) - 1))
    table = torch.tensor(seen_by_heads(grid, near).tolist(), device=device)
    by = at if rows is None else at.index_select(0, rows)
    seen = table.index_select(1, by).index_select(2, at)
    other = torch.full((1,), length, device=device) != tokens(grid)
    return (seen | other)[None, :, None]


def _coordinates(sizes: Sequence[int]) -> NDArray[np.int32]:
    """Of each token of the grid, [axes, N]."""
    return np.indices(sizes, np.int32).reshape(len(sizes), -1)
