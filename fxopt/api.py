"""The public functions: `optimize`, `plan`, `apply`, `verify`, `load`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from . import evidence, training
from .compiler import Compiler, Request, resolve, training_step
from .decide.decisions import refusals
from .decide.search import Choice, Search, Trial, identity
from .emit.editor import GraphEditor
from .hosted import Optimized, load_into
from .ir.budget import Budget
from .ir.errors import BudgetError, RowResult
from .ir.plan import Plan
from .ir.workload import Workload
from .measure import Measurer
from .progress import Progress, showing
from .replay import check_tensors, installed, prepared_tensors, replay
from .show.report import Report
from .training.module import TrainingModule

logger = logging.getLogger("fxopt")

ATTEMPTS = 5
"""Searches, each asking more of the `choose` part, until the `verify` part holds."""
MARGIN = 1.02
RUNNERS_UP = 4
"""Where nothing holds, so many of the nearest trials are verified and the best is handed out."""


def optimize(
    model: nn.Module,
    budget: Budget,
    example_inputs: Any = None,
    *,
    workload: Workload | None = None,
    calibration: Iterable[Any] | None = None,
    keep: Iterable[str] = (),
    rewrites: Sequence[str] | None = None,
    at: str | None = None,
    recover: None = None,
    seed: int = 0,
    time_limit: float | None = None,
    progress: bool | None = None,
) -> Optimized | TrainingModule:
    """Rewrite `model` so that it keeps `budget`, and measure that it does.

    Returns a module with the same signature and output class, with `.plan` and `.report`; the
    original is not changed. `example_inputs` (tensor, tuple or dict) may be omitted for Hugging
    Face models, `calibration` is an iterable of such inputs. `keep` names sites left alone,
    `rewrites` the rewrites to use: names or `re:` patterns. `at` names a submodule: only that is
    captured and rewritten, inputs and budget are of the whole model, which stays as it is around
    it and need not be a graph; `save` then writes the submodule (`OptimizedHost.save`).
    Raises BudgetError (with `.best`) when no plan was measured to keep every row, CaptureError
    when the model cannot be captured. `time_limit` in seconds bounds scoring and search; Ctrl-C
    during the search does what the end of that time does. `progress` draws bars on standard error
    (None: when that is a terminal). An `fxopt.Train` workload gives a `TrainingModule`, whose
    whole training step keeps the `memory` or `activations` of the budget; see docs/activation.md.
    """
    del recover
    step = training_step(model, budget, example_inputs, workload, calibration, at)
    if step is not None:
        return training.optimize(
            model, budget, *step, keep=keep, rewrites=rewrites, time_limit=time_limit
        )
    request = resolve(
        model, budget, example_inputs, workload=workload, calibration=calibration, keep=keep,
        rewrites=rewrites, at=at, seed=seed, time_limit=time_limit,
    )  # fmt: skip
    with showing(progress) as shown:
        return _Session(_compiler(request, shown)).optimize()


def plan(
    model: nn.Module,
    budget: Budget,
    example_inputs: Any = None,
    *,
    workload: Workload | None = None,
    calibration: Iterable[Any] | None = None,
    keep: Iterable[str] = (),
    rewrites: Sequence[str] | None = None,
    at: str | None = None,
    seed: int = 0,
    time_limit: float | None = None,
    progress: bool | None = None,
) -> Plan:
    """The decision alone: as `optimize`, but what is chosen is not emitted or verified.

    A budget that no plan is predicted to keep gives the nearest plan, and a note that says so.
    """
    step = training_step(model, budget, example_inputs, workload, calibration, at)
    if step is not None:
        return training.plan(
            model, budget, *step, keep=keep, rewrites=rewrites, time_limit=time_limit
        )
    request = resolve(
        model, budget, example_inputs, workload=workload, calibration=calibration, keep=keep,
        rewrites=rewrites, at=at, seed=seed, time_limit=time_limit,
    )  # fmt: skip
    with showing(progress) as shown:
        session = _Session(_compiler(request, shown))
        trial = session.search_best()
        editor = session.compiler.realise(session.compiler.chosen(session.search, trial.choice))
        made = session.plan_of(trial, session.measurer.rows(trial.predicted, {}), editor)
    if trial.excess > 0:
        made.notes.append("no plan was found that keeps every row; this is the nearest")
    return made


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    refit: bool = False,
    progress: bool | None = None,
) -> Optimized | TrainingModule:
    """Realise `plan` on `model` without searching.

    With the plan's prepared tensors the result is that of the first time, bit for bit; without
    them, or with `refit=True` (a fine-tune of the model), they are fitted from `calibration`.
    PlanError when the plan was made for another model, or (without refit) for other weights.
    """
    step = training_step(model, plan.budget, example_inputs, plan.workload, calibration, plan.at)
    if step is not None:
        return training.apply(model, plan, step[0])
    request = resolve(
        model, plan.budget, example_inputs, workload=plan.workload, calibration=calibration,
        keep=(), rewrites=installed(plan), at=plan.at, seed=0, time_limit=None,
    )  # fmt: skip
    with showing(progress) as shown:
        return replay(_compiler(request, shown), plan, refit=refit)


def verify(
    opt: Optimized,
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    progress: bool | None = None,
) -> Report:
    """Measure the rows of `opt.plan.budget` again, against `model`, on `calibration`.

    The last third of `calibration` is measured on, as by `optimize`; `example_inputs` default to
    its first item. PlanError when `opt` was made of another model, or was changed since.
    """
    items = None if calibration is None else list(calibration)
    example = items[0] if items and example_inputs is None else example_inputs
    request = resolve(
        model, opt.plan.budget, example, workload=opt.plan.workload, calibration=items,
        keep=(), rewrites=installed(opt.plan), at=opt.plan.at, seed=0, time_limit=None,
    )  # fmt: skip
    with showing(progress) as shown:
        compiler = _compiler(request, shown)
        replayed = replay(compiler, opt.plan, refit=False)
        check_tensors(opt, replayed)
        editor = replayed.editor
        assert editor is not None
        measurer = Measurer(compiler)
        rows = measurer.rows({}, measurer.contract(editor, opt))
    return Report(rows, list(opt.plan.notes))


def load(path: str | Path, model: nn.Module | None = None) -> Optimized:
    """Load what `opt.save(path)` wrote; nothing from the folder is executed.

    A folder of a submodule (`at=`) gives that submodule, or with `model` a copy of the model with
    the submodule in its place.
    """
    from .emit.save import load as load_folder

    if model is None:
        return load_folder(path)
    device = next((p.device for p in model.parameters()), "cpu")
    return load_into(model, load_folder(path, device))


def _compiler(request: Request, progress: Progress) -> Compiler:
    with progress.stage("capturing"):
        return Compiler(replace(request, progress=progress))


class _Session:
    """One search: a table, its trials, and the module that comes of it."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.interrupted = False
        for note in compiler.request.calibration.notes:
            logger.warning(note)
        self.measurer = Measurer(compiler)
        self.table = compiler.table()
        limits = compiler.limits(self.measurer.baseline, self.table)
        self.search = Search(self.table, limits)

    def search_best(self) -> Trial:
        """Search; the identity is always among the trials."""
        found = self._search()
        if found is None or found.excess > 0:
            none = identity(self.table)
            if all(t.choice != none for t in self.search.trials):
                self.search.tell(none, self._measured(none))
        best = self.search.best
        assert best is not None
        return best

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
        editor = self.compiler.realise(self.compiler.chosen(self.search, choice))
        return self.measurer.trial(editor)

    def optimize(self) -> Optimized:
        """Search, verify on the part kept aside, correct and search again until it holds."""
        nearest: tuple[float, Optimized, list[RowResult]] | None = None
        for _ in range(ATTEMPTS):
            found = self.search_best()
            held, rows = found.excess <= 0, list[RowResult]()
            for trial in [found] if held else self.search.ranked()[:RUNNERS_UP]:
                module, rows = self._verified(trial)
                excess = max((row.excess for row in rows if row.limit is not None), default=0.0)
                if excess <= 0:
                    return module
                if nearest is None or excess < nearest[0]:
                    nearest = (excess, module, rows)
            if not held or time.monotonic() > self.compiler.request.deadline:
                break
            self._correct(found, rows)
        assert nearest is not None
        raise _budget_error(nearest[1], nearest[2])

    def _verified(self, trial: Trial) -> tuple[Optimized, list[RowResult]]:
        proposals = self.compiler.chosen(self.search, trial.choice)
        editor = self.compiler.realise(proposals)
        module = self.compiler.emit(editor)
        measured = self.measurer.contract(editor, module)
        rows = self.measurer.rows(trial.predicted, measured)
        module.plan = self.plan_of(trial, rows, editor, module)
        module.report = Report(rows, self._notes())
        return module, rows

    def _correct(self, trial: Trial, rows: Sequence[RowResult]) -> None:
        """The verify part was worse than the choose part: expect that of every choice."""
        worst = max((row for row in rows if row.limit is not None), key=lambda row: row.excess)
        assert worst.measured is not None
        name = self.measurer.solver_name(worst.name)
        measured = worst.measured
        if name == "error":
            measured = self.compiler.quality.additive(measured)
        factor = measured / max(trial.measured.get(name, 0.0), 1e-30)
        self.search.tighten(trial, name, min(max(factor, 1.0), 10.0) * MARGIN)

    def _notes(self) -> list[str]:
        notes = [*self.compiler.request.calibration.notes, *self.measurer.notes]
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
            notes=[*self._notes(), *evidence.notes(shown["decisions"])],
            **shown,
        )
        made.tensors = prepared_tensors(compiler, compiler.chosen(search, trial.choice))
        return made


def _budget_error(best: Optimized, rows: list[RowResult]) -> BudgetError:
    worst = max((r for r in rows if r.limit is not None), key=lambda r: r.excess)
    return BudgetError(
        f"no plan keeps the budget: {worst.name} measured {worst.measured:.4g} {worst.unit}, "
        f"limit {worst.limit:.4g}; the nearest plan is in .best, its rows in .rows. Loosen "
        f"{worst.name}, or the quality row, or allow more rewrites",
        rows,
        worst.name,
        best,
    )
