"""The loop of solve, measure, correct: from a priced table to a choice that was measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from ..ir.errors import excess
from .peaks import PEAK_ROWS, Points, row_at
from .problem import Group, Problem, Row, total, undominated
from .solve import nearest, solve
from .table import Column, Swapped, Table

Choice = tuple[int, ...]
Rows = Mapping[str, float]

GAP = 1e-3
"""Relative gap at which a choice counts as optimal: below what costs are measured to."""

FAINT, NEAR, KAPPA = 1e-2, 1.25, 2.0
"""The share of the limit below which an error tells nothing of larger ones; the factor by which
ratios of measured to predicted errors differ among plans of about one error, and how many standard
deviations of them are allowed for."""

BYTE_ROWS = ("weights", "kv_cache", "memory", "activations")
NOISE, SCALE_DOUBT, LEAST_SCALE = 0.02, 0.3, 0.1
"""What whole calls are measured to; how far sums of sites are expected to be off, and at most."""
A_SITE = 4
"""Options of one site that are measured at most: priors, corrected by them, tell of the others."""
FASTER = 1.02
"""A rewrite that serves no byte row must be measured at least this much faster."""


@dataclass(frozen=True)
class Limits:
    """The budget in the solver's terms: `rows` by name (error in its additive form), the part
    of each that no option changes, and what to minimise. `points` are the temporaries that the
    rows of peaks count beside their constants, at each point of the program."""

    rows: Mapping[str, float]
    constants: Mapping[str, float]
    objective: Mapping[str, float]
    points: Points = field(default_factory=dict)

    def excess(self, measured: Rows) -> float:
        """The smallest number that every measured row / limit - 1 stays under."""
        return max((excess(measured[n], limit) for n, limit in self.rows.items()), default=0.0)

    def constant(self, name: str) -> dict[str, float]:
        """The solver's rows of one row of the budget, and the constant of each."""
        constant = self.constants.get(name, 0.0)
        if name not in PEAK_ROWS or not self.points:
            return {name: constant}
        return {row_at(name, p): constant + alive for p, alive in self.points.items()}


@dataclass(frozen=True)
class Trial:
    """A choice with what was predicted and measured of it, and the corrections until then;
    `refined` if it was chosen by errors measured about another."""

    choice: Choice
    predicted: Rows
    measured: Rows
    excess: float
    value: float
    correction: Mapping[str, float] = field(default_factory=dict)
    refined: bool = False


