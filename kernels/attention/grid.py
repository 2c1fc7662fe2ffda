"""The tokens of an image or a video in an order in which a window is whole tiles.

The grid is cut into bands about as high as a tile is wide, and walked band by band, each the other
way (Hassani et al., Faster Neighborhood Attention, 2024, permutes tokens tile by tile, which pads
sizes that a tile does not divide). So TILE tokens that follow each other are a box of about equal
sides, whatever the sizes are, and the window around a tile is a short list of tiles.
Whole tiles are seen: all tokens of a tile see the same keys, at least those of their own windows.
That is generalized neighborhood attention whose stride is the tile (arXiv 2504.16922); the kernel
has no element to hide then, and what more is seen costs nothing more.

Under a dilation d a place sees those of its own residues modulo d alone (Dilated Neighborhood
Attention Transformer, arXiv 2209.15001); d is one number, or one an axis. The places of one residue
an axis are a class: a smaller grid, in which the window is an ordinary one. So class stands after
class, each walked by itself; the classes of a dilation of 1 are the grid. A tile over the end of a
class is part of both.

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
Dilation = int | tuple[int, ...]
"""Of all axes alike, or one an axis."""


def tokens(grid: Grid) -> int:
    """Tokens of the sequence, the prefix included."""
    return grid[0] + math.prod(grid[1:])


def edge(grid: Grid) -> int:
    """Places along each axis of a tile."""
    return round(TILE ** (1 / (len(grid) - 1)))


@functools.cache
def order(grid: Grid, dilation: Dilation = 1) -> NDArray[np.int64]:
    """The token that stands at each place [N]; those of the prefix last, so that tiles and bands
    begin together."""
    prefix, *_ = grid
    classes, places, sizes = _coordinates(grid, dilation)
    strip = np.zeros_like(classes)
    for size, place in zip(sizes[:-1], places, strict=False):
        bands = np.rint(size / edge(grid)).astype(np.int64).clip(1)
        strip = _walked(strip, place * bands // size, bands)
    along = _walked(strip, places[-1], sizes[-1])
    return np.append(prefix + np.lexsort([*places[:-1], along, classes]), np.arange(prefix))


def _walked(
    line: NDArray[np.int64], place: NDArray[np.int64], count: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Steps of a walk along lines of `count` places, every other one backwards."""
    return line * count + np.where(line % 2, count - 1 - place, place)


