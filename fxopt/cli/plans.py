"""`fxopt diff`, `fxopt report` and `fxopt explain`: the commands that read plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .command import DIFFERENT, OK, Output, command
from .results import read_plan, report_of

Markdown = Annotated[
    Path | None, typer.Option(help="Text to write, for a pull request.", show_default=False)
]
Memory = Annotated[
    Path | None,
    typer.Option(help="SVG to write: memory over a training step.", show_default=False),
]
Heads = Annotated[
    Path | None,
    typer.Option(help="SVG to write: what each attention head keeps.", show_default=False),
]
SiteName = Annotated[
    str, typer.Argument(help="Site, attention op, module, or re:pattern.", metavar="SITE")
]
FamilyName = Annotated[
    str | None, typer.Option("--family", help="Of the sites of one name.", show_default=False)
]


@command
def diff(before: o.PlanFile, after: o.PlanFile, output: Output, html: o.Html = None) -> int:
    """Compare two plans; exit code 2 when they decide differently.

    fxopt diff plan.json small --html diff.html
    """
    found = read_plan(before).diff(read_plan(after))
    if html:
        found.to_html(html)
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
    output.wrote(html)
    return DIFFERENT if found else OK


@command
def report(
    plan: o.PlanFile,
    output: Output,
    html: o.Html = None,
    markdown: Markdown = None,
    memory: Memory = None,
    heads: Heads = None,
) -> int:
    """Show a plan's budget: predicted against measured, row by row.

    fxopt report small --html plan.html --markdown plan.md
    """
    from fxopt.ir.store import write_text
    from fxopt.show.heads import svg
    from fxopt.show.report import Report
    from fxopt.show.rows import limit_texts

    read = read_plan(plan)
    if html:
        read.to_html(html)
    if markdown:
        write_text(markdown, read.to_markdown())
    written = limit_texts(read.budget)
    shown = Report(read.totals, read.said, written, read.memory, read.distilled)
    if memory:
        shown.to_svg(memory)
    if heads:
        write_text(heads, svg(read))
    output.show(shown, report_of(shown))
    output.wrote(html, markdown, memory, heads)
    return OK


@command
def explain(plan: o.PlanFile, site: SiteName, output: Output, family: FamilyName = None) -> int:
    """Say why a site is what it is, what else was possible there, and why not.

    A module stands for itself and the sites below it, an attention op for its heads.

    fxopt explain plan.json model.layers.3.self_attn
    """
    from fxopt.show.explain import matching

    read = read_plan(plan)
    text = read.explain(site, family)
    # of a head both decisions as the plan stores them, each with what is said of both
    sites = [
        {
            "family": decision.family if decision else entry.family,
            "key": entry.key,
            "state": entry.mark,
            "reasons": list(entry.reasons),
            "decision": json.loads(decision.model_dump_json()) if decision else None,
        }
        for entry in matching(read, site, family)
        for decision in entry.stored or [None]
    ]
    prices = [json.loads(price.model_dump_json()) for price in read.prices]
    output.show(text, {"sites": sites, "prices": prices})
    return OK


def _decided(decision: Any) -> dict[str, Any]:
    return decision.model_dump(include={"rewrite", "version", "label", "parameters", "locked"})
