"""One more choice where sites make each other worse: by errors measured about the best choice.

Sites are measured with all others kept. Where they interact, what a site costs among the others is
another number, and the program trades the wrong ones. So single sites are changed in the best
choice, to the next option that errs more and the next that errs less, and the program is solved
again among those. Such differences hold near the choice alone: of the sites that it would change
half are tried too, then a quarter (a trust region; Conn, Gould & Toint, 2000).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .problem import Group, Option, Problem, Row, undominated
from .search import GAP, NEAR, Choice, Rows, Search, Trial
from .solve import solve

SOLVE_SECONDS = 2.0
RADII = 3
"""Choices that are measured as wholes."""
LEAST = 1e-6
"""In nats, or of a squared relative error: below it there is nothing to gain but rounding."""
At = tuple[int, int]
"""(group, option): one option of one decision."""
Watch = Callable[[Sequence[At]], Iterable[At]]


@dataclass(frozen=True)
class Refined:
    """What was done: additive errors of the best choice `before`, what those of its sites add up
    to `alone`, and that of a better one `after` it, if any was found; how many of all `near`
    choices were `measured`."""

    alone: float
    before: float
    after: float | None
    measured: int
    near: int


def refine(
    search: Search,
    error: Callable[[Choice], float],
    measure: Callable[[Choice], Rows],
    *,
    deadline: float,
    watch: Watch = iter,
) -> Refined | None:
    """Choose again by errors measured about the best trial.

    `error` is the additive error of a choice on the same sequences each time, `measure` has all
    rows of it. What is found becomes a trial like others: the best is never worse than before.
    None where errors add up to about the whole's or decide nothing, or no time is left.
    """
    best = search.best
    if best is None or not interacts(search, best) or time.monotonic() > deadline:
        return None
    near = neighbours(search, best.choice)
    added = _added(best.choice, near, error, deadline, watch)
    _choose(search, best, added, measure, deadline)
    alone, after = search.alone(best.choice), search.best
    better = None if after is None or after is best else after.measured["error"]
    return Refined(alone, best.measured["error"], better, len(added), len(near))


def interacts(search: Search, trial: Trial) -> bool:
    """Whether errors decide about `trial`, and its sites make each other worse: its own is well
    beyond what theirs add up to. Less than that is seldom more than the rounding that each site
    was measured with, and no site's in particular."""
    limits, whole = search.limits, trial.measured["error"]
    limit = limits.rows.get("error", math.inf)
    largest = max(whole, trial.predicted["error"])
    decides = next(iter(limits.objective)) == "error" or largest * NEAR > limit
    # where other rows are exceeded, errors are not what to look at
    if not decides or limits.excess({**trial.measured, "error": 0.0}) > 0:
        return False
    alone = search.alone(trial.choice)
    return LEAST < whole < math.inf and whole > NEAR * alone > 0


def neighbours(search: Search, choice: Choice) -> list[At]:
    """The next option of each decision that errs more than that of `choice`, and the next that
    errs less, those of the largest errors first.

    Of options that others beat in the rows that count there are none, nor of decisions beside
    which something else is rewritten that excludes them.
    """
    problem = search.problem()
    rows = [*(row.name for row in problem.rows), next(iter(problem.objective)), "error"]
    excluded = {
        g
        for members in problem.exclusive
        for g in members
        if any(choice[other] for other in members if other != g)
    }
    found: list[tuple[float, At]] = []
    for g, group in enumerate(problem.groups):
        allowed = [o for o in range(len(group.options)) if (g, o) not in problem.forbidden]
        best = {allowed[i] for i in undominated([group.options[o] for o in allowed], rows)}
        errors = {o: group.options[o].amount("error") for o in best | {choice[g]}}
        ladder = sorted(errors, key=lambda o, e=errors: (e[o], o))
        at = ladder.index(choice[g])
        near = [] if g in excluded else [*ladder[max(at - 1, 0) : at], *ladder[at + 1 : at + 2]]
        found += [(errors[choice[g]], (g, other)) for other in near]
    return [at for _, at in sorted(found, key=lambda pair: -pair[0])]


def _added(
    choice: Choice,
    near: Sequence[At],
    error: Callable[[Choice], float],
    deadline: float,
    watch: Watch,
) -> dict[At, float]:
    """What each change of `choice` by one option adds to its error, as far as time goes."""
    before, added = error(choice), dict[At, float]()
    for g, o in watch(near):
        if time.monotonic() > deadline:
            break
        change = error((*choice[:g], o, *choice[g + 1 :])) - before
        if math.isfinite(change):
            added[g, o] = change
    return added


def _choose(
    search: Search,
    best: Trial,
    added: Mapping[At, float],
    measure: Callable[[Choice], Rows],
    deadline: float,
) -> None:
    """Measure what the program about `best` takes, of all changes, half as many, a quarter, as long
    as that is predicted to be better; the first however late it is."""
    most = len(added)
    for radius in range(RADII):
        found = solve(nearby(search, best, added, most), time_limit=SOLVE_SECONDS, gap=GAP)
        if found is None or (radius and time.monotonic() > deadline):
            return
        changes = [at for at in enumerate(found.choice) if at in added]
        predicted = best.measured["error"] + sum(added[at] for at in changes)
        if not _better(search, found.choice, predicted):
            return
        search.tell(found.choice, measure(found.choice), predicted)
        most = len(changes) // 2


def _better(search: Search, choice: Choice, error: float) -> bool:
    """Whether `choice` is predicted to be better than the best by more than the gap, with this
    error."""
    best = search.best
    if best is None or best.excess > 0:
        return True
    return search.worth({**search.predict(choice), "error": error}) < best.value * (1 - GAP)


def nearby(search: Search, best: Trial, added: Mapping[At, float], most: int) -> Problem:
    """The program of at most `most` changes of `best`, each of which adds to its error what was
    measured. Where that error is beyond its limit, it is minimised."""
    problem, groups = search.problem(), list[Group]()
    for g, (group, mine) in enumerate(zip(problem.groups, best.choice, strict=True)):
        options = (
            Option(
                option.label,
                {**option.amounts, "error": added.get((g, o), 0.0), "moves": float(o != mine)},
            )
            for o, option in enumerate(group.options)
        )
        groups.append(Group(group.key, tuple(options)))
    known = {*added, *enumerate(best.choice)}
    every = ((g, o) for g, group in enumerate(groups) for o in range(len(group.options)))
    rows = [
        replace(row, constant=best.measured["error"]) if row.name == "error" else row
        for row in problem.rows
        if row.name != "error" or best.excess <= 0
    ]
    return replace(
        problem,
        groups=tuple(groups),
        rows=(*rows, Row("moves", float(most))),
        objective=problem.objective if best.excess <= 0 else {"error": 1.0},
        forbidden=frozenset(at for at in every if at not in known),
    )
