"""What commands read and print: plans, and the rows of their budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import INFEASIBLE, OK, Output

if TYPE_CHECKING:
    from fxopt.ir.plan import Plan
    from fxopt.show.report import Report


def read_plan(path: Path) -> Plan:
    """The plan in a file, or in a folder that holds one."""
    from fxopt.ir.plan import Plan

    return Plan.load(path / "plan.json" if path.is_dir() else path)


def show_plan(made: Plan, output: Output) -> int:
    """Print a plan; INFEASIBLE when it is not predicted to keep its budget."""
    output.show(made, json.loads(made.model_dump_json()))
    over = [
        row
        for row in made.totals
        if row.limit is not None and row.predicted is not None and row.predicted > row.limit
    ]
    return INFEASIBLE if over else OK


def show_result(opt: Any, out: Path, output: Output) -> int:
    """Print what was made: the plan and its report, or the report's rows."""
    document = {"out": str(out), **report_of(opt.report)}
    output.show(f"{opt.plan}\n\n{opt.report}\n", document)
    output.wrote(out)
    return OK


def report_of(report: Report) -> dict[str, Any]:
    """A report as JSON: its rows, its notes, and what distillation did to each block."""
    distilled = [block.model_dump() for block in report.distilled]
    return {"rows": rows_of(report.rows), "notes": report.notes, "distilled": distilled}


def rows_of(rows: Any) -> list[dict[str, Any]]:
    """Rows of a budget as JSON."""
    return [{**vars(row), "excess": row.excess} for row in rows]
