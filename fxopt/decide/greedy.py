"""A walk that always has something to return: what exact search falls back on out of time."""

from __future__ import annotations

import numpy as np

from .problem import ROUNDING, Option, Problem, Solution, total, value, violation


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
