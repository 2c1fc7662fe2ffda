"""A plan as text: what is rewritten (`~`), kept (`=`), locked (`!`) and refused (`x`), and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from fxopt.ir.plan import Plan
from fxopt.ir.workload import Several, Workload

from . import binding
from .costs import saving
from .entries import Entry, by_family, entries, said_together, shown_together, summary
from .fold import fold_keys, groups
from .joint import JOINT
from .page import Page, has_colours, width
from .rows import budget_table, limit_texts, with_missing
from .summary import said


def render(plan: Plan, *, colours: bool | None = None, columns: int | None = None) -> str:
    """The plan as `print` shows it; colours and width of the terminal unless given."""
    page = Page(columns or width())
    _header(page, plan)
    for family, sites in by_family(entries(plan)).items():
        rewritten = sum(site.decision is not None and site.decision.rewritten for site in sites)
        what = "heads" if family == JOINT else "sites"
        page.add(f"{family}: {rewritten} of {len(sites)} {what} rewritten", "bold")
        listed = groups(sites, shown_together)
        everywhere = _everywhere(listed, plan)
        for text in everywhere:
            page.add(f"of all: {text}", indent=4)
        for equal in listed:
            _sites(page, equal, plan, everywhere)
        page.add()
    notes = [*(f"Note: {note}" for note in plan.said), *said(plan)]
    for note in notes:
        page.add(note)
    if notes:
        page.add()
    page.add(summary(plan), "bold")
    return page.render(has_colours() if colours is None else colours)


def _header(page: Page, plan: Plan) -> None:
    device = plan.hardware.get("name") or plan.hardware.get("device")
    where = (f" at {plan.at}" if plan.at else "") + (f" on {device}" if device else "")
    page.add(workload_text(plan.workload) + where, "bold")
    page.verbatim(budget_table(with_missing(plan.totals, plan.budget), limit_texts(plan.budget)))
    page.add(f"minimising {binding.objective(plan)} within these limits")
    page.add(binding.sentence(plan))
    page.add()


def workload_text(workload: Workload) -> str:
    if isinstance(workload, Several):
        return ", ".join(f"{name}: {workload_text(part)}" for name, part in workload.parts)
    sizes = [(f.name, getattr(workload, f.name)) for f in fields(workload) if f.name != "kind"]
    known = ", ".join(f"{name}={value}" for name, value in sizes if value is not None)
    return f"{type(workload).__name__}({known})"


def _everywhere(listed: Sequence[Sequence[Entry]], plan: Plan) -> list[str]:
    """What refused a rewrite at all sites of a family, where more than one line of it would say
    so."""
    refused = {f"{refusal.rewrite}: {refusal.reason}" for refusal in plan.refusals}
    first, *others = [said_together(equal) for equal in listed]
    return [t for t in first if others and t in refused and all(t in said for said in others)]


def _sites(page: Page, equal: Sequence[Entry], plan: Plan, everywhere: Sequence[str]) -> None:
    """The folded names, one a line, what they become behind the first, then costs and reasons but
    those that stand `everywhere`."""
    mark, what = equal[0].mark, equal[0].what
    first, *names = fold_keys(entry.key for entry in equal)
    fits = len(f"  {mark} {first}  {what}") <= page.columns
    page.marked(mark, f"{first}  {what}" if fits else first)
    for name in names:
        page.marked(mark, name)
    if not fits:
        page.add(what, indent=8)
    saved = saving([entry.decision for entry in equal if entry.decision], plan)
    if saved:
        page.add(saved, indent=8)
    for text in said_together(equal):
        if text not in everywhere:
            page.add(text, indent=8)
