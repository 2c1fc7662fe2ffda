"""Which saved tensors to compute again: plans for every peak that can be reached.

Each segment of the forward offers a few plans of its own, which a program over its tensors finds
(least seconds for at most so many bytes kept). A second program takes one plan a segment so that
the peak at every point of the step is below a limit. Every plan found is then laid out and its
peak counted exactly; the plans that no other beats in both peak and seconds form a frontier that
does not depend on the budget. A budget takes the fastest plan below it, so a smaller budget never
brings a higher peak.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import fx

from ..decide.solve import Group, Option, Problem, Row, solve
from .schedule import Schedule, schedule
from .segments import Segments, segmentations
from .step import Step

LEVELS = 6
LIMITS = 10
CHUNKS = 24
REPAIRS = 2
CLOSE = 1.01

Seconds = Mapping[fx.Node, float]


@dataclass(frozen=True)
class StepPlan:
    """Owners to compute again, the most bytes ever alive beside the parameters, and the seconds
    that it adds to a step."""

    dropped: frozenset[fx.Node]
    stops: frozenset[fx.Node]
    peak: int
    seconds: float

    def counted(self, step: Step, seconds: Seconds) -> StepPlan:
        """The same tensors, with their peak and seconds counted."""
        return _plan(step, seconds, self.dropped, self.stops)


def frontier(
    step: Step,
    seconds: Seconds,
    droppable: Collection[fx.Node],
    *,
    deadline: float = float("inf"),
) -> list[StepPlan]:
    """Plans from the fastest to the smallest; each next has a lower peak and takes longer.

    `droppable` are the saved owners that may be computed again, `seconds` what each op takes.
    After `deadline` (of `time.monotonic`) no further way to cut the forward is tried.
    """
    none = _plan(step, seconds, frozenset(), frozenset())
    found = [none]
    for segments in segmentations(step, droppable):
        found += _of_segments(step, seconds, segments)
        if time.monotonic() > deadline:
            break
    best: list[StepPlan] = []
    for plan in sorted(found, key=lambda p: (p.seconds, p.peak)):
        if not best or plan.peak < best[-1].peak:
            best.append(plan)
    return best


def laid_out(step: Step, plan: StepPlan) -> Schedule:
    """The calls of a plan."""
    return schedule(step, plan.dropped, plan.stops)


def _plan(
    step: Step, seconds: Seconds, dropped: frozenset[fx.Node], stops: frozenset[fx.Node]
) -> StepPlan:
    live, added = _effect(step, seconds, dropped, stops)
    return StepPlan(dropped, stops, int(live.max(initial=0)), added)


def _of_segments(step: Step, seconds: Seconds, segments: Segments) -> list[StepPlan]:
    """Plans for limits between the least and the most that these segments can reach."""
    if not segments.parts:
        return []
    stops = segments.stops
    base, _ = _effect(step, seconds, frozenset(), stops)
    known: Known = {}
    choices = [_segment_plans(step, seconds, p.sites, stops, known) for p in segments.parts]
    effects = [[_effect(step, seconds, d, stops) for d in options] for options in choices]
    changes = [[live - base for live, _ in options] for options in effects]
    added = [[cost for _, cost in options] for options in effects]
    points = _points(base, changes)
    groups = tuple(
        Group(str(g), tuple(_option(a, c[points]) for a, c in zip(times, lives, strict=True)))
        for g, (times, lives) in enumerate(zip(added, changes, strict=True))
    )
    deepest = _plan(step, seconds, frozenset().union(*(o[-1] for o in choices)), stops)
    low = _lowest(base, changes)
    found = [deepest]
    for limit in np.geomspace(max(low, 1.0), float(base.max()), LIMITS):
        for _ in range(REPAIRS):
            rows = tuple(
                Row(f"peak@{i}", float(limit), float(base[p])) for i, p in enumerate(points)
            )
            solution = solve(Problem(groups, rows, {"seconds": 1.0}), time_limit=2.0)
            if solution is None:
                break
            dropped = frozenset().union(
                *(options[o] for options, o in zip(choices, solution.choice, strict=True))
            )
            found.append(_plan(step, seconds, dropped, stops))
            if found[-1].peak <= CLOSE * limit:
                break
            # points between those of the program are higher: ask for less
            limit = limit * limit / found[-1].peak
    return found


def _option(seconds: float, change: np.ndarray) -> Option:
    peaks = {f"peak@{i}": float(c) for i, c in enumerate(change)}
    return Option("", {"seconds": seconds, **peaks})


def _lowest(base: np.ndarray, changes: Sequence[Sequence[np.ndarray]]) -> float:
    """A bound on the peak: at each point, every segment at its best."""
    return float((base + sum(np.min(options, axis=0) for options in changes)).max())


def _points(base: np.ndarray, changes: Sequence[Sequence[np.ndarray]]) -> list[int]:
    """Nodes at which the peak may stand: in each stretch, the highest of every single plan."""
    edges = np.linspace(0, len(base), min(CHUNKS, len(base)) + 1).astype(int)
    found: set[int] = set()
    lowest = base + sum(np.min(options, axis=0) for options in changes)
    for live in [base, lowest, *(base + c for options in changes for c in options)]:
        found |= {int(a + live[a:b].argmax()) for a, b in pairwise(edges)}
    return sorted(found)


def _effect(
    step: Step, seconds: Seconds, dropped: frozenset[fx.Node], stops: frozenset[fx.Node]
) -> tuple[np.ndarray, float]:
    """Bytes alive at each node when `dropped` alone are computed again, and the seconds added."""
    calls = schedule(step, dropped, stops)
    return calls.live(), sum(seconds[n] for n in calls.runs_again())


Known = dict[Any, list[tuple[int, ...]]]
"""Answers by program: layers that repeat ask the same question."""


def _segment_plans(
    step: Step,
    seconds: Seconds,
    sites: Sequence[fx.Node],
    stops: frozenset[fx.Node],
    known: Known,
) -> list[frozenset[fx.Node]]:
    """Owners of one segment to drop: nothing, the cheapest for each level of bytes, everything."""
    if len(sites) == 1:
        return [frozenset(), frozenset(sites)]
    problem, question = _bytes_program(step, seconds, sites, stops)
    if question not in known:
        known[question] = _cheapest(problem, len(sites))
    options = [frozenset(s for s, o in zip(sites, c, strict=True) if o) for c in known[question]]
    return list(dict.fromkeys([frozenset(), *options, frozenset(sites)]))


def _cheapest(problem: Problem, count: int) -> list[tuple[int, ...]]:
    """What to drop of the first `count` groups so that at most each share of the bytes stays."""
    total = sum(g.options[0].amount("bytes") for g in problem.groups[:count])
    found: list[tuple[int, ...]] = []
    for level in range(LEVELS - 1, 0, -1):
        row = Row("bytes", total * level / LEVELS)
        solution = solve(
            Problem(problem.groups, (*problem.rows, row), problem.objective), time_limit=1.0
        )
        if solution is not None:
            found.append(solution.choice[:count])
    return found


def _bytes_program(
    step: Step, seconds: Seconds, sites: Sequence[fx.Node], stops: frozenset[fx.Node]
) -> tuple[Problem, Any]:
    """Keep or drop each site; dropping asks that ops run again, each paid for once.

    The second value is equal for programs that differ in names alone.
    """
    drops: list[dict[str, float]] = [{} for _ in sites]
    number: dict[fx.Node, int] = {}
    runs: list[dict[str, float]] = []
    for s, site in enumerate(sites):
        for op in schedule(step, [site], stops).runs_again():
            i = number.setdefault(op, len(number))
            if i == len(runs):
                runs.append({"seconds": seconds[op]})
            drops[s][f"{s}>{i}"], runs[i][f"{s}>{i}"] = 1.0, -1.0
    kept = [Option("keep", {"bytes": float(step.bytes[site])}) for site in sites]
    groups = [
        Group(f"site {s}", (keep, Option("drop", drop)))
        for s, (keep, drop) in enumerate(zip(kept, drops, strict=True))
    ]
    once = Option("once", {})
    groups += [Group(f"run {i}", (once, Option("twice", run))) for i, run in enumerate(runs)]
    rows = tuple(Row(name, 0.0) for drop in drops for name in drop)
    scale = sum(run["seconds"] for run in runs) or 1.0
    total = sum(option.amounts["bytes"] for option in kept) or 1.0
    question = (
        tuple(tuple(g.options[1].amounts.items()) for g in groups),
        tuple(option.amounts["bytes"] for option in kept),
    )
    objective = {"seconds": 1 / scale, "bytes": 1e-3 / total}
    return Problem(tuple(groups), rows, objective), question
