"""One search: a table of priced options, its trials, and the module that comes of it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from . import evidence
from .compiler import Compiler
from .decide.again import note_totals
from .decide.decisions import refusals
from .decide.outlook import nearest_note
from .decide.quality import QUALITIES
from .decide.search import Choice, Search, Trial, identity
from .decide.table import Table
from .emit.editor import GraphEditor
from .hosted import Optimized
from .ir.errors import BudgetError, RowResult
from .ir.plan import Plan
from .ir.units import format_value
from .measure import Measurer
from .replay import prepared_tensors
from .show.report import Report

logger = logging.getLogger("fxopt")

ATTEMPTS = 5
"""Searches, each asking more of the `choose` part, until the `verify` part holds."""
MARGIN, MOST = 1.02, 10.0
RUNNERS_UP = 4
"""Where nothing holds, so many of the nearest trials are verified, and the model as it is; the
best is handed out."""


class Verified(NamedTuple):
    """A module as verified: how far it is beyond its worst row, and all rows."""

    excess: float
    module: Optimized
    rows: list[RowResult]


class Session:
    """One search: a table, its trials, and the module that comes of it."""

    def __init__(
        self,
        compiler: Compiler,
        table: Table | None = None,
        measurer: Measurer | None = None,
    ) -> None:
        self.compiler = compiler
        self.interrupted = False
        for note in compiler.request.calibration.notes:
            logger.warning(note)
        self.measurer = measurer or Measurer(compiler)
        self.table = table or compiler.table()
        limits = compiler.limits(self.measurer.baseline, self.table)
        self.search = Search(self.table, limits)

    def search_best(self) -> Trial:
        """Search; the identity is always among the trials."""
        found = self._search()
        if found is None or found.excess > 0:
            self._try(identity(self.table))
        best = self.search.best
        assert best is not None
        return best

    def _try(self, choice: Choice) -> None:
        """Measure a choice that the search has not tried."""
        if all(trial.choice != choice for trial in self.search.trials):
            self.search.tell(choice, self._measured(choice))

    def _search(self) -> Trial | None:
        """As far as time goes. Ctrl-C ends the time: at least one choice is still measured, where
        none was; another Ctrl-C is for the caller."""
        try:
            return self.compiler.search(self.search, self._measured)
        except KeyboardInterrupt:
            self.interrupted = True
            logger.warning("Ctrl-C: the best plan measured so far follows; once more gives up")
            now = replace(self.compiler.request, deadline=time.monotonic())
            self.compiler.request = now
            return self.compiler.search(self.search, self._measured)

    def _measured(self, choice: Choice) -> Mapping[str, float]:
        proposals = self.compiler.chosen(self.search, choice)
        return self.measurer.trial(self.compiler.realise(proposals), proposals)

    def plan(self) -> Plan:
        """The decision alone: realised to see the graph, not emitted and not verified."""
        trial = self.search_best()
        editor = self.compiler.realise(self.compiler.chosen(self.search, trial.choice))
        made = self.plan_of(trial, self.measurer.rows(trial.predicted, {}), editor)
        if trial.excess > 0:
            made.notes.append(nearest_note(self.search.problem()))
        return made

    def optimize(self) -> Optimized:
        """Search, verify on the part kept aside, correct and search again until it holds."""
        tried: set[Choice] = set()
        nearest: Verified | None = None  # the only module that is held: they can be large
        for _ in range(ATTEMPTS):
            found = self.search_best()
            if found.excess > 0:
                break
            made = self._verified(found)
            if made.excess <= 0:
                return self._warned(made.module)
            tried.add(found.choice)
            nearest = _nearer(nearest, made)
            if time.monotonic() > self.compiler.request.deadline:
                break
            self._correct(found, made.rows)
        for trial in self._nearest():
            if trial.choice not in tried:
                made = self._verified(trial)
                if made.excess <= 0:
                    return self._warned(made.module)
                nearest = _nearer(nearest, made)
        assert nearest is not None
        raise _budget_error(nearest.module, nearest.rows)

    def _warned(self, module: Optimized) -> Optimized:
        """The module, once it is said what its plan's measurement leaves open."""
        for note in self.measurer.notes:
            if note.startswith("calibration:"):
                logger.warning(note)
        return module

    def _nearest(self) -> list[Trial]:
        """Where nothing holds: the trials to verify, the model as it is among them."""
        none = identity(self.table)
        self._try(none)
        ranked = self.search.ranked()
        return [t for i, t in enumerate(ranked) if i < RUNNERS_UP or t.choice == none]

    def _verified(self, trial: Trial) -> Verified:
        """The module of a trial, and its rows on the part kept aside."""
        proposals = self.compiler.chosen(self.search, trial.choice)
        editor = self.compiler.realise(proposals)
        module = self.compiler.emit(editor)
        measured = self.measurer.contract(editor, module)
        rows = self.measurer.rows(trial.predicted, measured)
        excess = max((row.excess for row in rows if row.limit is not None), default=0.0)
        if excess <= 0:
            measured |= self.measurer.minimised(module)
            rows = self.measurer.rows(trial.predicted, measured)
        module.plan = self.plan_of(trial, rows, editor, module)
        module.report = Report(rows, self._notes())
        return Verified(excess, module, rows)

    def _correct(self, trial: Trial, rows: Sequence[RowResult]) -> None:
        """The verify part was worse than the choose part: expect that of every choice."""
        worst = max((row for row in rows if row.limit is not None), key=lambda row: row.excess)
        assert worst.measured is not None
        name = self.measurer.solver_name(worst.name)
        measured = worst.measured
        if name == "error":
            measured = self.compiler.quality.additive(measured)
        factor = measured / max(trial.measured.get(name, 0.0), 1e-30)
        # what is no number is as bad as can be
        factor = min(max(factor, 1.0), MOST) if math.isfinite(factor) else MOST
        self.search.tighten(trial, name, factor * MARGIN)

    def _notes(self) -> list[str]:
        notes = [*self.compiler.request.calibration.notes, *self.measurer.notes]
        notes += [*self.measurer.disturbance(), *self.compiler.captured.notes]
        if self.compiler.host is not None:
            notes += self.compiler.host.notes()
        if self.interrupted:
            notes.append("Ctrl-C ended the search; this is the best plan measured so far")
        elif self.search.stopped:
            notes.append("the time limit ended the search; this is the best plan measured so far")
        return notes

    def plan_of(
        self,
        trial: Trial,
        rows: list[RowResult],
        editor: GraphEditor,
        module: Optimized | None = None,
    ) -> Plan:
        """The plan of a trial, realised in `editor`, with the tensors that it prepared."""
        compiler, search = self.compiler, self.search
        shown = evidence.shown(self.measurer, search, trial, rows, editor, module)
        made = Plan(
            budget=compiler.request.budget,
            workload=compiler.request.workload,
            hardware=compiler.facts(),
            at=compiler.request.at,
            fingerprint_structure=compiler.structure,
            fingerprint_weights=compiler.weights,
            refusals=refusals(compiler.proposals),
            totals=rows,
            baseline=dict(self.measurer.baseline),
            notes=[*self._notes(), *evidence.notes(shown["decisions"])],
            **shown,
        )
        note_totals(made)
        made.tensors = self._tensors(trial)
        return made

    def _tensors(self, trial: Trial) -> dict[str, Tensor]:
        """What the choices of a trial prepared."""
        return prepared_tensors(self.compiler, self.compiler.chosen(self.search, trial.choice))


def _nearer(one: Verified | None, other: Verified) -> Verified:
    return other if one is None or other.excess < one.excess else one


def _budget_error(best: Optimized, rows: list[RowResult]) -> BudgetError:
    worst = max((r for r in rows if r.limit is not None), key=lambda r: r.excess)
    measured, limit = (format_value(v, worst.unit) for v in (worst.measured, worst.limit))
    quality = next((r.name for r in rows if r.limit is not None and r.name in QUALITIES), None)
    looser = f"{worst.name} or {quality}" if quality not in (None, worst.name) else worst.name
    return BudgetError(
        f"no plan keeps the budget: {worst.name} measured {measured}, limit {limit}; the nearest "
        f"plan is in .best, its rows in .rows. Loosen {looser}, or allow more rewrites",
        rows,
        worst.name,
        best,
    )
