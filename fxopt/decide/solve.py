"""The choice: one option a group under linear rows, as a mixed-integer program.

The exact program goes to HiGHS; a greedy Lagrangian walk stands beside it, and the better of
the two is returned, so that a time limit never leaves the caller empty-handed.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from .peaks import row_of

ROUNDING = 1e-9
INFEASIBLE = 2
"""The status of `scipy.optimize.milp`."""


@dataclass(frozen=True)
class Option:
    """One column of the program: what choosing it adds to each row.

    An amount named `row` counts in every `row@point`, unless there is one of that name too.
    """

    label: str
    amounts: Mapping[str, float]

    def amount(self, row: str) -> float:
        """What the option adds to `row`."""
        found = self.amounts.get(row)
        return self.amounts.get(row_of(row), 0.0) if found is None else found


@dataclass(frozen=True)
class Group:
    """A decision: exactly one of `options` is taken."""

    key: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Row:
    """sum of amounts + constant <= limit."""

    name: str
    limit: float
    constant: float = 0.0


@dataclass(frozen=True)
class Pair:
    """What two options add to the rows when both are chosen, beyond their sum.

    `first` and `second` are (group, option) indices.
    """

    first: tuple[int, int]
    second: tuple[int, int]
    amounts: Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """Minimise the weighted sum of row amounts `objective` under `rows`.

    `cuts` are full choices that were tried and must not come back; `forbidden` are single
    (group, option) pairs, locked out or known to serve nothing. Of each set of groups in
    `exclusive` at most one takes another option than its first, which is never forbidden there.
    """

    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    objective: Mapping[str, float]
    pairs: tuple[Pair, ...] = ()
    cuts: tuple[tuple[int, ...], ...] = ()
    forbidden: frozenset[tuple[int, int]] = frozenset()
    exclusive: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Solution:
    """`choice[g]` is the option of group g; `gap` bounds how far from optimal it can be."""

    choice: tuple[int, ...]
    value: float
    gap: float
    method: str


class _Infeasible(Exception):
    """It is proved that no choice holds."""


def total(problem: Problem, choice: Sequence[int], row: str) -> float:
    """The amount that `choice` adds to `row`, pairs included, constants not."""
    amount = sum(
        group.options[o].amount(row) for group, o in zip(problem.groups, choice, strict=True)
    )
    for pair in problem.pairs:
        if choice[pair.first[0]] == pair.first[1] and choice[pair.second[0]] == pair.second[1]:
            amount += pair.amounts.get(row, 0.0)
    return amount


def totals(problem: Problem, choice: Sequence[int]) -> Callable[[str], float]:
    """`total` for many rows of one choice, each option looked at once."""
    sums: dict[str, float] = {}
    for group, o in zip(problem.groups, choice, strict=True):
        for name, amount in group.options[o].amounts.items():
            sums[name] = sums.get(name, 0.0) + amount

    def of(row: str) -> float:
        whole = row_of(row)
        if problem.pairs or (whole != row and whole in sums):
            return total(problem, choice, row)
        return sums.get(row, 0.0)

    return of


def value(problem: Problem, choice: Sequence[int]) -> float:
    """The objective of `choice`."""
    return sum(w * total(problem, choice, row) for row, w in problem.objective.items())


def violation(problem: Problem, choice: Sequence[int]) -> float:
    """The largest relative excess over any row; 0 or less when all hold."""
    worst = 0.0
    amounts = totals(problem, choice)
    for row in problem.rows:
        amount = amounts(row.name) + row.constant
        scale = max(abs(row.limit), ROUNDING)
        worst = max(worst, (amount - row.limit) / scale)
    if tuple(choice) in problem.cuts or problem.forbidden & set(enumerate(choice)):
        return float("inf")
    if any(sum(choice[g] > 0 for g in groups) > 1 for groups in problem.exclusive):
        return float("inf")
    return worst


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
        exact = _milp(problem, time_limit, gap)
    except _Infeasible:
        return None
    if not walk or (exact is not None and exact.gap <= gap):
        return exact
    found = [s for s in (exact, greedy(problem)) if s is not None]
    return min(found, key=lambda s: s.value, default=None)


def nearest(problem: Problem, *, time_limit: float = 10.0) -> tuple[int, ...]:
    """The choice whose largest amount / limit over the rows is smallest; cuts are respected.

    What is returned when the rows cannot all hold. Among equals, the other rows that cannot are as
    small as they can be, and those that can do hold; within that the objective decides.
    """
    relaxed = None
    with suppress(_Infeasible):
        relaxed = _milp(problem, time_limit / 2, 1e-6, relax=True) if problem.groups else None
    if relaxed is None:
        return tuple(0 for _ in problem.groups)
    # the excess takes all of the program's precision: what is left to gain is another program's
    reached = (r.constant + total(problem, relaxed.choice, r.name) for r in problem.rows)
    rows = tuple(
        replace(row, limit=max(row.limit, amount + ROUNDING * abs(amount)))
        for row, amount in zip(problem.rows, reached, strict=True)
    )
    held = None
    with suppress(_Infeasible):
        held = _milp(replace(problem, rows=rows), time_limit / 2, 1e-6)
    return relaxed.choice if held is None or held.value > relaxed.value else held.choice


def weighed(minimized: str, scale: Mapping[str, float]) -> dict[str, float]:
    """Weights of one main row, and of another that breaks ties; `scale` is one over what latency
    and memory are, so that shares are weighed."""
    match minimized:
        case "error":
            return {"error": 1.0, "latency": 1e-9 * scale["latency"]}
        case "latency":
            return {"latency": scale["latency"], "memory": 1e-3 * scale["memory"]}
        case _:
            return {"memory": scale["memory"], "latency": 1e-3 * scale["latency"]}


def undominated(options: Sequence[Option], rows: Iterable[str]) -> list[int]:
    """Indices of options that no other beats or equals in every row (first of equals stays)."""
    rows = list(rows)
    table = np.array([[o.amount(r) for r in rows] for o in options])
    keep: list[int] = []
    for i, mine in enumerate(table):
        others = np.delete(table, i, axis=0)
        beaten = (others <= mine).all(1) & (others < mine).any(1)
        twin = any((table[j] == mine).all() for j in keep)
        if not beaten.any() and not twin:
            keep.append(i)
    return keep


def _milp(
    problem: Problem, time_limit: float, gap: float, *, relax: bool = False
) -> Solution | None:
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
        raise _Infeasible
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


_STDOUT = threading.Lock()


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


def columns_of(problem: Problem) -> dict[tuple[int, int], int]:
    pairs = ((g, o) for g, group in enumerate(problem.groups) for o in range(len(group.options)))
    return {pair: column for column, pair in enumerate(pairs)}


def line_of(
    problem: Problem, index: Mapping[tuple[int, int], int], row: str, width: int
) -> np.ndarray:
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


def greedy(problem: Problem) -> Solution | None:
    """Walk from the most feasible choice: best multiplier-weighted option a group, then the
    single changes that lower the objective and keep every row."""
    best: tuple[int, ...] | None = None
    for weight in [0.0, *np.geomspace(1e-6, 1e6, 49)]:
        choice = _apart(
            problem,
            tuple(
                min(
                    (o for o in range(len(group.options)) if (g, o) not in problem.forbidden),
                    key=lambda o, options=group.options: _priced(problem, options[o], weight),
                )
                for g, group in enumerate(problem.groups)
            ),
            weight,
        )
        if violation(problem, choice) <= 0 and (
            best is None or value(problem, choice) < value(problem, best)
        ):
            best = choice
    if best is None:
        return None
    best = _descend(problem, best)
    return Solution(best, value(problem, best), float("inf"), "greedy")


def _apart(problem: Problem, choice: tuple[int, ...], weight: float) -> tuple[int, ...]:
    """`choice` with the first option in all groups of an exclusive set but the one that gains
    most."""
    made = list(choice)

    def gain(g: int) -> float:
        options = problem.groups[g].options
        kept, taken = (_priced(problem, options[o], weight) for o in (0, made[g]))
        return kept - taken

    for groups in problem.exclusive:
        best = max(groups, key=gain)
        for g in groups:
            made[g] = made[g] if g == best else 0
    return tuple(made)


def _priced(problem: Problem, option: Option, weight: float) -> float:
    objective = sum(w * option.amount(r) for r, w in problem.objective.items())
    price = sum(
        option.amount(row.name) / max(abs(row.limit - row.constant), ROUNDING)
        for row in problem.rows
    )
    return objective + weight * price


def _descend(problem: Problem, choice: tuple[int, ...]) -> tuple[int, ...]:
    """Single changes that lower the objective and keep every row, while there are any."""
    rows = [*problem.objective, *(row.name for row in problem.rows)]
    weights = np.array([*problem.objective.values(), *[0.0] * len(problem.rows)])
    limits = np.array([*[np.inf] * len(problem.objective),
                       *(row.limit - row.constant for row in problem.rows)])  # fmt: skip
    tables = [np.array([[o.amount(r) for r in rows] for o in g.options]) for g in problem.groups]
    paired = {g for pair in problem.pairs for g, _ in (pair.first, pair.second)}
    sums = np.array([total(problem, choice, row) for row in rows])
    improved = True
    while improved:
        improved = False
        for g, table in enumerate(tables):
            for o in range(len(table)):
                trial = (*choice[:g], o, *choice[g + 1 :])
                if g in paired:
                    then = np.array([total(problem, trial, row) for row in rows])
                else:
                    then = sums + table[o] - table[choice[g]]
                better = (then - sums) @ weights < -ROUNDING
                if better and (then <= limits).all() and violation(problem, trial) <= 0:
                    choice, sums, improved = trial, then, True
    return choice
