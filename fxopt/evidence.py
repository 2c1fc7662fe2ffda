"""What a plan carries for its readers: trials, what more budget buys, graphs, generated code."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from .compiler import Compiler
from .decide.outlook import loosened
from .decide.search import Search, Trial
from .emit.editor import GraphEditor
from .hosted import Optimized
from .ir import evidence
from .ir.errors import RowResult
from .ir.plan import Decision
from .measure import UNITS, Measurer
from .show.blocks import Graphs, blocks

FACTORS = (1.25, 2.0)
"""By how much rows are loosened."""
SOLVE_SECONDS = 2.0
OUTLOOK_SECONDS = 10.0
"""Time for one solution, and for all of them."""


def trials(measurer: Measurer, search: Search, taken: Trial) -> list[evidence.Trial]:
    """Every choice that was measured, in order; what is minimised is among its rows."""
    made: list[evidence.Trial] = []
    for trial in search.trials:
        rows = measurer.rows(trial.predicted, _by_row(measurer, trial.measured))
        names = {measurer.solver_name(row.name) for row in rows}
        rows += [
            RowResult(name, None, value, None, _unit(name))
            for name, value in trial.predicted.items()
            if name not in names
        ]
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


def looser(measurer: Measurer, search: Search, taken: Trial) -> list[evidence.Looser]:
    """Each limited row given more, while the time for it lasts."""
    compiler = measurer.compiler
    end = min(time.monotonic() + OUTLOOK_SECONDS, compiler.request.deadline)
    now = _by_row(measurer, search.predict(taken.choice))
    limits = compiler.request.budget.absolute(measurer.baseline)
    found: list[evidence.Looser] = []
    for name, limit in limits.items():
        row, unit = measurer.solver_name(name), _unit(name)
        if row not in search.limits.rows:
            continue
        for factor in FACTORS:
            if time.monotonic() + SOLVE_SECONDS > end:
                return found
            scale = compiler.quality.additive(factor) if row == "error" else factor
            rows = loosened(search, taken.choice, row, scale, time_limit=SOLVE_SECONDS)
            if rows is None:
                continue
            then = _by_row(measurer, rows)
            results = [RowResult(n, limits.get(n), then[n], None, _unit(n), now[n]) for n in then]
            found.append(evidence.Looser(row=name, limit=limit * factor, unit=unit, rows=results))
    return found


def judge(measurer: Measurer, decisions: Iterable[Decision]) -> None:
    """Mark alternatives that err more, alone, than the budget allows of the whole model."""
    name = measurer.quality_row
    limit = measurer.compiler.request.budget.absolute(measurer.baseline).get(name)
    if limit is None:
        return
    most = measurer.compiler.quality.additive(limit)
    for other in (other for decision in decisions for other in decision.alternatives):
        if other.error is not None and other.error > most:
            other.feasible = False
            other.reason = f"errs by {other.error:.2e} alone, and the whole budget is {most:.2e}"


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
