"""What can happen to the saved tensors of one segment of a forward: a few plans of its own.

A program over the segment's tensors finds them: least seconds for at most so many bytes kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..decide.problem import Group, Option, Problem, Row
from ..decide.solve import solve
from ..ir.saved import AGAIN
from .forms import Choices, Form, Treatment
from .schedule import schedule
from .step import Step

LEVELS = 6
GAP = 2e-3
SCARCE = 0.1
"""What a second of the link to the host counts within a segment: all segments share it, and only
the program over all of them knows whether it is free."""

Options = Sequence[Sequence[Treatment | None]]
"""What can happen to each site of a segment, in the order of the options of its group."""

Known = dict[Any, list[tuple[int, ...]]]
"""Answers by program: layers that repeat ask the same question."""


@dataclass(frozen=True)
class Offers:
    """What can happen to each saved owner of a step: `droppable` ones may be computed again, at
    `seconds` an op, and wait in one of `forms`."""

    step: Step
    seconds: Mapping[fx.Node, float]
    droppable: frozenset[fx.Node]
    forms: Mapping[fx.Node, Sequence[Form]]

    def treatments(self, site: fx.Node, stops: frozenset[fx.Node]) -> list[Treatment | None]:
        """What can happen to an owner; None: it is kept. Of those that second runs start from no
        more than another place can change."""
        forms = self.forms.get(site, ())
        if site in stops:
            return [None, *(form for form in forms if form.restores)]
        dropped: list[Treatment | None] = [AGAIN] if site in self.droppable else []
        return [None, *dropped, *forms]

    def plans(
        self, sites: Sequence[fx.Node], stops: frozenset[fx.Node], known: Known
    ) -> list[Choices]:
        """Choices for one segment: nothing, the cheapest for each level of bytes, each form for
        all tensors, and, last, all computed again that can be."""
        options = [self.treatments(site, stops) for site in sites]
        everything: Choices = {s: AGAIN for s, o in zip(sites, options, strict=True) if AGAIN in o}
        found: list[Choices] = [{}]
        if len(sites) > 1:
            problem, question = self._program(sites, options, stops)
            if question not in known:
                known[question] = _cheapest(problem, options)
            found += [_chosen(sites, options, choice) for choice in known[question]]
        for label in _labels(options):
            numbers = (next((i for i, t in enumerate(o) if _label(t) == label), 0) for o in options)
            found.append(_chosen(sites, options, tuple(numbers)))
        distinct = {frozenset(c.items()): c for c in found if c != everything or not c}
        return [*distinct.values(), *([everything] if everything else [])]

    def _program(
        self, sites: Sequence[fx.Node], options: Options, stops: frozenset[fx.Node]
    ) -> tuple[Problem, Any]:
        """What happens to each site; dropping asks that ops run again, each paid for once.

        The second value is equal for programs that differ in names alone.
        """
        amounts = [
            [self._amounts(site, t) for t in each]
            for site, each in zip(sites, options, strict=True)
        ]
        limits: dict[str, float] = {}
        number: dict[fx.Node, int] = {}
        runs: list[dict[str, float]] = []
        for s, site in enumerate(sites):
            if AGAIN not in options[s]:
                continue
            calls = schedule(self.step, [site], stops)
            for op in calls.runs_again():
                i = number.setdefault(op, len(number))
                if i == len(runs):
                    runs.append({"seconds": self.seconds[op]})
                amounts[s][1][f"{s}>{i}"], runs[i][f"{s}>{i}"] = 1.0, -1.0
                limits[f"{s}>{i}"] = 0.0
            if self.forms:
                starts = calls.starts()
                rounded = [i for i, other in enumerate(sites) if other in starts]
                limits |= _exactly(options, amounts, s, rounded)
        groups = [
            Group(f"site {s}", tuple(Option("", each) for each in rows))
            for s, rows in enumerate(amounts)
        ]
        once = Option("once", {})
        groups += [Group(f"run {i}", (once, Option("twice", run))) for i, run in enumerate(runs)]
        amounts_ = tuple(tuple(tuple(o.amounts.items()) for o in g.options) for g in groups)
        question = amounts_, tuple(tuple(map(_label, each)) for each in options)
        scale = {row: _most(groups, row) for row in ("seconds", "bytes", "error")}
        objective = {"seconds": 1 / scale["seconds"], "bytes": 1e-3 / scale["bytes"]}
        objective |= {"error": 1e-2 / scale["error"]} if self.forms else {}
        rows = tuple(Row(name, limit) for name, limit in limits.items())
        return Problem(tuple(groups), rows, objective), question

    def _amounts(self, site: fx.Node, treatment: Treatment | None) -> dict[str, float]:
        if isinstance(treatment, Form):
            seconds = treatment.seconds + 2 * SCARCE * treatment.transfer
            sums = {"seconds": seconds, "error": treatment.error}
            return {"bytes": float(treatment.bytes), **sums}
        return {} if treatment else {"bytes": float(self.step.bytes[site])}


def _chosen(sites: Sequence[fx.Node], options: Options, choice: tuple[int, ...]) -> Choices:
    chosen: dict[fx.Node, Treatment] = {}
    for site, each, option in zip(sites, options, choice, strict=True):
        treatment = each[option]
        if treatment is not None:
            chosen[site] = treatment
    return chosen


def _label(treatment: Treatment | None) -> str:
    return treatment.label if isinstance(treatment, Form) else ""


def _labels(options: Options) -> list[str]:
    return list(dict.fromkeys(_label(t) for each in options for t in each if _label(t)))


def _cheapest(problem: Problem, options: Options) -> list[tuple[int, ...]]:
    """What to do so that at most each share of the bytes stays: without any form, and with more
    and more of them, since one that errs is not for every budget."""
    count, labels = len(options), _labels(options)
    total = sum(g.options[0].amount("bytes") for g in problem.groups[:count])
    found: list[tuple[int, ...]] = []
    for allowed in range(len(labels) + 1):
        others = {"", *labels[:allowed]}
        forbidden = frozenset(
            (s, o) for s, each in enumerate(options) for o, t in enumerate(each)
            if _label(t) not in others
        )  # fmt: skip
        for level in range(LEVELS - 1, 0, -1):
            rows = (*problem.rows, Row("bytes", total * level / LEVELS))
            asked = Problem(problem.groups, rows, problem.objective, forbidden=forbidden)
            solution = solve(asked, time_limit=1.0, gap=GAP, walk=False)
            if solution is not None:
                found.append(solution.choice[:count])
    return found


def _exactly(
    options: Options, amounts: list[list[dict[str, float]]], dropped: int, starts: Sequence[int]
) -> dict[str, float]:
    """Rows that keep what `dropped` is computed again from free of rounding."""
    limits: dict[str, float] = {}
    for s in starts:
        name = f"{dropped}!{s}"
        for treatment, row in zip(options[s], amounts[s], strict=True):
            if isinstance(treatment, Form) and not treatment.restores:
                limits[name] = amounts[dropped][1][name] = row[name] = 1.0
    return limits


def _most(groups: Sequence[Group], row: str) -> float:
    return sum(max(o.amount(row) for o in group.options) for group in groups) or 1.0