@dataclass
class Search:
    """Proposes choices, is told what they measured, remembers the best.

    `correction` scales a row's predictions to what was measured of whole choices: an error as a
    whole (`ratios` of what was measured to the sums of sites), seconds in what a choice adds to
    the model that keeps every site (`moves`: predicted and measured, by row).
    """

    table: Table
    limits: Limits
    correction: dict[str, float] = field(default_factory=dict)
    moves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    stopped: bool = False
    ratios: list[float] = field(default_factory=list[float])
    solver_seconds: float = 40.0

    def __post_init__(self) -> None:
        for name in self.limits.rows:
            if name.startswith("latency"):
                self.correction.setdefault(name, self._prior_scale(name))

    def _prior_scale(self, name: str) -> float:
        """Of seconds before any trial: sites that take longer one at a time than the whole model
        does were timed too long, and with them what a choice would save."""
        kept = self._kept(name)
        constant = self.limits.constants.get(name, 0.0)
        return 1 + constant / kept if constant < 0 < kept + constant else 1.0

    def problem(self) -> Problem:
        """The program with today's corrections."""
        rows = tuple(
            Row(row, limit, constant)
            for name, limit in self.limits.rows.items()
            for row, constant in self.constant(name).items()
        )
        groups = self.table.groups(self.correction)
        forbidden = self._forbidden(groups)
        return Problem(
            groups,
            rows,
            self.limits.objective,
            cuts=tuple(trial.choice for trial in self.trials),
            forbidden=forbidden | self._dominated(groups, forbidden),
            exclusive=self.table.exclusive,
        )

    def _dominated(
        self, groups: Sequence[Group], forbidden: frozenset[tuple[int, int]]
    ) -> frozenset[tuple[int, int]]:
        """Options that another, not `forbidden`, beats or equals in every row that counts: most
        of them."""
        expanded = (row for name in self.limits.rows for row in self.limits.constant(name))
        rows = sorted({*expanded, *self.limits.objective})
        # where a choice excludes another, the other must be able to keep its site
        bound = {g for members in self.table.exclusive for g in members}
        pairs: set[tuple[int, int]] = set()
        for g, group in enumerate(groups):
            allowed = [o for o in range(len(group.options)) if (g, o) not in forbidden]
            best = {allowed[i] for i in undominated([group.options[o] for o in allowed], rows)}
            pairs |= {(g, o) for o in allowed if o not in best and (o or g not in bound)}
        return frozenset(pairs)

    def _forbidden(self, groups: Sequence[Group]) -> frozenset[tuple[int, int]]:
        """Options that are neither faster nor smaller in a byte row that counts, or whose error
        is no number. What errs must be so in a row that counts: seconds that only break ties are
        no reason to."""
        # the first of the objective is what is minimised, the others break ties
        counting = {*self.limits.rows, *[*self.limits.objective][:1]}
        timed = any(name.startswith("latency") for name in counting)
        rows = [
            expanded
            for name in sorted(counting & set(BYTE_ROWS))
            for expanded in self.limits.constant(name)
        ]
        pairs: set[tuple[int, int]] = set()
        for g, group in enumerate(groups):
            kept, columns = group.options[0], self.table.columns[g]
            for o, option in enumerate(group.options[1:], 1):
                smaller = any(option.amount(row) < kept.amount(row) for row in rows)
                serves = timed or columns[o].exact
                useless = not smaller and not (serves and _faster(columns[o], columns[0]))
                if useless or not math.isfinite(columns[o].error):
                    pairs.add((g, o))
        return frozenset(pairs)

    def next(self) -> Choice | None:
        """The best choice not tried yet that is predicted to hold; None when there is none."""
        with self._timed() as limit:
            found = solve(self.problem(), time_limit=limit, gap=GAP)
        return None if found is None else found.choice

    def nearest(self) -> Choice | None:
        """The untried choice predicted to come nearest to the rows."""
        with self._timed() as limit:
            choice = nearest(self.problem(), time_limit=limit)
        return None if any(t.choice == choice for t in self.trials) else choice

    def safest(self) -> Choice | None:
        """The untried choice predicted to err least that holds in the other rows."""
        with self._timed() as limit:
            problem = replace(self.problem(), objective={"error": 1.0})
            found = solve(problem, time_limit=limit, gap=GAP)
        return None if found is None else found.choice

    def leanest(self) -> Choice | None:
        """The untried choice predicted to err least of those that are as small as can be in the
        rows that no choice holds."""
        problem = self.problem()
        rows = [
            replace(row, limit=max(row.limit, _least(problem, row) * (1 + 1e-9)))
            for row in problem.rows
            if row.name != "error"
        ]
        with self._timed() as limit:
            lean = replace(problem, rows=tuple(rows), objective={"error": 1.0})
            found = solve(lean, time_limit=limit, gap=GAP)
        return None if found is None else found.choice

    @contextmanager
    def _timed(self) -> Generator[float]:
        """Seconds for one solve: a part of what is left, so that many hard programs in a row
        cost no more than a few."""
        began = time.monotonic()
        yield max(self.solver_seconds / 4, 0.5)
        self.solver_seconds -= time.monotonic() - began

    def predict(self, choice: Choice, *further: str) -> dict[str, float]:
        """Every row of `choice`, and `further` ones, as predicted, in the solver's form."""
        added = self._added(choice)
        names = {*self.limits.rows, *self.limits.objective, "error", *further}
        rows = {
            name: max(added(row) + constant for row, constant in self.constant(name).items())
            for name in sorted(names)
        }
        for name in rows.keys() - self.limits.rows.keys():
            # said, but not decided by: what is only minimised is weighed by priced sites alone
            if name.startswith("latency") and name not in self.correction:
                kept = self.limits.constants.get(name, 0.0) + self._kept(name)
                rows[name] = kept + self._prior_scale(name) * (rows[name] - kept)
        return rows

    def _added(self, choice: Choice) -> Callable[[str], float]:
        """What `choice` adds to a row of the program, with today's corrections."""
        groups = self.table.taken(self.correction, choice)
        return partial(total, Problem(groups, (), {}), [0] * len(groups))

    def constant(self, name: str) -> dict[str, float]:
        """The constants of a row; what scales seconds leaves the kept model's as they are."""
        scale = self.correction.get(name, 1.0)
        if not name.startswith("latency") or scale == 1.0:
            return self.limits.constant(name)
        return {name: self.limits.constants.get(name, 0.0) + (1 - scale) * self._kept(name)}

    def _kept(self, name: str) -> float:
        """What the sites add to a row, all of them kept."""
        return sum(self.table.amounts(c[0], c[0]).get(name, 0.0) for c in self.table.columns)

    def alone(self, choice: Choice) -> float:
        """What the errors of the sites of `choice`, each as known alone, add up to."""
        pairs = zip(self.table.columns, choice, strict=True)
        return sum(self.table.amounts(columns[o], columns[0])["error"] for columns, o in pairs)

    def worth(self, rows: Rows) -> float:
        """What is minimised."""
        return sum(weight * rows[name] for name, weight in self.limits.objective.items())

    def tell(self, choice: Choice, measured: Rows, error: float | None = None) -> Trial:
        """Record what `choice` measured; later predictions are corrected by it. `error` is what
        was predicted of it otherwise than by errors of sites alone."""
        predicted = self.predict(choice)
        value = self.worth({**predicted, **measured})
        value = value if math.isfinite(value) else math.inf
        excess, then = self.limits.excess(measured), dict(self.correction)
        said = predicted if error is None else {**predicted, "error": error}
        trial = Trial(choice, said, measured, excess, value, then, refined=error is not None)
        self.trials.append(trial)
        self.correct(choice, predicted, measured)
        return trial

    def _widest(self, choice: Choice, row: str) -> str:
        """The point of the program at which the peak of `choice` is expected."""
        added = self._added(choice)
        return max(self.limits.points, key=lambda p: added(row_at(row, p)) + self.limits.points[p])

    def correct(self, choice: Choice, predicted: Rows, measured: Rows) -> None:
        """Scale the error row by `robust` ratios of measured to predicted, within a factor of 10
        at a time, but not by what errs too little to tell, and seconds by the line through the
        kept model and all trials; move the point of the program where the peak was expected by
        what it measured more or less."""
        for name in measured:
            if name.startswith("latency") and name in predicted:
                self._scale_seconds(name, predicted[name], measured[name])
        peak = next((n for n in PEAK_ROWS if n in measured and n in self.limits.rows), None)
        if peak is not None and self.limits.points:
            widest = self._widest(choice, peak)
            alive = self.limits.points[widest] + measured[peak] - predicted[peak]
            self.limits = replace(self.limits, points={**self.limits.points, widest: alive})
        least = FAINT * self.limits.rows.get("error", 0.0)
        if all(rows.get("error", 0.0) > least for rows in (predicted, measured)):
            ratio = measured["error"] / predicted["error"]
            before = self.correction.get("error", 1.0)
            self.ratios.append(before * min(max(ratio, 0.1), 10.0))
            self.correction["error"] = robust(self.ratios)

    def _scale_seconds(self, name: str, predicted: float, measured: float) -> None:
        kept = self.limits.constants.get(name, 0.0) + self._kept(name)
        if not (math.isfinite(measured) and kept > 0):
            return
        expected = (predicted - kept) / self.correction.get(name, 1.0)
        self.moves.setdefault(name, []).append((expected, measured - kept))
        self.correction[name] = slope(self.moves[name], NOISE * kept, self._prior_scale(name))

    def forget(self, trial: Trial) -> None:
        """Let the choice of `trial` be measured anew, and what errors were compared with."""
        self.trials.remove(trial)
        self.ratios.clear()

    def tighten(self, trial: Trial, row: str, factor: float) -> None:
        """What was measured of `trial` elsewhere was `factor` times worse in `row`: ask that much
        more of every choice, and take this one for failed."""
        rows = {n: v / factor if n == row else v for n, v in self.limits.rows.items()}
        self.limits = replace(self.limits, rows=rows)
        self.trials = [
            replace(t, excess=max(self.limits.excess(t.measured), 1e-6 if t is trial else t.excess))
            for t in self.trials
        ]

    def ranked(self) -> list[Trial]:
        """The trials, nearest to the budget first."""
        return sorted(self.trials, key=lambda t: t.excess)

    @property
    def best(self) -> Trial | None:
        """The feasible trial of least objective, else the one nearest to the budget."""
        feasible = [t for t in self.trials if t.excess <= 0]
        if feasible:
            return min(feasible, key=lambda t: t.value)
        return min(self.trials, key=lambda t: t.excess, default=None)

    def columns(self, choice: Choice) -> list[Column]:
        """The columns that a choice takes."""
        return [c[o] for c, o in zip(self.table.columns, choice, strict=True)]


