"""What can happen to the saved tensors of one segment of a forward: a few plans of its own.

A program over the segment's tensors finds them: least seconds for at most so many bytes kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..decide.solve import Group, Option, Problem, Row, solve
from ..ir.saved import AGAIN
from .forms import Choices, Form, Treatment
from .schedule import schedule
from .step import Step

LEVELS = 6

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

    def treatments(self, site: fx.Node) -> list[Treatment | None]:
        """What can happen to an owner; None: it is kept."""
        dropped: list[Treatment | None] = [AGAIN] if site in self.droppable else []
        return [None, *dropped, *self.forms.get(site, ())]

    def plans(
        self, sites: Sequence[fx.Node], stops: frozenset[fx.Node], known: Known
    ) -> list[Choices]:
        """Choices for one segment: nothing, the cheapest for each level of bytes, each form for
        all tensors, and, last, all computed again that can be."""
        everything: Choices = {s: AGAIN for s in sites if s in self.droppable}
        found: list[Choices] = [{}]
        if len(sites) > 1:
            problem, question = self._program(sites, stops)
            if question not in known:
                known[question] = self._cheapest(problem, sites)
            found += [self._chosen(sites, choice) for choice in known[question]]
        for label in self._labels(sites):
            found.append({s: f for s in sites for f in self.forms.get(s, ()) if f.label == label})
        distinct = {frozenset(c.items()): c for c in found if c != everything or not c}
        return [*distinct.values(), *([everything] if everything else [])]

    def _chosen(self, sites: Sequence[fx.Node], choice: tuple[int, ...]) -> Choices:
        chosen: dict[fx.Node, Treatment] = {}
        for site, option in zip(sites, choice, strict=True):
            treatment = self.treatments(site)[option]
            if treatment is not None:
                chosen[site] = treatment
        return chosen

    def _labels(self, sites: Sequence[fx.Node]) -> list[str]:
        return list(dict.fromkeys(f.label for s in sites for f in self.forms.get(s, ())))

    def _cheapest(self, problem: Problem, sites: Sequence[fx.Node]) -> list[tuple[int, ...]]:
        """What to do so that at most each share of the bytes stays: without any form, and with
        more and more of them, since one that errs is not for every budget."""
        count = len(sites)
        total = sum(g.options[0].amount("bytes") for g in problem.groups[:count])
        labels = self._labels(sites)
        found: list[tuple[int, ...]] = []
        for allowed in range(len(labels) + 1):
            forbidden = frozenset(self._others(sites, labels[:allowed]))
            for level in range(LEVELS - 1, 0, -1):
                rows = (*problem.rows, Row("bytes", total * level / LEVELS))
                asked = Problem(problem.groups, rows, problem.objective, forbidden=forbidden)
                solution = solve(asked, time_limit=1.0)
                if solution is not None:
                    found.append(solution.choice[:count])
        return found

    def _others(self, sites: Sequence[fx.Node], labels: Sequence[str]) -> Iterable[tuple[int, int]]:
        """The options that are forms of other labels."""
        for s, site in enumerate(sites):
            for o, treatment in enumerate(self.treatments(site)):
                if isinstance(treatment, Form) and treatment.label not in labels:
                    yield s, o

    def _program(self, sites: Sequence[fx.Node], stops: frozenset[fx.Node]) -> tuple[Problem, Any]:
        """What happens to each site; dropping asks that ops run again, each paid for once.

        The second value is equal for programs that differ in names alone.
        """
        amounts = [[self._amounts(site, t) for t in self.treatments(site)] for site in sites]
        limits: dict[str, float] = {}
        number: dict[fx.Node, int] = {}
        runs: list[dict[str, float]] = []
        for s, site in enumerate(sites):
            if site not in self.droppable:
                continue
            calls = schedule(self.step, [site], stops)
            for op in calls.runs_again():
                i = number.setdefault(op, len(number))
                if i == len(runs):
                    runs.append({"seconds": self.seconds[op]})
                amounts[s][1][f"{s}>{i}"], runs[i][f"{s}>{i}"] = 1.0, -1.0
                limits[f"{s}>{i}"] = 0.0
            limits |= self._exactly(sites, amounts, s, calls.starts())
        groups = [
            Group(f"site {s}", tuple(Option("", each) for each in options))
            for s, options in enumerate(amounts)
        ]
        once = Option("once", {})
        groups += [Group(f"run {i}", (once, Option("twice", run))) for i, run in enumerate(runs)]
        question = tuple(tuple(o.amounts.items()) for g in groups for o in g.options)
        scale = {row: _most(groups, row) for row in ("seconds", "bytes", "error")}
        objective = {"seconds": 1 / scale["seconds"], "bytes": 1e-3 / scale["bytes"]}
        objective |= {"error": 1e-2 / scale["error"]} if self.forms else {}
        rows = tuple(Row(name, limit) for name, limit in limits.items())
        return Problem(tuple(groups), rows, objective), question

    def _amounts(self, site: fx.Node, treatment: Treatment | None) -> dict[str, float]:
        if isinstance(treatment, Form):
            sums = {"seconds": treatment.seconds, "error": treatment.error}
            return {"bytes": float(treatment.bytes), **sums}
        return {} if treatment else {"bytes": float(self.step.bytes[site])}

    def _exactly(
        self,
        sites: Sequence[fx.Node],
        amounts: list[list[dict[str, float]]],
        dropped: int,
        starts: frozenset[fx.Node],
    ) -> dict[str, float]:
        """Rows that keep what `dropped` is computed again from free of rounding."""
        limits: dict[str, float] = {}
        for s, site in enumerate(sites):
            lossy = [o for o, t in enumerate(self.treatments(site)) if _rounds(t)]
            if site not in starts or not lossy:
                continue
            name = f"{dropped}!{s}"
            limits[name] = amounts[dropped][1][name] = 1.0
            for o in lossy:
                amounts[s][o][name] = 1.0
        return limits


def _rounds(treatment: Treatment | None) -> bool:
    return isinstance(treatment, Form) and treatment.error > 0


def _most(groups: Sequence[Group], row: str) -> float:
    return sum(max(o.amount(row) for o in group.options) for group in groups) or 1.0
