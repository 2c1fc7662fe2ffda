"""What a looser budget would buy: the program solved again with one row given more."""

from __future__ import annotations

from dataclasses import replace

from .peaks import row_of
from .search import Choice, Rows, Search
from .solve import solve, value


def loosened(
    search: Search, taken: Choice, row: str, factor: float, *, time_limit: float
) -> Rows | None:
    """Every row as predicted of the best choice when `row` may be `factor` times its limit.

    That is `taken` itself where the solver finds nothing better; None where it finds nothing.
    """
    problem = search.problem()
    rows = tuple(
        replace(r, limit=r.limit * factor) if row_of(r.name) == row else r for r in problem.rows
    )
    found = solve(replace(problem, rows=rows, cuts=()), time_limit=time_limit)
    if found is None:
        return None
    better = found.value < value(problem, taken)
    return search.predict(found.choice if better else taken)
