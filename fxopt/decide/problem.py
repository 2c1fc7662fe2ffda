"""The choice as a program: one option a group, under linear rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .peaks import row_of

ROUNDING = 1e-9
"""What sums of amounts may be off by."""


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
