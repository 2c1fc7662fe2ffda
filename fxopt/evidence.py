"""What a plan carries for its readers: trials, what more budget buys, graphs, generated code."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import passes
from .compiler import Compiler
from .decide.decisions import decisions, pairs
from .decide.explain import BETTER, Explainer
from .decide.outlook import Standing, loosened, standing
from .decide.search import Search, Trial, identity
from .decide.swaps import Swaps
from .emit.editor import GraphEditor
from .hosted import Optimized
from .ir import evidence
from .ir.errors import RowResult
from .ir.plan import Decision
from .ir.units import format_value
from .measure import UNITS, Measurer
from .show.binding import WORTH, bought
from .show.blocks import Graphs, blocks

FACTORS = (1.25, 2.0)
"""By how much rows are loosened."""
SOLVE_SECONDS = 2.0
OUTLOOK_SECONDS = 10.0
"""Time for one solution, and for all of them."""


def shown(
    measurer: Measurer,
    search: Search,
    taken: Trial,
    totals: Sequence[RowResult],
    editor: GraphEditor,
    module: Optimized | None,
) -> dict[str, Any]:
    """The decisions of a trial, and all that its plan carries beside, as fields of `Plan`."""
    compiler = measurer.compiler
    stand = standing(search, taken)
    held = all(row.excess <= 0 for row in totals)
    more = looser(_Names(measurer, stand, totals)) if held else []
    stand = replace(stand, prices={**stand.prices, **_worthless(measurer, stand, more)})
    names = _Names(measurer, stand, totals)
    row, quality = measurer.quality_row, compiler.quality
    why = Explainer(Swaps(stand), row, _unit(row), quality)
    decided = decisions(compiler.proposals, search.table, why, compiler.kept_mass)
    compiler.scores.save()
    judge(measurer, decided)
    return {
        "decisions": decided,
        "pairs": pairs(compiler.proposals, search.table, why),
        "trials": trials(measurer, search, taken),
        "prices": names.prices(),
        "looser": more,
        "untried": untried(compiler),
        "blocks": graph_blocks(compiler, editor),
        "sources": sources(module, decided) if module else [],
    }


def _worthless(
    measurer: Measurer, stand: Standing, more: Iterable[evidence.Looser]
) -> dict[str, float]:
    """Prices of rows of which more was proved to buy nothing, whatever the program without its
    integers says."""
    main = measurer.quality_row if stand.main == "error" else stand.main
    gained = bought(more, main).items()
    return {measurer.solver_name(name): 0.0 for name, gain in gained if gain < WORTH}


def notes(decided: Iterable[Decision]) -> list[str]:
    """What a reader should know of the decisions as a whole."""
    better = sum(
        other.reason.startswith(BETTER) for decision in decided for other in decision.alternatives
    )
    if not better:
        return []
    count = "1 alternative is" if better == 1 else f"{better} alternatives are"
    return [f"{count} better by costs corrected after the choice; not solved again"]


def trials(measurer: Measurer, search: Search, taken: Trial) -> list[evidence.Trial]:
    """Every choice that was measured, in order; what is minimised is among its rows."""
    main = next(iter(search.limits.objective))
    before = search.predict(identity(search.table))[main]
    made: list[evidence.Trial] = []
    for trial in search.trials:
        rows = measurer.rows(trial.predicted, _by_row(measurer, trial.measured))
        if main not in {measurer.solver_name(row.name) for row in rows}:
            predicted, measured = trial.predicted[main], trial.measured.get(main)
            rows.append(RowResult(main, None, predicted, measured, _unit(main), before))
        same = trial.choice == taken.choice
        made.append(evidence.Trial(rows=rows, holds=trial.excess <= 0, taken=same))
    return made


def _unit(row: str) -> str:
    return UNITS[row.partition(".")[0]]


def _by_row(measurer: Measurer, rows: Mapping[str, float]) -> dict[str, float]:
    """The solver's rows by their names in the budget."""
    quality = measurer.compiler.quality
    return {
        measurer.quality_row if name == "error" else name: (
            quality.measured(value) if name == "error" else value
        )
        for name, value in rows.items()
    }


