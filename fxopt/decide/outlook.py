"""Where a choice stands in its program: what is left of each row, what more of a row would buy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.units import format_value
from .peaks import row_of
from .prices import prices
from .problem import Problem, total, value
from .search import BYTE_ROWS, GAP, Choice, Rows, Search, Trial
from .solve import solve


@dataclass(frozen=True)
class Standing:
    """A choice in the program that it was chosen in.

    `problem` predicts of `choice` what was predicted when it was chosen, whatever was corrected
    since, and has no cuts. `main` is the row that is minimised, and `prices` what one more unit
    of each row would take off it; empty when they are not known. `refined`: the choice was made by
    errors measured about another, `problem` has those of sites alone.
    """

    search: Search
    choice: Choice
    problem: Problem
    main: str
    prices: Mapping[str, float]
    refined: bool = False

    def rows(self, choice: Sequence[int]) -> dict[str, float]:
        """The rows with a limit, the main one and the error, as predicted of `choice`."""
        return {
            name: max(
                total(self.problem, choice, row) + constant
                for row, constant in self.search.constant(name).items()
            )
            for name in dict.fromkeys((*self.search.limits.rows, self.main, "error"))
        }

    def left(self) -> dict[str, float]:
        """What the choice leaves of each row of the program."""
        return {
            row.name: row.limit - row.constant - total(self.problem, self.choice, row.name)
            for row in self.problem.rows
        }


def standing(search: Search, taken: Trial) -> Standing:
    """The program as it was when `taken` was chosen, with what was learnt of single sites since."""
    now = search.predict(taken.choice).get("error", 0.0)
    then = taken.predicted.get("error", 0.0)
    scale = search.correction.get("error", 1.0) * (then / now if now > 0 and then > 0 else 1.0)
    seconds = {n: taken.correction.get(n, 1.0) for n in search.correction if n != "error"}
    search = replace(search, correction={**seconds, "error": scale})
    problem = search.problem()
    # a choice that is handed out though it was predicted to miss a row is compared with itself
    rows = tuple(
        replace(row, limit=max(row.limit, row.constant + total(problem, taken.choice, row.name)))
        for row in problem.rows
    )
    problem = replace(problem, rows=rows, cuts=())
    main = next(iter(search.limits.objective))
    return Standing(
        search, taken.choice, problem, main, prices(problem, main), refined=taken.refined
    )


def loosened(stand: Standing, row: str, factor: float, *, time_limit: float) -> Rows | None:
    """Every row as predicted of the best choice when `row` may be `factor` times its limit.

    That of the choice itself where it is proved that nothing is better; None when that was not
    found out in time.
    """
    rows = tuple(
        replace(r, limit=r.limit * factor) if row_of(r.name) == row else r
        for r in stand.problem.rows
    )
    problem = replace(stand.problem, rows=rows)
    found = solve(problem, time_limit=time_limit, gap=GAP)
    if found is None:
        return None
    if found.value < value(problem, stand.choice):
        return stand.rows(found.choice)
    return stand.rows(stand.choice) if found.gap <= GAP else None


def nearest_note(problem: Problem) -> str:
    """What is said of a plan that keeps not every row, with the rows that no choice could keep."""
    said = list(floors(problem).values())
    return "; ".join(["no choice was found that keeps every row: this is the nearest", *said])


def floors(problem: Problem) -> dict[str, str]:
    """By row of bytes that no choice could keep: how far down it goes."""
    found: dict[str, float] = {}
    for row in problem.rows:
        name = row_of(row.name)
        alone = replace(problem, rows=(), cuts=(), objective={row.name: 1.0})
        if name in BYTE_ROWS and (least := solve(alone)) and least.value + row.constant > row.limit:
            found[name] = max(least.value + row.constant, found.get(name, 0.0))
    return {n: f"{n} goes no lower than {format_value(v, 'bytes')}" for n, v in found.items()}
