"""The report of a verified module: predicted against measured, row by row of the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fxopt.ir.errors import PlanError, RowResult
from fxopt.ir.evidence import Distilled, Memory
from fxopt.ir.store import write_text
from fxopt.ir.units import format_value

from . import memory
from .page import Page, has_colours, width
from .rows import HEADS, cells, deviation, table

DISTILLED = ["distilled", "error before", "after", "steps", ""]


@dataclass
class Report:
    """What was allowed, predicted and measured. `written` holds limits as the user wrote them;
    `distilled` is what training did to each block."""

    rows: list[RowResult]
    notes: list[str] = field(default_factory=list[str])
    written: Mapping[str, str] = field(default_factory=dict[str, str])
    memory: Memory | None = None
    distilled: list[Distilled] = field(default_factory=list[Distilled])

    @property
    def kept(self) -> bool:
        """Whether every row that has a limit was measured and keeps it."""
        limited = [row for row in self.rows if row.limit is not None]
        return all(row.measured is not None and row.excess <= 0 for row in limited)

    def to_svg(self, path: str | Path) -> Path:
        """Draw who holds memory over a training step; PlanError where the plan does not tell."""
        if self.memory is None:
            raise PlanError(
                "the plan holds no memory over time, which plans of training steps alone do: make "
                "it with workload=fxopt.Train(...), again where an earlier fxopt made it"
            )
        return write_text(Path(path), memory.svg(self.memory))

    def __str__(self) -> str:
        return render(self)


def render(report: Report, *, colours: bool | None = None, columns: int | None = None) -> str:
    page = Page(columns or width())
    if latency := _latency(report):
        page.add(latency)
    heads = [*HEADS[:5], "off by", HEADS[5]]
    lines = [cells(row, report.written) for row in report.rows]
    offs = [deviation(row) for row in report.rows]
    page.verbatim(
        table(heads, [[*line[:5], off, line[5]] for line, off in zip(lines, offs, strict=True)])
    )
    if report.memory is not None:
        page.add()
        page.add(memory.sentence(report.memory))
        page.verbatim(table(*memory.policies(report.memory)))
        page.add()
    if report.distilled:
        page.add()
        page.verbatim(table(DISTILLED, [_trained(block) for block in report.distilled]))
        page.add()
    for note in report.notes:
        page.add(f"Note: {note}")
    return page.render(has_colours() if colours is None else colours)


def _latency(report: Report) -> str:
    """How much faster or slower the result is than the original, where that was measured."""
    row = next((row for row in report.rows if row.name == "latency"), None)
    if row is None or not row.before or row.measured is None:
        return ""
    now, before = (format_value(value, row.unit) for value in (row.measured, row.before))
    ratio = f"{row.measured / row.before:.2f}x"
    return f"Measured latency: {ratio} of the original's, {now} against {before}"


def _trained(block: Distilled) -> list[str]:
    return [block.block, f"{block.before:.3g}", f"{block.after:.3g}", str(block.steps), ""]
