"""`fxopt diff` and `fxopt report`: the commands that read plans."""

from __future__ import annotations

from typing import Any

from . import options as o
from .command import DIFFERENT, OK, Output, command
from .results import read_plan, rows_of


@command
def diff(before: o.PlanFile, after: o.PlanFile, output: Output) -> int:
    """Compare two plans; exit code 2 when they decide differently.

    fxopt diff plan.json small
    """
    found = read_plan(before).diff(read_plan(after))
    document = {
        "different": bool(found),
        "changed": [
            {"family": b.family, "key": b.key, "before": _decided(a), "after": _decided(b)}
            for a, b in found.changed
        ],
        "added": [{"family": d.family, "key": d.key} for d in found.added],
        "removed": [{"family": d.family, "key": d.key} for d in found.removed],
        "facts": [{"name": n, "before": a, "after": b} for n, a, b in found.facts],
    }
    output.show(found, document)
    return DIFFERENT if found else OK


@command
def report(plan: o.PlanFile, output: Output, html: o.Html = None) -> int:
    """Show a plan's budget: predicted against measured, row by row.

    fxopt report small --html plan.html
    """
    from fxopt.show.report import Report
    from fxopt.show.rows import limit_texts

    read = read_plan(plan)
    if html:
        read.to_html(html)
    shown = Report(read.totals, read.notes, limit_texts(read.budget))
    output.show(shown, {"rows": rows_of(read.totals), "notes": read.notes})
    return OK


def _decided(decision: Any) -> dict[str, Any]:
    return decision.model_dump(include={"rewrite", "version", "label", "parameters", "locked"})
