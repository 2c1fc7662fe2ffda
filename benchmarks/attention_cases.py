"""What the benchmarks of attention share: inputs, lists of tiles, the library's time, medians."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxopt.kernels.attention.blocks import TileLists, lists_from_map

HEADS, KV_HEADS, DIM = 32, 8, 128
SINK, WINDOW = 64, 4096
TOPK_LENGTHS, SHARES = (16384, 32768, 65536, 131072), (50, 100, 200)
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
Report = Callable[..., None]


def reporting(out: Path | None, run: Callable[[Report], None]) -> None:
    """Let `run` report: each line is printed as JSON, and written to `out` in the end."""
    lines: list[dict[str, Any]] = []

    def report(**line: Any) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)

    report(device=torch.cuda.get_device_name(), torch=torch.__version__)
    run(report)
    if out is not None:
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def qkv(
    length: int, dim: int = DIM, batch: int = 1, heads: int = HEADS, kv: int = KV_HEADS,
    keys: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As a model makes them: [B, N, H, D] in memory."""
    sizes = ((length, heads), (keys or length, kv), (keys or length, kv))
    q, k, v = (
        torch.randn(batch, n, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n, h in sizes
    )
    return q, k, v


def random_lists(queries: int, keys: int, heads: int, density: float, key_tile: int) -> TileLists:
    """The diagonal, and as many other tiles as make up the density."""
    rows = torch.arange(-(-queries // 128), device="cuda")[:, None] * 128 + keys - queries
    columns = torch.arange(-(-keys // key_tile), device="cuda")[None] * key_tile
    diagonal = (columns < rows + 128) & (columns + key_tile > rows)
    # Half of a diagonal tile's pairs are seen.
    area = 128 * 64 * len(rows) / (queries * (keys - queries / 2))
    chance = max(0.0, density - area) / (1 - area)
    visited = torch.rand(1, heads, *diagonal.shape, device="cuda") < chance
    return lists_from_map(visited | diagonal, queries, keys, True, 128, key_tile)


def kept_pairs(lists: TileLists) -> float:
    """Part of the causal pairs of a square of whole tiles that the lists keep."""
    tile, tiles = 128 * lists.key_tile, lists.full.shape[2]
    # A query tile has 128 / key_tile partial tiles on its diagonal, seen by half together.
    pairs = float(lists.full_count.sum()) / lists.num_heads * tile + tiles * 128 * 64.5
    return pairs / (128 * tiles * (128 * tiles + 1) / 2)


@cache
def backend_seconds(length: int, backend: str) -> float:
    q, k, v = qkv(length)

    def run() -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return seconds(run)


def baseline(length: int) -> float:
    return min(backend_seconds(length, name) for name in BACKENDS)


def baselines(length: int) -> dict[str, float]:
    return {f"{name}_ms": ms(backend_seconds(length, name)) for name in BACKENDS}


def ratio(length: int, ours: float) -> float:
    return round(baseline(length) / ours, 2)


def seconds(run: Callable[[], Any], most: float = 0.3) -> float:
    """Median; as many runs as `most` seconds hold, three at least."""
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    start = time.monotonic()
    while len(times) < 3 or (time.monotonic() - start < most and len(times) < 100):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]) / 1e3)
    return statistics.median(times)


def ms(value: float) -> float:
    return round(value * 1e3, 4)


def tflops(length: int, value: float) -> int:
    return round(2e-12 * HEADS * DIM * length * length / value)
