"""A derivative as a few constants: the best ones, found by dynamic programming.

Few-Bit Backward (https://arxiv.org/abs/2202.00441) stores in which piece a value lies; given the
number of pieces, borders and levels are those of the least mean square difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pieces:
    """`levels[i]` above `borders[i - 1]`, up to and with `borders[i]`.

    `error` is the root mean square of what it is off by, relative to that of the function.
    """

    borders: tuple[float, ...]
    levels: tuple[float, ...]
    error: float = 0.0

    @property
    def bits(self) -> int:
        """The bits of a piece's number."""
        return max(1, math.ceil(math.log2(len(self.levels))))


def fit(function: Callable[[Array], Array], points: Array, weights: Array, count: int) -> Pieces:
    """The best `count` pieces for a function on ascending `points`, which count as `weights`.

    Borders lie midway between points. O(count * points^2).
    """
    values = function(points)
    sums = [np.concatenate([[0.0], np.cumsum(weights * values**p)]) for p in (0, 1, 2)]
    zeroth, first, second = (s[None, :] - s[:, None] for s in sums)
    n = len(points)
    later = np.arange(n + 1)[:, None] < np.arange(n + 1)[None, :]
    mean = np.divide(first, zeroth, out=np.zeros_like(first), where=later & (zeroth > 0))
    # row a, column b: what the points from a to b - 1 are off from their mean
    off = np.where(later, np.maximum(second - mean * first, 0.0), np.inf)
    least = np.where(np.arange(n + 1) == 0, 0.0, np.inf)
    chosen: list[NDArray[np.intp]] = []
    for _ in range(min(count, n)):
        total = least[:, None] + off
        chosen.append(total.argmin(0))
        least = total.min(0)
    ends = [n]
    for starts in reversed(chosen):
        ends.append(int(starts[ends[-1]]))
    edges = ends[::-1]
    levels = tuple(float(mean[a, b]) for a, b in pairwise(edges))
    borders = tuple(float(points[e - 1] + points[e]) / 2 for e in edges[1:-1])
    return Pieces(borders, levels, float(np.sqrt(least[n] / second[0, n])))
