"""A program as HiGHS takes it: a column an option, a line a row; solved to a stated gap."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from .peaks import row_of
from .problem import ROUNDING, Problem, Row, Solution, value, violation

INFEASIBLE = 2
"""The status of `scipy.optimize.milp`."""
_STDOUT = threading.Lock()


class Infeasible(Exception):
    """It is proved that no choice holds."""


def exact(
    problem: Problem, time_limit: float, gap: float, *, relax: bool = False
) -> Solution | None:
    """The best choice found in `time_limit` seconds, at most `gap` from optimal if there was time;
    None when none was found; `Infeasible` when it is proved that there is none.

    `relax`: the choice of least common excess over the rows instead, feasible or not.
    """
    alike = classes(problem)
    whole, problem = problem, _first_of(problem, alike)
    index = columns_of(problem)
    width = len(index) + len(problem.pairs) + relax
    cost = np.zeros(width)
    for row, weight in problem.objective.items():
        cost += weight * line_of(problem, index, row, width)
    cost /= np.abs(cost).max() or 1.0
    upper = np.array([*(len(alike[g]) for g, _ in index), *[1] * (width - len(index))], float)
    upper[[index[pair] for pair in problem.forbidden]] = 0
    if relax:
        # the common excess is worth more than all rows together, and those more than any objective
        rows = [r for r in problem.rows if r.limit > 0]
        shares = sum((line_of(problem, index, r.name, width) / r.limit for r in rows), 0 * cost)
        shares /= np.abs(shares).max() or 1.0
        cost = (5e-4 * shares + 1e-6 * cost) / max(len(whole.groups), 1)
        cost[-1], upper[-1] = 1.0, np.inf
    with _silent():
        result = milp(
            cost,
            integrality=np.concatenate([np.ones(len(index)), np.zeros(width - len(index))]),
            bounds=Bounds(np.zeros(width), upper),  # pyright: ignore[reportArgumentType]
            constraints=constraints(problem, index, width, relax=relax, sizes=[*map(len, alike)]),
            options={"time_limit": time_limit, "mip_rel_gap": gap},
        )
    if result.status == INFEASIBLE:
        raise Infeasible
    if result.x is None:
        return None
    choice = [0] * len(whole.groups)
    for g, members in enumerate(alike):
        options = range(len(problem.groups[g].options))
        counts = [round(float(result.x[index[g, o]])) for o in options]
        taken = [o for o in options for _ in range(counts[o])]
        for member, o in zip(members, taken, strict=False):
            choice[member] = o
    if not relax and violation(whole, choice) > 1e-6:
        return None
    gap = float(result.mip_gap or 0.0)
    return Solution(tuple(choice), value(whole, choice), gap, "milp")


def classes(problem: Problem) -> list[list[int]]:
    """Groups that no row, pair or cut tells apart, in order: the program counts how many of them
    take each option, since their permutations are one choice that branching would try again and
    again."""
    apart = {g for pair in problem.pairs for g, _ in (pair.first, pair.second)}
    apart |= {g for groups in problem.exclusive for g in groups}
    apart |= set(range(len(problem.groups))) if problem.cuts else set()
    forbidden: dict[int, set[int]] = {}
    for g, o in problem.forbidden:
        forbidden.setdefault(g, set()).add(o)
    found: dict[object, list[int]] = {}
    for g, group in enumerate(problem.groups):
        amounts = tuple(tuple(sorted(option.amounts.items())) for option in group.options)
        own = g if g in apart else (amounts, frozenset(forbidden.get(g, ())))
        found.setdefault(own, []).append(g)
    return list(found.values())


def _first_of(problem: Problem, alike: Sequence[Sequence[int]]) -> Problem:
    """The program of the first group of each class."""
    if len(alike) == len(problem.groups):
        return problem
    place = {members[0]: i for i, members in enumerate(alike)}

    def moved(pair: tuple[int, int]) -> tuple[int, int]:
        return place[pair[0]], pair[1]

    return replace(
        problem,
        groups=tuple(problem.groups[members[0]] for members in alike),
        pairs=tuple(replace(p, first=moved(p.first), second=moved(p.second))
                    for p in problem.pairs),
        forbidden=frozenset(moved(pair) for pair in problem.forbidden if pair[0] in place),
        exclusive=tuple(tuple(place[g] for g in groups) for groups in problem.exclusive),
    )  # fmt: skip


def columns_of(problem: Problem) -> dict[tuple[int, int], int]:
    """The column of each (group, option); those of pairs come behind."""
    pairs = ((g, o) for g, group in enumerate(problem.groups) for o in range(len(group.options)))
    return {pair: column for column, pair in enumerate(pairs)}


def line_of(
    problem: Problem, index: Mapping[tuple[int, int], int], row: str, width: int
) -> np.ndarray:
    """What each of `width` columns adds to `row`."""
    return _line(_by_name(problem, index), len(index), row, width)


def _by_name(problem: Problem, index: Mapping[tuple[int, int], int]) -> dict[str, dict[int, float]]:
    """What each column adds, by the names of amounts."""
    found: dict[str, dict[int, float]] = {}
    for (g, o), column in index.items():
        for name, amount in problem.groups[g].options[o].amounts.items():
            found.setdefault(name, {})[column] = amount
    for p, pair in enumerate(problem.pairs):
        for name, amount in pair.amounts.items():
            found.setdefault(name, {})[len(index) + p] = amount
    return found


def _line(
    by_name: Mapping[str, Mapping[int, float]], options: int, row: str, width: int
) -> np.ndarray:
    """The coefficients of a row; what an option adds to the whole row it adds at every point."""
    line = np.zeros(width)
    for name in dict.fromkeys((row_of(row), row)):
        for column, amount in by_name.get(name, {}).items():
            if name == row or column < options:
                line[column] = amount
    return line


def constraints(
    problem: Problem,
    index: Mapping[tuple[int, int], int],
    width: int,
    *,
    relax: bool,
    sizes: Sequence[int] | None = None,
) -> list[LinearConstraint]:
    """One-hot groups, budget rows scaled to 1, products of pairs, cuts.

    Group g stands for `sizes[g]` equal ones; None: each for itself. `relax`: the last column z
    lets every row reach limit * z, z >= 0.
    """
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    low: list[float] = []
    high: list[float] = []

    def add(line: Mapping[int, float], lower: float, upper: float) -> None:
        for column, amount in line.items():
            rows.append(len(low))
            columns.append(column)
            values.append(amount)
        low.append(lower)
        high.append(upper)

    for g, group in enumerate(problem.groups):
        count = sizes[g] if sizes else 1
        add({index[g, o]: 1.0 for o in range(len(group.options))}, count, count)
    by_name = _by_name(problem, index)
    for row in problem.rows:
        line = _line(by_name, len(index), row.name, width)
        scale = scale_of(row, line)
        if relax:
            line[-1] = -row.limit
        limit = (0.0 if relax else row.limit) - row.constant
        add({int(c): line[c] / scale for c in np.flatnonzero(line)}, -np.inf, limit / scale)
    for p, pair in enumerate(problem.pairs):
        x, y, both = index[pair.first], index[pair.second], len(index) + p
        add({both: 1, x: -1, y: -1}, -1, np.inf)
        add({both: 1, x: -1}, -np.inf, 0)
        add({both: 1, y: -1}, -np.inf, 0)
    for groups in problem.exclusive:
        kept = {index[g, 0]: 1.0 for g in groups}
        add(kept, len(groups) - 1, np.inf)
    for cut in problem.cuts:
        add({index[g, o]: 1.0 for g, o in enumerate(cut)}, -np.inf, len(cut) - 1)
    matrix = coo_matrix((values, (rows, columns)), shape=(len(low), width)).tocsr()
    bounds: Any = np.array([low, high])
    return [LinearConstraint(matrix, *bounds)]


def scale_of(row: Row, line: np.ndarray) -> float:
    """What a row is divided by in the program."""
    return float(max(abs(row.limit - row.constant), np.abs(line).max(), ROUNDING))


@contextmanager
def _silent() -> Generator[None]:
    """HiGHS prints a line of its own debugging past every option: send it nowhere.

    The descriptor is the process's, so one solve at a time.
    """
    with _STDOUT:
        sys.stdout.flush()
        try:
            kept = os.dup(1)
        except OSError:  # closed: nothing is printed anyway
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)
            os.close(nowhere)
