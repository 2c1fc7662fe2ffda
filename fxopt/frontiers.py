"""The whole trade of one model: the plans that no other beats in latency, memory and error."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .compiler import Compiler
from .decide.search import Choice, Limits, Search, identity
from .decide.solve import solve
from .hosted import Optimized
from .ir.budget import Budget
from .ir.errors import FxoptError
from .ir.plan import Plan
from .ir.store import write_text
from .measure import Measurer
from .session import Session
from .show import frontier as show
from .state import evaluated

MEMORY_STEPS, ERROR_STEPS = 6, 8
LEAST_ERROR = 1e-4
"""Levels of memory and of error at which the fastest plan is solved for; the least error, as a
share of the largest, below which plans are not told apart."""
MOST_ERROR = 1.0
"""In the unit of the quality row: beyond it nothing is left of the model."""
MEASURED = 5
"""Plans whose error is measured, as wholes, to correct that of all."""
SOLVE_SECONDS = 2.0


@dataclass(frozen=True)
class Point:
    """One plan: `latency` in seconds of the workload's calls, `memory` in bytes of weights and KV
    cache, `error` in the unit of the quality row, all predicted; `measured` is the error of the
    realised plan on the choose part, where it was one of those that were measured."""

    latency: float
    memory: float
    error: float
    measured: float | None
    choice: Choice


class Frontier:
    """What `fxopt.frontier` returns: `points`, fastest first; the first of least error is the
    model as it is. More plans come from it without scoring anything again."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._table = compiler.table()
        self._baseline = Measurer(compiler).baseline
        self.quality = Measurer(compiler).quality_row
        self.points = self._solved()

    def plan(self, budget: Budget) -> Plan:
        """The plan for a budget, as `fxopt.plan` makes it; quality in the frontier's own row."""
        with evaluated(self._compiler.request.model):
            return self._session(budget).plan()

    def optimize(self, budget: Budget) -> Optimized:
        """The module for a budget, measured to keep it, as `fxopt.optimize` makes it."""
        with evaluated(self._compiler.request.model):
            return self._session(budget).optimize()

    def to_svg(self, path: str | Path) -> Path:
        """Draw the points: error against latency, memory by size and colour."""
        return write_text(Path(path), show.svg(self.points, self.quality))

    def __str__(self) -> str:
        return show.text(self.points, self.quality)

    def _session(self, budget: Budget) -> Session:
        if budget.quality not in (None, self.quality):
            raise FxoptError(
                f"Budget.{budget.quality}: this frontier was scored in {self.quality}; make one "
                f"with fxopt.frontier(..., quality={budget.quality!r})"
            )
        return Session(self._compiler.under(budget), self._table)

    def _solved(self) -> tuple[Point, ...]:
        choices = {identity(self._table): None, **dict.fromkeys(self._choices())}
        measured = self._measured(list(choices))
        found = [self._point(choice, measured) for choice in choices]
        best = [p for p in found if not any(_beats(other, p) for other in found)]
        return tuple(sorted(best, key=lambda p: (p.latency, p.memory, p.error)))

    def _choices(self) -> Iterator[Choice]:
        """The fastest choice at each level of memory and error."""
        end = self._compiler.request.deadline
        most = {"error": self._compiler.quality.additive(MOST_ERROR)}
        free = self._solve(most, "latency")
        small = self._solve(most, "memory")
        none = identity(self._table)
        yield from (c for c in (free, small) if c is not None)
        if free is None or small is None:
            return
        sizes = [self._amount(choice, "memory") for choice in (small, none)]
        worst = max(self._amount(choice, "error") for choice in (free, small))
        errors = [worst * LEAST_ERROR ** (i / (ERROR_STEPS - 1)) for i in range(ERROR_STEPS)]
        for step in range(MEMORY_STEPS):
            memory = sizes[0] + (sizes[1] - sizes[0]) * (step / (MEMORY_STEPS - 1)) ** 2
            for error in errors:
                if time.monotonic() > end:
                    return
                found = self._solve({"memory": memory, "error": error}, "latency")
                if found is not None:
                    yield found

    def _solve(self, rows: dict[str, float], minimize: str) -> Choice | None:
        scale = {name: max(self._amount(identity(self._table), name), 1e-12)
                 for name in ("latency", "memory")}  # fmt: skip
        other = "memory" if minimize == "latency" else "latency"
        objective = {minimize: 1 / scale[minimize], other: 1e-3 / scale[other]}
        # memory is never free to grow: options that only save bytes stay in play
        rows = {"memory": 2 * scale["memory"] + 1, **rows}
        search = Search(self._table, Limits(rows, {}, objective))
        found = solve(search.problem(), time_limit=SOLVE_SECONDS, gap=1e-3)
        return None if found is None else found.choice

    def _amount(self, choice: Choice, row: str) -> float:
        columns = [c[o] for c, o in zip(self._table.columns, choice, strict=True)]
        kept = [c[0] for c in self._table.columns]
        amounts = (self._table.amounts(c, k) for c, k in zip(columns, kept, strict=True))
        return sum(amount[row] for amount in amounts)

    def _measured(self, choices: Sequence[Choice]) -> dict[Choice, float]:
        """The additive errors of some choices between the extremes, realised."""
        errors = {choice: self._amount(choice, "error") for choice in choices}
        ranked = sorted((c for c in choices if errors[c] > 0), key=errors.__getitem__)
        picked = ranked[:: max(1, math.ceil(len(ranked) / MEASURED))]
        measurer = Measurer(self._compiler)
        measured: dict[Choice, float] = {}
        for choice in self._compiler.request.progress.track("measuring", picked):
            columns = [c[o] for c, o in zip(self._table.columns, choice, strict=True)]
            editor = self._compiler.realise([p for c in columns for p in c.proposals])
            measured[choice] = measurer.error(editor)
        return {choice: error for choice, error in measured.items() if 0 < error < math.inf}

    def _error(self, choice: Choice, measured: Mapping[Choice, float]) -> float:
        """The additive error of a choice: its sites' sum, corrected by what choices of about that
        error measured."""
        alone = self._amount(choice, "error")
        if alone <= 0 or not measured:
            return alone
        known = sorted(
            (math.log(self._amount(c, "error")), math.log(e)) for c, e in measured.items()
        )
        sums, errors = np.array(known).T
        return alone * math.exp(np.interp(math.log(alone), sums, errors - sums))

    def _point(self, choice: Choice, measured: Mapping[Choice, float]) -> Point:
        none, quality = identity(self._table), self._compiler.quality
        base, found = self._baseline, measured.get(choice)
        return Point(
            base["latency"] + self._amount(choice, "latency") - self._amount(none, "latency"),
            base["weights"] + base["kv_cache_now"] + self._amount(choice, "memory")
            - self._amount(none, "memory"),
            quality.measured(self._error(choice, measured)),
            None if found is None else quality.measured(found),
            choice,
        )  # fmt: skip


def _beats(other: Point, point: Point) -> bool:
    """Whether `other` is as good in all three and better in one by more than rounding."""
    pairs = list(zip(_rows(other), _rows(point), strict=True))
    return all(a <= b * 1.0001 for a, b in pairs) and any(a < b * 0.999 for a, b in pairs)


def _rows(point: Point) -> tuple[float, float, float]:
    return point.latency, point.memory, point.error
