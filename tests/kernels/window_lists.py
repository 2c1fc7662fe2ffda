"""Lists of the tiles that a window sees, made by hand: what kernels are given in tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxopt.kernels.attention.blocks import TileLists


def lists_of_window(
    queries: int, keys: int, window: Sequence[int], sink_tokens: Sequence[int], causal: bool,
    query_tile: int, key_tile: int, device: torch.device | str = "cpu",
) -> TileLists:  # fmt: skip
    """What a window and sink tokens see, one entry a KV head, 0 for all keys; time and memory
    follow the tiles on the lists."""
    partial: list[list[list[int]]] = []
    full: list[list[list[int]]] = []
    for reach, sink in zip(window, sink_tokens, strict=True):
        tiles = list(_window_tiles(queries, keys, reach, sink, causal, query_tile, key_tile))
        partial.append([line for line, _ in tiles])
        full.append([line for _, line in tiles])
    return TileLists(*_pack(partial, device), *_pack(full, device), query_tile, key_tile)


def _window_tiles(
    queries: int, keys: int, window: int, sink: int, causal: bool, query_tile: int, key_tile: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Partial and full key tiles of each query tile."""
    for start in range(0, queries, query_tile):
        first = start + keys - queries
        last = min(start + query_tile, queries) - 1 + keys - queries
        # Keys that some row sees, and those that every row sees.
        begin, end = 0, last + 1 if causal else keys
        all_begin, all_end = 0, first + 1 if causal else keys
        if window:
            begin, end = max(begin, first - window + 1), min(end, last + window)
            all_begin, all_end = max(all_begin, last - window + 1), min(all_end, first + window)
        near = range(begin // key_tile, -(-end // key_tile))
        full = range(-(-all_begin // key_tile), all_end // key_tile)
        sinks = range(-(-min(sink, last + 1 if causal else keys) // key_tile) if window else 0)
        yield sorted({*near, *sinks}.difference(full)), list(full)


def _pack(lines: list[list[list[int]]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Counts and lines [1, Hm, tiles(, max)]."""
    most = max((len(line) for head in lines for line in head), default=0)
    counts = [[len(line) for line in head] for head in lines]
    filled = [[line + [0] * (most + 1 - len(line)) for line in head] for head in lines]
    return (
        torch.tensor([counts], dtype=torch.int32, device=device),
        torch.tensor([filled], dtype=torch.int32, device=device),
    )
