"""A plan as Markdown for a pull request: tables of rows and of folded decisions, and the diff."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fxopt.ir.evidence import Block
from fxopt.ir.plan import Plan
from fxopt.ir.units import so_many

from . import binding, outlook, summary
from .entries import summary as summary_text
from .fold import fold_keys
from .rows import HEADS, cells, limit_texts, with_missing
from .summary import Line
from .text import workload_text

TITLES = {"rewritten": "Rewritten", "kept": "Kept", "refused": "Refused"}
SHOWN_LINES = 40
"""Folded lines of one kind; comments of GitHub end at 65,536 characters."""
DIFF_LINES = 150
# What has a meaning in Markdown or HTML, wherever it stands in a cell.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$@!&])")


def render(plan: Plan) -> str:
    """Rows, then what changed, why, and the graph's diff folded away."""
    texts = limit_texts(plan.budget)
    rows = [cells(row, texts) for row in with_missing(plan.totals, plan.budget)]
    device = plan.hardware.get("name") or plan.hardware.get("device")
    parts = [
        f"### {escape(summary_text(plan))}",
        escape(workload_text(plan.workload) + (f" on {device}" if device else ""))
        + f", minimising {escape(binding.objective(plan))} within the budget.",
        _table(["row", *HEADS[1:]], [[escape(cell) for cell in row] for row in rows], numbers=4),
        f"**What binds.** {escape(binding.sentence(plan))}",
        *_outlooks(plan),
        *(f"> Note: {escape(note)}" for note in plan.said),
        *map(escape, summary.said(plan)),
    ]
    for kind, lines in summary.lines(plan).items():
        if lines:
            parts.append(_lines(kind, lines))
    changed = [block for block in plan.blocks if any(line[0] != " " for line in block.lines)]
    if changed:
        parts.append(_folded("The graph before and after", _diff(changed)))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _lines(kind: str, lines: Sequence[Line]) -> str:
    head = ["", "sites", "is" if kind != "rewritten" else "becomes", "why"]
    rows = [
        [
            _code(line.mark),
            "<br>".join(map(_code, line.names)),
            escape(line.what),
            "<br>".join(map(escape, [", ".join(line.saving), *line.reasons])).removeprefix("<br>"),
        ]
        for line in lines[:SHOWN_LINES]
    ]
    if len(lines) > SHOWN_LINES:
        rows.append(["", f"and {len(lines) - SHOWN_LINES} more", "", ""])
    count = sum(line.count for line in lines)
    title = f"{TITLES[kind]}: {so_many(count, 'site')}"
    table = _table(head, rows)
    return f"**{title}**\n\n{table}" if kind == "rewritten" else _folded(title, table)


def _outlooks(plan: Plan) -> list[str]:
    outlooks, heads = outlook.outlooks(plan), outlook.outlook_heads(plan)
    if not heads:
        return []
    rows = [["as it is", *(escape(value) for _, value in heads)]]
    rows += [
        [f"{escape(o.row)} × {o.factor.removesuffix('x')}"]
        + (
            [escape(f"{then} ({change})") for _, _, then, change in o.changes]
            or ["not solved in time", *[""] * (len(heads) - 1)]
        )
        for o in outlooks
    ]
    names = [escape(name) for name, _ in heads]
    table = _table(["if this limit grew", *names], rows, numbers=len(names))
    return [_folded("What a looser budget would buy", table)]


def _diff(blocks: Iterable[Block]) -> str:
    lines: list[str] = []
    for block in blocks:
        lines.append(f"@@ {', '.join(fold_keys(block.modules)) or 'outside the layers'} @@")
        lines += [line for line in block.lines if line[0] != " "]
    if len(lines) > DIFF_LINES:
        lines = [*lines[:DIFF_LINES], f"@@ and {len(lines) - DIFF_LINES} more lines @@"]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", "\n".join(lines))), default=0))
    return "\n".join([f"{fence}diff", *(" ".join(line.splitlines()) for line in lines), fence])


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n\n{text}\n\n</details>"


def _code(text: str) -> str:
    """Inline code, which no text of it can end; `|` would end a table's cell even there."""
    text = " ".join(text.split()).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", text)), default=0)
    return f"`{text}`" if not longest else f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table whose first `numbers` columns after the first stand to the right."""
    marks = ["---", *["---:"] * numbers, *["---"] * (len(head) - numbers - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, marks, *rows))
