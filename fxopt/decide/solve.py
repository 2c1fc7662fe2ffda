"""The choice: the exact program goes to HiGHS; a greedy Lagrangian walk stands beside it, and the
better of the two is returned, so that a time limit never leaves the caller empty-handed.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from .exact import Infeasible, exact
from .greedy import greedy
from .problem import ROUNDING, Problem, Solution, total, violation


def solve(
    problem: Problem, *, time_limit: float = 10.0, gap: float = 1e-4, walk: bool = True
) -> Solution | None:
    """The best feasible choice found, or None when the program is proved infeasible or nothing
    was found in time. Deterministic for a given time limit that is not reached. Without `walk`
    the greedy one is left out, which takes long where there are thousands of options."""
    if not problem.groups:
        # nothing to decide, and HiGHS takes no empty program
        empty = Solution((), 0.0, 0.0, "milp")
        return empty if violation(problem, ()) <= 0 else None
    try:
        best = exact(problem, time_limit, gap)
    except Infeasible:
        return None
    if not walk or (best is not None and best.gap <= gap):
        return best
    found = [s for s in (best, greedy(problem)) if s is not None]
    return min(found, key=lambda s: s.value, default=None)


def nearest(problem: Problem, *, time_limit: float = 10.0) -> tuple[int, ...]:
    """The choice whose largest amount / limit over the rows is smallest; cuts are respected.

    What is returned when the rows cannot all hold. Among equals, the other rows that cannot are as
    small as they can be, and those that can do hold; within that the objective decides.
    """
    relaxed = None
    with suppress(Infeasible):
        relaxed = exact(problem, time_limit / 2, 1e-6, relax=True) if problem.groups else None
    if relaxed is None:
        return tuple(0 for _ in problem.groups)
    # the excess takes all of the program's precision: what is left to gain is another program's
    reached = (r.constant + total(problem, relaxed.choice, r.name) for r in problem.rows)
    rows = tuple(
        replace(row, limit=max(row.limit, amount + ROUNDING * abs(amount)))
        for row, amount in zip(problem.rows, reached, strict=True)
    )
    held = None
    with suppress(Infeasible):
        held = exact(replace(problem, rows=rows), time_limit / 2, 1e-6)
    return relaxed.choice if held is None or held.value > relaxed.value else held.choice
