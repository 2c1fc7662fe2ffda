"""One search: a table of priced options, its trials, and the module that comes of it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from . import evidence, passes
from .compiler import TRIALS, Compiler
from .decide.again import note_totals
from .decide.decisions import refusals
from .decide.outlook import floors, nearest_note
from .decide.propose import Prepare
from .decide.quality import QUALITIES
from .decide.refine import Refined
from .decide.search import Choice, Search, Trial, identity
from .decide.table import Table
from .distilled import SAID, Distillation, distilled, too_few
from .emit.editor import GraphEditor
from .hosted import Optimized
from .ir.errors import BudgetError, FxoptError, RowResult
from .ir.plan import Plan
from .ir.units import format_value
from .measure import UNITS, Measurer
from .replay import prepared_tensors
from .show.report import Report

logger = logging.getLogger("fxopt")
T = TypeVar("T")

ATTEMPTS = 5
"""Searches, each asking more of the `choose` part, until the `verify` part holds."""
MARGIN, MOST = 1.02, 10.0
DISTILLED = 3
"""Whole choices that are distilled in all: the best of those that were not, and what the solver
takes next, knowing how much better that became. Those after them are measured as fitted."""
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
        self._refined: Refined | None = None
        self._distils = False
        self._made: dict[Choice, Distillation] = {}
        if compiler.request.recover is not None and (reason := too_few(compiler)):
            raise FxoptError(f"recover: {reason}")
        compiler.request.calibration.warn()
        self.measurer = measurer or Measurer(compiler)
        self.table = table or compiler.table()
        limits = compiler.limits(self.measurer.baseline, self.table)
        self.search = Search(self.table, limits)

    def search_best(self) -> Trial:
        """Search; the identity is always among the trials."""
        self._search()
        self._refine()
        found = self.search.best
        if found is None or found.excess > 0:
            self._insist(lambda: self._try(identity(self.table)))
        self._go_on_distilled()
        best = self.search.best
        assert best is not None
        return best

    def _go_on_distilled(self) -> None:
        """Distil the best choice and search on: from here on choices are distilled before they
        are measured."""
        if self.compiler.request.recover is None or self._distils or self.interrupted:
            return
        trial = self._to_distil()
        if trial is None:
            return
        self._distils = True
        try:
            rows = self._distilled(trial.choice, trial.measured)
        except KeyboardInterrupt:
            self._end()
            return
        self.search.forget(trial)
        self.search.tell(trial.choice, rows)
        self._search()

    def _to_distil(self) -> Trial | None:
        """The best trial that holds and rewrites anything; without one, that nearest to the budget
        of those that exceed it by their error alone."""
        limits, none = self.search.limits, identity(self.table)
        best = self.search.best
        if best is not None and best.excess <= 0 and best.choice != none:
            return best
        return next(
            (
                trial
                for trial in self.search.ranked()
                if trial.choice != none and limits.excess({**trial.measured, "error": 0.0}) <= 0
            ),
            None,
        )

    def _try(self, choice: Choice) -> None:
        """Measure a choice that the search has not tried."""
        if all(trial.choice != choice for trial in self.search.trials):
            self.search.tell(choice, self._measured(choice))

    def _search(self) -> None:
        """As far as time goes; at least one choice is measured, where none was."""
        rounds = self._left or TRIALS
        self._insist(lambda: self.compiler.search(self.search, self._measured, rounds))

    def _refine(self) -> None:
        """Choose again near the best choice, where its sites interact; Ctrl-C ends the time."""
        if self._distils or self.interrupted:
            return
        try:
            self._refined = self.compiler.refine(self.search, self._measured) or self._refined
        except KeyboardInterrupt:
            self._end()

    def _insist(self, work: Callable[[], T]) -> T:
        """What `work` returns, without which there is no plan to hand out: Ctrl-C ends the time,
        and `work` begins again."""
        try:
            return work()
        except KeyboardInterrupt:
            self._end()
            return work()

    def _end(self) -> None:
        """End the time; another Ctrl-C is for the caller."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        logger.warning("Ctrl-C: the best plan measured so far follows; once more gives up")
        now = replace(self.compiler.request, deadline=time.monotonic())
        self.compiler.request = now

    def _measured(self, choice: Choice) -> Mapping[str, float]:
        proposals = self.compiler.chosen(self.search, choice)
        rows = self.measurer.trial(self.compiler.realise(proposals), proposals)
        return self._distilled(choice, rows) if self._left else rows

    @property
    def _left(self) -> int:
        """Choices that are still to be distilled, once one was."""
        return DISTILLED - len(self._made) if self._distils else 0

    def _distilled(self, choice: Choice, rows: Mapping[str, float]) -> Mapping[str, float]:
        """`rows` of a choice with its error after distillation, which is taken back where the
        tensors as they were fitted err less."""
        how, proposals = self.compiler.request.recover, self.compiler.chosen(self.search, choice)
        assert how is not None
        made = distilled(self.compiler, proposals, how, self.compiler.preparer)
        if made.outcome.interrupted:
            self._end()
        if made.improved:
            error = self.measurer.error(self.compiler.realise(proposals, made))
            # the error as fitted may be no number
            if math.isfinite(error) and not error >= rows["error"]:
                rows = {**rows, "error": error}
            else:
                made.take_back()
        self._made[choice] = made
        return rows

    def _prepare(self, choice: Choice) -> Prepare:
        """The tensors of a choice as it was measured."""
        return self._made.get(choice, self.compiler.preparer)

    def plan(self) -> Plan:
        """The decision alone: realised to see the graph, not emitted and not verified."""
        trial = self.search_best()
        return self._insist(lambda: self._planned(trial))

    def _planned(self, trial: Trial) -> Plan:
        chosen = self.compiler.chosen(self.search, trial.choice)
        editor = self.compiler.realise(chosen, self._prepare(trial.choice))
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
        raise self._budget_error(nearest)

    def _budget_error(self, nearest: Verified) -> BudgetError:
        """What is exceeded most, what these rewrites cannot reach, and the way out."""
        limited = [row for row in nearest.rows if row.limit is not None]
        worst = max(limited, key=lambda row: row.excess)
        measured, limit = (format_value(v, worst.unit) for v in (worst.measured, worst.limit))
        floor = floors(self.search.problem()).get(worst.name, "")
        reach = f"{floor} with these rewrites; " if floor else ""
        quality = [row.name for row in limited if row.name in QUALITIES and not floor]
        looser = " or ".join(dict.fromkeys([worst.name, *quality]))
        more = ", or allow more rewrites" if self._more_serve(worst.name) else ""
        if all(len(group.options) == 1 for group in self.search.problem().groups):
            reach = "none of the rewrites serves a site of this model, as its plan says; "
            more = more if self.compiler.request.rewrites is not None else ""
        return BudgetError(
            f"no plan keeps the budget: {worst.name} measured {measured}, limit {limit}; {reach}"
            f"the nearest plan is in .best, its rows in .rows. Loosen {looser}{more}",
            nearest.rows,
            worst.name,
            nearest.module,
        )

    def _more_serve(self, row: str) -> bool:
        """Whether a rewrite that was not allowed may serve a row."""
        loaded = {rewrite.name for rewrite in self.compiler.rewrites}
        family = {"kv_cache": "kv_cache", "weights": "linear"}.get(row, "")
        return any(name.startswith(family) for name in passes.available().keys() - loaded)

    def _warned(self, module: Optimized) -> Optimized:
        """The module, once it is said what its plan's measurement leaves open."""
        for note in self.measurer.notes:
            if note.startswith("calibration:"):
                logger.warning(note)
        return module

    def _recovery(self, choice: Choice) -> dict[str, Any]:
        """How the tensors of a choice were trained, as fields of `Plan`."""
        made = self._made.get(choice)
        if made is None or made.taken_back or not made.outcome.blocks:
            return {}
        return {"recover": self.compiler.request.recover, "distilled": made.outcome.blocks}

    def _nearest(self) -> list[Trial]:
        """Where nothing holds: the trials to verify, the model as it is among them."""
        none = identity(self.table)
        self._insist(lambda: self._try(none))
        ranked = self.search.ranked()
        return [t for i, t in enumerate(ranked) if i < RUNNERS_UP or t.choice == none]

    def _verified(self, trial: Trial) -> Verified:
        """The module of a trial, and its rows on the part kept aside."""
        return self._insist(lambda: self._contract(trial))

    def _contract(self, trial: Trial) -> Verified:
        proposals = self.compiler.chosen(self.search, trial.choice)
        editor = self.compiler.realise(proposals, self._prepare(trial.choice))
        module = self.compiler.emit(editor)
        measured = self.measurer.contract(editor, module)
        rows = self.measurer.rows(trial.predicted, measured)
        excess = max((row.excess for row in rows if row.limit is not None), default=0.0)
        if excess <= 0:
            measured |= self.measurer.minimised(module)
            rows = self.measurer.rows(trial.predicted, measured)
        module.plan = self.plan_of(trial, rows, editor, module)
        module.report = Report(
            rows, self._notes_of(trial.choice), distilled=list(module.plan.distilled)
        )
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

    def _notes_of(self, choice: Choice) -> list[str]:
        if self.compiler.request.recover is None:
            return self._notes()
        made = self._made.get(choice)
        said = made.said if made else "this plan was not distilled"
        return [*self._notes(), f"{SAID}{said}"]

    def _notes(self) -> list[str]:
        notes = [*self.measurer.said(), *self.measurer.counted_from()]
        if self._refined is not None:
            notes.append(self._said(self._refined))
        if self.interrupted:
            notes.append("Ctrl-C ended the search; this is the best plan measured so far")
        elif self.search.stopped:
            notes.append("the time limit ended the search; this is the best plan measured so far")
        return notes

    def _said(self, refined: Refined) -> str:
        """What choosing again did, on the part of the data that choices are made by."""
        row = self.measurer.quality_row

        def text(error: float) -> str:
            return format_value(self.compiler.quality.measured(error), UNITS[row])

        some = f" of {refined.near}" if refined.measured < refined.near else ""
        found = "no choice by them is better"
        if refined.after is not None:
            found = f"a choice by them is better, with {text(refined.after)}"
        return (
            f"{row}: errors of sites alone add up to {text(refined.alone)}, together they had "
            f"{text(refined.before)}; {refined.measured}{some} changes of one site were measured "
            f"about that plan, and {found}"
        )

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
            **self._recovery(trial.choice),
            notes=[*self._notes_of(trial.choice), *evidence.notes(shown["decisions"])],
            **shown,
        )
        note_totals(made)
        made.settle()
        made.tensors = self._tensors(trial)
        return made

    def _tensors(self, trial: Trial) -> dict[str, Tensor]:
        """What the choices of a trial prepared."""
        proposals = self.compiler.chosen(self.search, trial.choice)
        prepare = self._prepare(trial.choice)
        made = {p.where: prepare(p) for p in self.compiler.in_turn(proposals, prepare)}
        return prepared_tensors(proposals, lambda p: made[p.where])


def _nearer(one: Verified | None, other: Verified) -> Verified:
    return other if one is None or other.excess < one.excess else one