@functools.cache
def seen_tiles(grid: Grid, near: int, dilation: Dilation = 1) -> NDArray[np.bool_]:
    """Whether tiles see each other, [tiles, tiles]; all do where `near` is 0.

    They do where they have places of one class, and some place of the box around those of one tile
    is nearer than `near`, along each axis of the class, to the box around those of the other. Tiles
    with tokens of the prefix see, and are seen by, all."""
    prefix, *sizes = grid
    count, in_grid = -(-tokens(grid) // TILE), math.prod(sizes)
    if not near:
        return np.ones((count, count), bool)
    classes, places, _ = (
        x[..., order(grid, dilation)[:in_grid] - prefix] for x in _coordinates(grid, dilation)
    )
    tile = np.arange(in_grid) // TILE
    begins = np.flatnonzero(np.diff(tile, prepend=-1) | np.diff(classes, prepend=-1))
    first, last = (f.reduceat(places, begins, axis=1) for f in (np.minimum, np.maximum))
    close = classes[begins, None] == classes[begins]
    for low, high in zip(first, last, strict=True):
        apart = low[None, :] - high[:, None]
        close &= np.maximum(apart, apart.T) < near
    # From the pieces that ends of classes make of tiles to whole ones.
    pieces = np.flatnonzero(np.diff(tile[begins], prepend=-1))
    close = np.logical_or.reduceat(np.logical_or.reduceat(close, pieces, 0), pieces, 1)
    seen = np.pad(close, (0, count - len(close)))
    whole = (np.arange(count) + 1) * TILE > in_grid
    whole &= prefix > 0
    return seen | whole[:, None] | whole[None, :]


def seen_by_heads(grid: Grid, near: Sequence[int], dilation: Dilation = 1) -> NDArray[np.bool_]:
    """`seen_tiles` of heads, [heads, tiles, tiles]."""
    return np.stack([seen_tiles(grid, n, dilation) for n in near])


def hides(grid: Grid, near: int, dilation: Dilation = 1) -> bool:
    """Whether some tile is not seen by another."""
    return not seen_tiles(grid, near, dilation).all()


def density(grid: Grid, near: int, dilation: Dilation = 1) -> float:
    """Part of the pairs of tiles that is computed."""
    return float(seen_tiles(grid, near, dilation).mean())


def spans(grid: Grid, near: int, dilation: Dilation, number: int) -> list[tuple[int, int]]:
    """The places that a tile of queries sees, as ranges."""
    line = seen_tiles(grid, near, dilation)[number]
    steps = np.diff(line.astype(np.int8), prepend=0, append=0)
    begins, ends = (np.flatnonzero(steps == sign) * TILE for sign in (1, -1))
    return [(int(b), min(int(e), tokens(grid))) for b, e in zip(begins, ends, strict=True)]


@functools.cache
def places(grid: Grid, dilation: Dilation, device: torch.device) -> tuple[Tensor, Tensor]:
    """`order` on a device, and its inverse: the place of each token. Kept, so that a captured CUDA
    graph copies nothing, and as what a backward may save, whoever asks first."""
    with torch.inference_mode(False):
        there = torch.from_numpy(order(grid, dilation))
        return there.to(device), there.argsort().to(device)


def near_keys(
    length: int,
    grid: Grid,
    near: Sequence[int],
    dilation: Sequence[Dilation],
    device: torch.device,
    rows: Tensor | None = None,
) -> Tensor:
    """Which of the tokens see each other, in the order of the sequence: [1, KV, 1, N, N]; with
    `rows` [R], what these see alone: [1, KV, 1, R, N].

    `near` and `dilation` have one entry a KV head, a `near` of 0 where it sees all keys; so do all
    heads where `length` is not that of the grid. Traceable for any length.
    """
    token = torch.arange(length, device=device).clamp(max=tokens(grid) - 1)

    def seen(reach: int, spacing: Dilation) -> Tensor:
        tile = torch.tensor((np.argsort(order(grid, spacing)) // TILE).tolist(), device=device)
        table = torch.tensor(seen_tiles(grid, reach, spacing).tolist(), device=device)
        at = tile.index_select(0, token)
        by = at if rows is None else at.index_select(0, rows)
        return table.index_select(0, by).index_select(1, at)

    heads = list(zip(near, dilation, strict=True))
    kinds = {kind: seen(*kind) for kind in dict.fromkeys(heads)}
    other = torch.full((1,), length, device=device) != tokens(grid)
    return (torch.stack([kinds[kind] for kind in heads]) | other)[None, :, None]


def dilations(values: Sequence[int], num_heads: int, grid: Grid) -> list[Dilation]:
    """The dilation of each KV head from a list with one entry, one a head, or one a head and axis.

    Raises ValueError for other numbers of entries."""
    axes = len(grid) - 1
    if len(values) in (1, num_heads):
        return [*values] * (num_heads // len(values))
    if len(values) != num_heads * axes:
        raise ValueError(
            f"attention: dilation has {len(values)} entries; give 1 or {num_heads}, the KV heads, "
            f"or as many for each axis of grid {list(grid)}"
        )
    lines = (tuple(values[i : i + axes]) for i in range(0, len(values), axes))
    return [line[0] if len({*line}) == 1 else line for line in lines]


def listed(dilation: Sequence[Dilation], grid: Grid) -> tuple[int, ...]:
    """The shortest list from which `dilations` makes these of more than one head."""
    even = tuple(d for d in dilation if isinstance(d, int))
    if len(even) == len(dilation):
        return even
    lines = (np.broadcast_to(np.array(d), len(grid) - 1).tolist() for d in dilation)
    return tuple(d for line in lines for d in line)


def _coordinates(
    grid: Grid, dilation: Dilation
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of each token of the grid: its class [N], its place in that and the sizes of it [axes, N]."""
    sizes = np.array(grid[1:], np.int64)[:, None]
    at = np.indices(grid[1:], np.int64).reshape(len(sizes), -1)
    spacing = np.broadcast_to(np.array(dilation, np.int64), len(sizes))[:, None]
    residues, classes = at % spacing, np.zeros(at.shape[1], np.int64)
    for residue, each in zip(residues, spacing, strict=True):
        classes = classes * each + residue
    return classes, at // spacing, -((residues - sizes) // spacing)
