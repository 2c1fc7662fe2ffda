"""A plan, or the difference of two, as one self-contained page."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fxopt.ir.changes import PlanDiff
from fxopt.ir.decision import BY_HAND
from fxopt.ir.plan import Decision, Plan
from fxopt.ir.workload import scenarios

from . import binding, memory, outlook, summary
from .blocks import both_after
from .compact import Encoder, columns_of, rounded, to_script
from .costs import is_relative, is_training
from .entries import MARKS, Entry, entries, reasons_of
from .entries import summary as summary_text
from .heads import head_map, roles
from .joint import family_of, joined_diff
from .rows import cells
from .text import workload_text

HERE = Path(__file__).parent
SCRIPTS = (
    "data", "number", "table", "details", "tree", "layout", "graph", "scatter", "print", "main",
)  # fmt: skip
ROW = ("name", "unit", "limit", "before", "predicted", "measured")
DIFF_MARKS = {"~": "changed", "+": "added", "-": "removed"}
SHOWN_LINES = 30
"""Folded lines of one kind that are written out; the table of decisions has them all."""


def render(plan: Plan) -> str:
    """The page. It loads nothing, and no text of the plan can become part of its markup."""
    encoder = Encoder([call["name"] for call in _calls(plan)], plan)
    encoder.add(entries(plan))
    binds = binding.binding(plan)
    data = {
        "mode": "plan",
        "calls": _calls(plan),
        "blocks": encoder.blocks(plan.blocks),
        "sources": encoder.sources(plan.sources),
        "rows": columns_of(summary.rows(plan), ROW),
        "trials": [
            {"rows": columns_of(t.rows, ROW), "holds": t.holds, "taken": t.taken}
            for t in plan.trials
        ],
        "looser": [
            {"row": x.row, "limit": rounded(x.limit), "rows": columns_of(x.rows, ROW)}
            for x in plan.looser
        ],
        "binds": binds,
        "objective": binding.objective(plan),
        "unit": _error_unit(plan),
        "relative": is_relative(plan),
        "training": is_training(plan),
        "cpu": plan.hardware.get("kind") == "cpu",
    }
    return _page(
        data | encoder.encoded(),
        title=summary_text(plan),
        plan=plan,
        marks=MARKS,
        workload=workload_text(plan.workload),
        device=plan.hardware.get("name") or plan.hardware.get("device"),
        cards=summary.cards(plan),
        binding=binding.sentence(plan),
        objective=binding.objective(plan),
        notes=summary.general_notes(plan),
        said=summary.said_on_page(plan),
        beside=summary.beside(plan),
        defined=summary.defined(plan),
        tried=outlook.tried(plan),
        tried_heads=outlook.tried_heads(plan),
        quality=summary.QUALITY,
        outlooks=outlook.outlooks(plan),
        outlook_heads=outlook.outlook_heads(plan),
        letters=[letter(index) for index in range(len(plan.looser))],
        quotes=[(row, quoted) for row in binds if (quoted := _quote(plan, row))],
        at_sites=summary.at_sites(plan),
        at_sites_notes=summary.at_sites_notes(plan),
        lines=summary.lines(plan),
        heads=head_map(plan),
        roles=roles(plan),
        timeline=plan.memory and memory.drawing(plan.memory),
        timeline_said=memory.sentence(plan.memory) if plan.memory else "",
        policies=memory.policies(plan.memory) if plan.memory else ([], []),
        shown=SHOWN_LINES,
        by_hand=any(d.reason == BY_HAND for d in plan.decisions),
        diff=None,
    )


def letter(index: int) -> str:
    """What names an outlook in the plot: a, b, ... z, a1."""
    return chr(ord("a") + index % 26) + (str(index // 26) if index >= 26 else "")


def _quote(plan: Plan, row: str) -> str:
    quoted = binding.quote(plan, row)
    return quoted and f"{quoted} of {binding.objective(plan)}"


def _calls(plan: Plan) -> list[dict[str, Any]]:
    """The kinds of call that the workload makes, and how often it makes each."""
    return [{"name": call.name, "repeats": call.repeats} for call in scenarios(plan.workload)]


def render_diff(diff: PlanDiff) -> str:
    """The page of what changes from one plan to another."""
    diff = joined_diff(diff)
    plan = diff.plans[1] if diff.plans else None
    calls = _calls(plan) if plan else []
    encoder = Encoder([call["name"] for call in calls], plan)
    pairs: list[tuple[int, int]] = []
    listed: list[Entry] = []
    sides = [
        *((before, after) for before, after in diff.changed),
        *((None, after) for after in diff.added),
        *((before, None) for before in diff.removed),
    ]
    for side in sides:
        at: list[int] = []
        for decision in side:
            at.append(-1 if decision is None else len(listed))
            listed += [] if decision is None else [_entry(decision)]
        pairs.append((at[0], at[1]))
    encoder.add(listed)
    blocks = both_after(*(p.blocks for p in diff.plans)) if diff.plans else []
    data = {
        "mode": "diff",
        "pairs": pairs,
        "calls": calls,
        "blocks": encoder.blocks(blocks),
        "sources": {},
        "unit": _error_unit(plan) if plan else "",
        "relative": plan is not None and is_relative(plan),
        "objective": binding.objective(plan) if plan else "error",
        "training": plan is not None and is_training(plan),
        "cpu": plan is not None and plan.hardware.get("kind") == "cpu",
    }
    counts = f"{len(diff.changed)} changed, {len(diff.added)} added, {len(diff.removed)} removed"
    titles = zip(("first", "second"), diff.plans or (), strict=False)
    return _page(
        data | encoder.encoded(),
        title=f"Diff: {counts}" + ("" if diff else " (the plans decide the same)"),
        plan=None,
        marks=DIFF_MARKS,
        diff=diff,
        sums=summary.sums(diff),
        both=[(title, summary.cards(one)) for title, one in titles],
        totals=[[side and cells(side, {}) for side in rows] for rows in diff.totals],
        by_hand=False,
    )


def _entry(decision: Decision) -> Entry:
    mark = "!" if decision.locked else "~" if decision.rewritten else "="
    reasons = reasons_of(decision)
    return Entry(mark, decision.key, family_of(decision), decision.choice, reasons, decision)


def _error_unit(plan: Plan) -> str:
    """What errors are measured in."""
    return "nats" if binding.error_row(plan) in summary.ADDITIVE else ""


def _page(data: dict[str, Any], **context: Any) -> str:
    scripts = [_vendored(), _script()]
    style = (HERE / "web" / "style.css").read_text(encoding="utf-8") + memory.style()
    return (
        _environment()
        .get_template("plan.html.jinja")
        .render(
            data=to_script(data),
            scripts=scripts,
            style=style,
            script_hashes=" ".join(map(_source_hash, scripts)),
            style_hash=_source_hash(style),
            **context,
        )
    )


@cache
def _script() -> str:
    parts = [(HERE / "web" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return '(() => {\n"use strict";\n' + "\n".join(parts) + "})();\n"


@cache
def _vendored() -> str:
    """Dagre without the comment that would have developer tools look for a file beside it."""
    text = (HERE / "vendor" / "dagre.min.js").read_text(encoding="utf-8")
    return text.partition("//# sourceMappingURL")[0]


def _source_hash(text: str) -> str:
    """How a content security policy names the one inline text that may run."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE / "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
