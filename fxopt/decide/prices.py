"""Shadow prices: what one more unit of each row's limit would take off the objective."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import vstack

from .exact import columns_of, constraints, line_of, scale_of
from .peaks import row_of
from .problem import Problem

SECONDS = 5.0


def prices(problem: Problem, main: str) -> dict[str, float]:
    """By row, the fall of `main` for one unit more of the row's limit; 0 where it does not bind.

    They are the marginals of the program without its integers, so they hold for small changes and
    where sites can be traded one for another. Empty when that program has no solution.
    """
    index = columns_of(problem)
    width = len(index) + len(problem.pairs)
    if not problem.groups:
        return {row_of(row.name): 0.0 for row in problem.rows}
    cost = line_of(problem, index, main, width)
    scale = float(np.abs(cost).max()) or 1.0
    upper = np.ones(width)
    upper[[index[pair] for pair in problem.forbidden]] = 0.0
    found = linprog(
        cost / scale,
        bounds=np.column_stack([np.zeros(width), upper]),
        method="highs",
        options={"time_limit": SECONDS},
        **_matrices(problem, index, width),
    )
    if found.x is None or found.status != 0:
        return {}
    # the rows of the budget are the first that have an upper bound alone
    sums: dict[str, float] = {}
    for row, marginal in zip(problem.rows, found.ineqlin.marginals, strict=False):
        unit = scale_of(row, line_of(problem, index, row.name, width))
        name = row_of(row.name)
        sums[name] = sums.get(name, 0.0) + max(-float(marginal), 0.0) * scale / unit
    return sums


def _matrices(problem: Problem, index: dict[tuple[int, int], int], width: int) -> dict[str, Any]:
    """The constraints as linprog takes them: A_ub x <= b_ub and A_eq x = b_eq."""
    (every,) = constraints(problem, index, width, relax=False)
    matrix: Any = every.A
    low, high = np.asarray(every.lb), np.asarray(every.ub)
    equal = low == high
    above, below = np.isfinite(high) & ~equal, np.isfinite(low) & ~equal
    return {
        "A_eq": matrix[equal],
        "b_eq": high[equal],
        "A_ub": vstack([matrix[above], -matrix[below]]),
        "b_ub": np.concatenate([high[above], -low[below]]),
    }