def slope(moves: Sequence[tuple[float, float]], noise: float, expected: float = 1.0) -> float:
    """Measured over predicted changes, the most probable where each was measured to `noise` and
    `expected` +- `SCALE_DOUBT` was expected: changes within the noise say nothing."""
    both = sum(x * y for x, y in moves) / noise**2 + expected / SCALE_DOUBT**2
    return max(both / (sum(x * x for x, _ in moves) / noise**2 + 1 / SCALE_DOUBT**2), LEAST_SCALE)


def robust(ratios: Sequence[float]) -> float:
    """Mean and `KAPPA` standard deviations of the last ratio and of those about as large: where a
    limit binds, the solver finds the choices whose errors are underestimated most."""
    near = [r for r in ratios if 1 / NEAR < r / ratios[-1] < NEAR]
    return statistics.fmean(near) + (KAPPA * statistics.stdev(near) if len(near) > 1 else 0.0)


def _least(problem: Problem, row: Row) -> float:
    smallest = (min(option.amount(row.name) for option in g.options) for g in problem.groups)
    return row.constant + sum(smallest)


def _faster(column: Column, kept: Column) -> bool:
    return column.cost.seconds * FASTER <= kept.cost.seconds


def measure_swaps(
    search: Search,
    measure: Callable[[Column], Swapped],
    *,
    deadline: float,
    limit: int = 96,
    rounds: int = 10,
    expect: Callable[[Sequence[Column]], None] = lambda _: None,
) -> int:
    """Measure, one site at a time, the options that the solver takes, and let it think again.

    Those with the largest predicted error first, of each site at most `A_SITE`; returns how many
    were measured. `expect` is told which come next.
    """
    done = 0
    for _ in range(rounds):
        choice = search.next() or search.nearest()
        if choice is None:
            return done
        waiting = [
            (g, o)
            for g, o in enumerate(choice)
            if o
            and search.table.columns[g][o].measured is None
            and sum(column.swapped for column in search.table.columns[g]) < A_SITE
        ]
        waiting.sort(key=lambda at: -search.table.columns[at[0]][at[1]].prior)
        if not waiting:
            return done
        expect([search.table.columns[g][o] for g, o in waiting[: limit - done]])
        for g, o in waiting:
            if done >= limit or time.monotonic() > deadline:
                search.table.learn()
                return done
            column = search.table.columns[g][o]
            error, within = measure(column)
            search.table.columns[g][o] = replace(
                column, measured=error, within=within, swapped=True
            )
            done += 1
        search.table.learn()
    return done


def improve(
    search: Search,
    measure: Callable[[Choice], Rows],
    *,
    deadline: float,
    rounds: int = 8,
) -> Trial | None:
    """Solve, measure the whole choice, correct, again: until the first that holds is not bettered.

    When nothing holds for half of the rounds, the choice that errs least is tried, since those
    that are best at the limit can miss it by a little each time. Where none is predicted to hold,
    rounds go to the choices nearest to the budget, the first to the leanest: errors add up to less
    than predicted more often than bytes do.
    """
    lean = False
    for round_ in range(rounds):
        if time.monotonic() > deadline and search.trials:
            search.stopped = True
            break
        best = search.best
        held = best is not None and best.excess <= 0
        choice = search.next() if held or round_ != rounds // 2 else search.safest()
        if choice is None and held:
            break
        if choice is None and not lean:
            choice, lean = search.leanest(), True
        choice = choice if choice is not None else search.nearest()
        if choice is None:
            break
        worth = search.worth(search.predict(choice))
        if held and best is not None and worth >= best.value * (1 - GAP):
            break
        search.tell(choice, measure(choice))
    return search.best


def identity(table: Table) -> Choice:
    """The choice that keeps every site."""
    return tuple(0 for _ in table.columns)
