"""What the benchmarks of linear layers share: shapes, times out of memory, and errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
"""in x out."""
ROWS = (1, 16, 256, 4096)
CACHE = 240 << 20
"""Bytes of weights that calls go through before one is used again."""

Weight = tuple[Any, ...]
Call = Callable[..., Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def copies(weight: Weight) -> list[Weight]:
    """`weight` and copies of it, more bytes than the cache holds."""
    size = sum(t.numel() * t.itemsize for t in weight)
    count = max(2, math.ceil(CACHE / size))
    return [weight, *(tuple(t.clone() for t in weight) for _ in range(count - 1))]


def milliseconds(call: Call, x: Tensor, weights: list[Weight]) -> float:
    """One call, in a CUDA graph of at least twenty (six, if they are long)."""
    rounds = math.ceil((20 if len(x) < 1024 else 6) / len(weights))
    order = weights * rounds
    call(x, *weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in order:
            call(x, *weight)
    times = [_replay(graph) for _ in range(12)][2:]
    return statistics.median(times) / len(order)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def error(out: Tensor, x: Tensor, weight: Tensor) -> float:
    """Distance to float64, in units of what a dense bf16 layer of this weight makes."""
    exact, rounded = F.linear(x.double(), weight), weight.to(x.dtype)
    own = F.linear(x, rounded).double() - F.linear(x.double(), rounded.double())
    return ((out.double() - exact).norm() / own.norm()).item()


def bf16(shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...]) -> dict[Any, float]:
    times: dict[Any, float] = {}
    for k, n in shapes:
        weights = copies((random(n, k),))
        for count in rows:
            times[k, n, count] = milliseconds(F.linear, random(count, k), weights)
    return times