class _Names:
    """A standing choice in the budget's rows and units, as a plan's totals know it."""

    def __init__(self, measurer: Measurer, stand: Standing, totals: Sequence[RowResult]) -> None:
        self.measurer, self.stand = measurer, stand
        self.limits = measurer.compiler.request.budget.absolute(measurer.baseline)
        self.predicted = _by_row(measurer, stand.rows(stand.choice))
        known = {row.name: row for row in totals}
        self.now = {
            name: _known(known.get(name), predicted) for name, predicted in self.predicted.items()
        }

    @property
    def objective(self) -> str:
        main = self.stand.main
        return self.measurer.quality_row if main == "error" else main

    def then(self, rows: Mapping[str, float]) -> list[RowResult]:
        """What is known of each row now, and that changed as the prediction changes."""
        changed = _by_row(self.measurer, rows)
        return [
            RowResult(
                name,
                self.limits.get(name),
                now * changed[name] / self.predicted[name] if self.predicted[name] else now,
                None,
                _unit(name),
                now,
            )
            for name, now in self.now.items()
            if name in {*self.limits, self.objective, self.measurer.quality_row}
        ]

    def prices(self) -> list[evidence.Price]:
        """Shadow prices of the limits; none where the relaxation gave none."""
        return [
            evidence.Price(
                row=name,
                unit=_unit(name),
                price=self.stand.prices[row] * self._per(name, limit) * self._worth(),
                objective=self.objective,
                objective_unit=_unit(self.objective),
                used=self.predicted[name] / limit if limit else 1.0,
            )
            for name, limit in self.limits.items()
            if (row := self.measurer.solver_name(name)) in self.stand.prices
        ]

    def _per(self, name: str, limit: float) -> float:
        """By how much the solver's limit grows with the budget's: relative errors are squared."""
        quality = self.measurer.compiler.quality
        if name != self.measurer.quality_row:
            return 1.0
        step = 1e-6 * limit
        return (quality.additive(limit + step) - quality.additive(limit)) / step

    def _worth(self) -> float:
        """What one of the solver's units of the objective is in those of the row, as predicted:
        so are the costs that the reasons of sites compare."""
        value = self.stand.rows(self.stand.choice)[self.stand.main]
        if not value:
            return 0.0
        return self._per_error(value) if self.stand.main == "error" else 1.0

    def _per_error(self, value: float) -> float:
        quality, step = self.measurer.compiler.quality, 1e-6 * value
        return (quality.measured(value) - quality.measured(value - step)) / step


def _known(row: RowResult | None, predicted: float) -> float:
    values = () if row is None else (row.measured, row.predicted)
    return next((value for value in values if value is not None), predicted)


def looser(names: _Names) -> list[evidence.Looser]:
    """Each limited row given more, while the time for it lasts."""
    compiler, stand = names.measurer.compiler, names.stand
    end = min(time.monotonic() + OUTLOOK_SECONDS, compiler.request.deadline)
    found: list[evidence.Looser] = []
    for name, limit in names.limits.items():
        row = names.measurer.solver_name(name)
        if row not in stand.search.limits.rows:
            continue
        for factor in FACTORS:
            rows = None
            if time.monotonic() + SOLVE_SECONDS <= end:
                scale = compiler.quality.additive(factor) if row == "error" else factor
                rows = loosened(stand, row, scale, time_limit=SOLVE_SECONDS)
            results = [] if rows is None else names.then(rows)
            found.append(
                evidence.Looser(
                    row=name,
                    limit=limit * factor,
                    unit=_unit(name),
                    rows=results,
                    solved=rows is not None,
                )
            )
    return found


def untried(compiler: Compiler) -> list[str]:
    """Rewrites for the families of this model that are tried only where `rewrites=` names them."""
    families = {site.family for site in compiler.captured.sites}
    loaded = {rewrite.name for rewrite in compiler.rewrites}
    kind = compiler.workloads[0].kind
    return sorted(
        rewrite.name
        for rewrite in passes.load(sorted(passes.ON_REQUEST - loaded))
        if rewrite.family in families and kind in rewrite.workloads
    )


def judge(measurer: Measurer, decisions: Iterable[Decision]) -> None:
    """Mark alternatives that err more, alone, than the budget allows of the whole model."""
    name = measurer.quality_row
    limit = measurer.compiler.request.budget.absolute(measurer.baseline).get(name)
    if limit is None:
        return
    quality, unit = measurer.compiler.quality, _unit(name)
    most = quality.additive(limit)
    for other in (other for decision in decisions for other in decision.alternatives):
        if other.error is not None and other.error > most:
            other.feasible = False
            own, whole = (format_value(quality.measured(e), unit) for e in (other.error, most))
            other.reason = f"errs {own} alone, and the whole budget is {whole}"


def graph_blocks(compiler: Compiler, editor: GraphEditor) -> list[evidence.Block]:
    """The graph before and after, folded."""
    captured = compiler.captured
    # Where a linear layer is also the end of a larger intermediate, it is shown as the former.
    sites = sorted(captured.sites, key=lambda site: site.family == "activation", reverse=True)
    return blocks(
        Graphs(
            captured.graph.graph,
            editor.graph.graph,
            sites={site.node: site.op for site in sites},
            now={site.node: editor.node(site).name for site in sites},
            sizes={name: dim.role or name for name, dim in captured.symbols.items()},
        )
    )


def sources(module: Optimized, decisions: Iterable[Decision]) -> list[evidence.Generated]:
    """The generated class around each rewritten site: the innermost module that has one."""
    found: dict[str, list[str]] = {}
    for decision in decisions:
        place = _owner(decision.key, module.classes)
        if decision.rewritten and place is not None:
            modules = found.setdefault(module.classes[place], [])
            if place not in modules:
                modules.append(place)
    texts = {name: _class_text(module.source, name) for name in found}
    return [evidence.Generated(modules=found[name], text=texts[name]) for name in found]


def _owner(key: str, classes: Mapping[str, str]) -> str | None:
    parts = key.partition("/kv=")[0].partition("#")[0].split(".")
    names: Sequence[str] = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
    return next((name for name in names if name in classes), None)


def _class_text(source: str, name: str) -> str:
    parts = source.split("\n\n\nclass ")
    return next(f"class {p.rstrip()}" for p in parts[1:] if p.startswith((f"{name}(", f"{name}:")))
