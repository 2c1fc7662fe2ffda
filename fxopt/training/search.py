"""What happens to which saved tensors: plans for every peak that can be reached.

Each segment of the forward offers a few plans of its own (`offers.py`). A program takes one of
them a segment so that the peak at every point of the step is below a limit, and the error below
its own. Every plan found is then laid out and its peak counted exactly; the plans that no other
beats in both peak and seconds form a frontier that does not depend on the byte budget. A budget
takes the fastest plan below it, so a smaller budget never brings a higher peak.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import fx

from ..decide.problem import Group, Option, Problem, Row
from ..decide.solve import solve
from .forms import Choices, Form, again, images
from .offers import Known, Offers
from .schedule import Schedule, schedule
from .segments import Segments, segmentations
from .step import Step

LIMITS = 10
CHUNKS = 24
REPAIRS = 2
GAP = 2e-4
"""Of the step's seconds: how far a plan may be from the best of its segments' options."""
WAITS = 17
CLOSE = 1.01
START, MANY = "from ", 1e4
"""Rows of what second runs start from: rounding it counts as much as more starts than there are."""

Seconds = Mapping[fx.Node, float]
Forms = Mapping[fx.Node, Sequence[Form]]


@dataclass(frozen=True)
class StepPlan:
    """What happens to each saved owner, the most bytes ever alive beside the parameters, the
    seconds that it adds to a step, and the relative error of gradients to be expected of it.

    `stops` are owners that are kept so that second runs start from them.
    """

    choices: Choices
    stops: frozenset[fx.Node]
    peak: int = 0
    seconds: float = 0.0
    error: float = 0.0

    @property
    def dropped(self) -> frozenset[fx.Node]:
        """The owners to compute again."""
        return again(self.choices)

    @property
    def host(self) -> int:
        """Bytes in host memory."""
        return sum(form.host for form in self.images.values())

    @property
    def images(self) -> dict[fx.Node, Form]:
        """The owners that wait in another form."""
        return images(self.choices)

    def counted(self, step: Step, seconds: Seconds) -> StepPlan:
        """The same choices, with their peak, seconds and error counted."""
        return _plan(step, seconds, self.choices, self.stops)


def frontier(
    step: Step,
    seconds: Seconds,
    droppable: Collection[fx.Node],
    forms: Forms | None = None,
    *,
    error: float = 0.0,
    host: float = float("inf"),
    deadline: float = float("inf"),
) -> list[StepPlan]:
    """Plans from the fastest to the smallest; each next has a lower peak and takes longer.

    `droppable` are the saved owners that may be computed again, `seconds` what each op takes,
    `forms` what owners may wait in instead, `error` the most that may be expected of a plan, `host`
    the bytes that it may take there. After `deadline` (of `time.monotonic`) no further way to cut
    the forward is tried.
    """
    forms = forms or {}
    rounds = [Offers(step, seconds, frozenset(droppable), each) for each in _rounds(forms)]
    movable = {o for o, found in forms.items() if any(f.restores for f in found)}
    limits = {"error": error**2, "host": host}
    known: Known = {}
    found = [_plan(step, seconds, {}, frozenset())]
    for segments in segmentations(step, {*droppable, *forms}, movable):
        for offers in rounds:
            found += _of_segments(offers, segments, limits, known)
        if time.monotonic() > deadline:
            break
    best: list[StepPlan] = []
    for plan in sorted(found, key=lambda p: (p.seconds, p.peak)):
        fits = plan.error <= error * (1 + 1e-9) and plan.host <= host
        if fits and (not best or plan.peak < best[-1].peak):
            best.append(plan)
    return best


def laid_out(step: Step, plan: StepPlan) -> Schedule:
    """The calls of a plan."""
    return schedule(step, plan.dropped, plan.stops, plan.images)


def _rounds(forms: Forms) -> list[Forms]:
    """The forms that are searched for plans, one set after another: first those whose copies wait
    for nothing, so that what others add to the program never takes a plan away."""
    if not any(f.bounded for found in forms.values() for f in found):
        return [forms]
    return [{o: [f for f in found if not f.bounded] for o, found in forms.items()}, forms]


def _plan(step: Step, seconds: Seconds, choices: Choices, stops: frozenset[fx.Node]) -> StepPlan:
    found = _effect(step, seconds, choices, stops)
    peak, error = int(found.live.max(initial=0)), found.sums["error"] ** 0.5
    return StepPlan(choices, stops, peak, found.sums["seconds"], error)


def _of_segments(
    offers: Offers, segments: Segments, limits: Mapping[str, float], known: Known
) -> list[StepPlan]:
    """Plans for limits between the least and the most that these segments can reach."""
    if not segments.parts:
        return []
    step, seconds, stops = offers.step, offers.seconds, segments.stops
    base = _effect(step, seconds, {}, stops).live
    choices = [offers.plans(p.sites, stops, known) for p in segments.parts]
    effects = [[_effect(step, seconds, c, stops) for c in options] for options in choices]
    changes = [[effect.live - base for effect in options] for options in effects]
    points = _points(base, changes)
    groups = tuple(
        Group(
            str(g),
            tuple(_option(e, c[points]) for e, c in zip(options, lives, strict=True)),
        )
        for g, (options, lives) in enumerate(zip(effects, changes, strict=True))
    )
    fixed = [Row(n, v) for n, v in limits.items() if offers.forms and v < np.inf]
    fixed += _exact_starts(groups)
    if waiting := _waiting(step, groups):
        groups, fixed = (*groups, waiting), [*fixed, Row("link", _span(step))]
    # so that a gap is a share of the step's seconds, not of those added
    whole = Group("step", (Option("", {"seconds": _step_seconds(offers)}),))
    low = _lowest(base, changes)
    found = [_plan(step, seconds, _joined(options[-1] for options in choices), stops)]
    for limit in np.geomspace(max(low, 1.0), float(base.max()), LIMITS):
        for _ in range(REPAIRS):
            rows = [Row(f"peak@{i}", float(limit), float(base[p])) for i, p in enumerate(points)]
            asked = Problem((*groups, whole), (*fixed, *rows), {"seconds": 1.0})
            solution = solve(asked, time_limit=2.0, gap=GAP, walk=False)
            if solution is None:
                break
            picked = zip(choices, solution.choice[: len(choices)], strict=True)
            chosen = _joined(each[o] for each, o in picked)
            found.append(_plan(step, seconds, chosen, stops))
            if found[-1].peak <= CLOSE * limit:
                break
            # points between those of the program are higher: ask for less
            limit = limit * limit / found[-1].peak
    return found


def _step_seconds(offers: Offers) -> float:
    """What the step takes with everything saved, where only the forward is known thrice that."""
    return sum(offers.step.pace.values()) or 3 * sum(offers.seconds.values())


def _joined(choices: Iterable[Choices]) -> Choices:
    return {owner: chosen for each in choices for owner, chosen in each.items()}


def _option(effect: _Effect, change: np.ndarray) -> Option:
    peaks = {f"peak@{i}": float(c) for i, c in enumerate(change)}
    starts = {f"{START}{owner.name}": 1.0 for owner in effect.starts}
    rounded = {f"{START}{owner.name}": MANY for owner in effect.rounded}
    return Option("", {**effect.sums, **peaks, **starts, **rounded})


def _span(step: Step) -> float:
    """Seconds of the forward, beside which copies to the host run for nothing."""
    return sum(step.pace.get(node, 0.0) for node in step.forward)


def _waiting(step: Step, groups: Sequence[Group]) -> Group | None:
    """How long the step stands still, each way, for copies that all ops together do not cover."""
    longest = sum(max(o.amount("link") for o in group.options) for group in groups)
    if longest <= _span(step):
        return None
    waits = np.linspace(0, longest, WAITS)
    return Group("wait", tuple(Option("", {"link": -w, "seconds": 2 * w}) for w in waits))


def _exact_starts(groups: Sequence[Group]) -> list[Row]:
    """Nothing is computed again from what another group rounds; within one that is seen to."""
    amounts = [option.amounts for group in groups for option in group.options]
    started = {name for each in amounts for name, a in each.items() if a == 1 and START in name}
    return [Row(name, MANY) for name in started if any(each.get(name) == MANY for each in amounts)]


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


@dataclass(frozen=True)
class _Effect:
    """Bytes alive at each node, what is added to rows that are sums, the owners that second runs
    start from, and those that are rounded."""

    live: np.ndarray
    sums: dict[str, float]
    starts: frozenset[fx.Node]
    rounded: frozenset[fx.Node]


def _effect(step: Step, seconds: Seconds, choices: Choices, stops: frozenset[fx.Node]) -> _Effect:
    """What `choices` do if all else is kept."""
    stored = images(choices)
    calls = schedule(step, again(choices), stops, stored)
    added = sum(seconds[n] for n in calls.runs_again()) + sum(f.seconds for f in stored.values())
    # squares of errors add up
    rows = {"error": "error", "host": "host", "link": "transfer"}
    sums = {row: float(sum(getattr(f, n) for f in stored.values())) for row, n in rows.items()}
    return _Effect(
        calls.live(),
        {"seconds": added + calls.wait, **sums},
        calls.starts(),
        frozenset(owner for owner, form in stored.items() if not form.restores),
    )
