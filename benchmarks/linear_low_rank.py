"""Configurations of the low-rank kernels, for `benchmarks/linear.py --sweep low-rank`.

The first product is cut in every way beside a fixed second one, then the second beside the best
first, then the best few of both with each other. About two minutes, most of them compilation.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch.nn.functional as F
import triton
from linear_timing import SHAPES, Weight, bf16, copies, error, milliseconds, random
from torch import Tensor

from fxopt.kernels._triton.few_rows import Configuration as Few
from fxopt.kernels.low_rank_linear import triton as low_rank
from fxopt.kernels.low_rank_linear.triton import Configuration, Cut, Vector

ROWS = (1, 2, 4, 16, 64, 256)
BEST = 4
"""So many cuts of each product are combined."""


def half_rank(k: int, n: int) -> int:
    """The rank at which both factors hold half of the weight's parameters."""
    return round(k * n / (k + n) / 2 / 16) * 16


def firsts(rows: int) -> list[Cut]:
    if rows > 16:
        tiles = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8)]
        return [
            Few(n, k, warps, 4, s, m)
            for (m, n, warps), k, s in itertools.product(tiles, (64, 128), (1, 2, 4, 8))
            if m < 2 * rows and (m + n) * k < 256 * 128
        ]
    few: list[Cut] = [
        *(Few(32, 256, 4, 4, s) for s in (2, 4)),
        Few(16, 256, 4, 5, 2),
        *(Few(16, 256, 4, 5, s) for s in (1, 4)),
        *(Few(16, 512, 4, 4, s) for s in (1, 2)),
        *(Few(32, 128, 4, 6, s) for s in (1, 2, 4)),
        Few(64, 128, 4, 4, 4),
        Few(8, 256, 4, 5),
        Few(8, 512, 4, 4),
    ]
    vectors = [
        *(Vector(n, k, 4, s) for n, k, s in itertools.product((2, 4, 8), (1024, 2048), (1, 2))),
        Vector(1, 4096, 4),
        Vector(2, 4096, 8),
        Vector(4, 512, 2),
    ]
    return few if rows > low_rank.LONGEST else [*vectors, *few[:3]]


def seconds(rows: int) -> list[Cut]:
    if rows > 16:
        tiles = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (64, 256, 8)]
        return [Few(n, 64, warps, 4, 1, m) for m, n, warps in tiles if m < 2 * rows]
    few: list[Cut] = [
        Few(16, 128, 4, 6),
        *(Few(32, 128, 4, stages) for stages in (7, 4)),
        Few(16, 256, 4, 4),
        Few(32, 64, 4, 6),
        *(Few(64, k, 4, 4) for k in (64, 128)),
        Few(128, 64, 8, 4),
    ]
    vectors = [
        *(Vector(n, k) for n, k in itertools.product((4, 8, 16), (512, 1024))),
        Vector(4, 2048),
        Vector(8, 2048, 8),
        Vector(4, 512, 2),
    ]
    return few if rows > low_rank.LONGEST else [*vectors, *few[:3]]


def pairs(first: Cut, second: Cut) -> list[Configuration]:
    """With the sums added by who reads them, by a launch of their own, or without any."""
    both = (False, True) if first.splits > 1 else (False,)
    if getattr(first, "block_m", 0) > 16:  # every tile of columns would read the sums
        both = both[-1:]
    return [Configuration(first, second, added) for added in both]


def call(chosen: Configuration, x: Tensor, *weight: Tensor) -> Tensor:
    return low_rank.low_rank_linear(x, *weight, None, chosen)


def make(k: int, n: int, rank: int) -> Weight:
    return random(rank, k) / math.sqrt(k), random(n, rank)


def build(rows: int, chosen: Configuration) -> tuple[int, Configuration, str]:
    """Fill the compiler's cache in a process of its own; what is wrong with a configuration."""
    try:
        for rank in (1024, 1600):
            weight, x = make(4096, 512, rank), random(rows, 4096)
            seen = error(call(chosen, x, *weight), x, weight[1].double() @ weight[0].double())
            if not seen <= 6:
                return rows, chosen, f"error {seen:.3g}"
        return rows, chosen, ""
    except Exception as problem:
        return rows, chosen, f"{type(problem).__name__}: {str(problem)[:100]}"


def to_build(rows: int) -> list[Configuration]:
    """Each cut once in each kind of company that its kernel is compiled for."""
    by_splits = {first.splits: first for first in reversed(firsts(rows))}
    second = seconds(rows)[0]
    found = [c for first in firsts(rows) for c in pairs(first, second)]
    found += [
        c for first in by_splits.values() for other in seconds(rows) for c in pairs(first, other)
    ]
    return list(dict.fromkeys(found))


def timed(chosen: Configuration, x: Tensor, weights: list[Weight]) -> float:
    """Milliseconds; infinitely many where parts of sums do not fit into shared memory."""
    try:
        return milliseconds(partial(call, chosen), x, weights)
    except triton.runtime.errors.OutOfResources:
        return math.inf


def report(k: int, n: int, rows: int, dense: float, bad: set[Configuration]) -> None:
    """Print the best configurations of one size, but for the `bad` ones."""
    x, weights = random(rows, k), copies(make(k, n, half_rank(k, n)))
    times = dict.fromkeys(bad, math.inf)

    def ranked(some_firsts: Iterable[Cut], some_seconds: Iterable[Cut]) -> list[Configuration]:
        """All that were measured, the fastest first."""
        for one, other in itertools.product(some_firsts, some_seconds):
            for c in pairs(one, other):
                if c not in times:
                    times[c] = timed(c, x, weights)
        return sorted(times, key=times.__getitem__)

    best = ranked(firsts(rows), seconds(rows)[:1])
    best = ranked([best[0].first], seconds(rows))
    kept = (list(dict.fromkeys(cuts))[:BEST] for cuts in zip(*(c[:2] for c in best), strict=True))
    best = ranked(*kept)
    library = milliseconds(lambda x, d, u: F.linear(F.linear(x, d), u), x, weights)
    print(
        f"\n{k} x {n}, {rows} rows, bf16 {1000 * dense:.2f} us, two calls of cuBLAS "
        f"{1000 * library:.2f} us ({dense / library:.2f}x)"
    )
    for c in best[:6]:
        print(f"  {1000 * times[c]:7.2f} us {dense / times[c]:5.2f}x  {c}", flush=True)


def sweep() -> None:
    begin, context = time.perf_counter(), multiprocessing.get_context("spawn")
    work = [(rows, c) for rows in ROWS for c in to_build(rows)]
    with ProcessPoolExecutor(14, mp_context=context) as pool:
        built = list(pool.map(build, *zip(*work, strict=True), chunksize=4))
    bad: set[tuple[int, Configuration]] = set()
    for rows, chosen, problem in built:
        if problem:
            print(json.dumps({"rows": rows, "config": str(chosen), "problem": problem}))
            bad.add((rows, chosen))
    print(f"{len(work)} built in {time.perf_counter() - begin:.0f} s", flush=True)
    baseline = bf16(SHAPES, ROWS)
    for (k, n), rows in itertools.product(SHAPES, ROWS):
        report(k, n, rows, baseline[k, n, rows], {c for at, c in bad if at == rows})
    print(f"{time.perf_counter() - begin:.0f} s")
