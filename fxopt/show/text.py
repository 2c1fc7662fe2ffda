"""A plan as text: what is rewritten (`~`), kept (`=`), locked (`!`) and refused (`x`), and why."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields

from fxopt.ir.cost import Cost
from fxopt.ir.plan import Decision, Plan
from fxopt.ir.site import FAMILIES
from fxopt.ir.units import format_value
from fxopt.ir.workload import Workload

from .entries import Entry, by_family, entries, summary
from .fold import fold_keys, groups, merge_sentences, sentence_shape
from .page import Page, has_colours, width
from .rows import budget_table, limit_texts, with_missing

SAVED = {
    "weight_bytes": ("weights", "bytes"),
    "state_bytes": ("cache", "bytes"),
    "temporary_bytes": ("temporary", "bytes"),
    "seconds": ("time", "s"),
}


def render(plan: Plan, *, colours: bool | None = None, columns: int | None = None) -> str:
    """The plan as `print` shows it; colours and width of the terminal unless given."""
    page = Page(columns or width())
    _header(page, plan)
    for family, sites in by_family(entries(plan), FAMILIES).items():
        rewritten = sum(site.decision is not None and site.decision.rewritten for site in sites)
        page.add(f"{family}: {rewritten} of {len(sites)} sites rewritten", "bold")
        for equal in groups(sites, shown_together):
            _sites(page, equal)
        page.add()
    for note in plan.notes:
        page.add(f"Note: {note}")
    if plan.notes:
        page.add()
    page.add(summary(plan), "bold")
    return page.render(has_colours() if colours is None else colours)


def _header(page: Page, plan: Plan) -> None:
    device = plan.hardware.get("name") or plan.hardware.get("device")
    where = (f" at {plan.at}" if plan.at else "") + (f" on {device}" if device else "")
    page.add(workload_text(plan.workload) + where, "bold")
    page.verbatim(budget_table(with_missing(plan.totals, plan.budget), limit_texts(plan.budget)))
    page.add(f"minimising {plan.budget.objective} within these limits")
    page.add()


def workload_text(workload: Workload) -> str:
    sizes = [(f.name, getattr(workload, f.name)) for f in fields(workload) if f.name != "kind"]
    known = ", ".join(f"{name}={value}" for name, value in sizes if value is not None)
    return f"{type(workload).__name__}({known})"


def shown_together(entry: Entry) -> Hashable:
    """What is equal of sites that are listed as one."""
    parameters = tuple(sorted(entry.decision.parameters.items())) if entry.decision else ()
    return (entry.mark, entry.what, parameters, *map(sentence_shape, entry.reasons))


def _sites(page: Page, equal: Sequence[Entry]) -> None:
    """The folded names, one a line, what they become behind the first, then costs and reasons."""
    mark, what = equal[0].mark, equal[0].what
    first, *names = fold_keys(entry.key for entry in equal)
    fits = len(f"  {mark} {first}  {what}") <= page.columns
    page.marked(mark, f"{first}  {what}" if fits else first)
    for name in names:
        page.marked(mark, name)
    if not fits:
        page.add(what, indent=8)
    saved = saving([entry.decision for entry in equal if entry.decision])
    if saved:
        page.add(saved, indent=8)
    for reasons in zip(*(entry.reasons for entry in equal), strict=True):
        page.add(merge_sentences(reasons), indent=8)


def saving(decisions: Sequence[Decision]) -> str:
    """What rewritten sites cost before and after, and the error they add; "" when kept."""
    if not any(decision.rewritten for decision in decisions):
        return ""
    after = total(decisions, lambda decision: decision.cost)
    before = total(decisions, lambda decision: decision.kept)
    texts = [_change(name, before, after) for name in SAVED] if after else []
    errors = [decision.error for decision in decisions if decision.error is not None]
    if len(errors) == len(decisions):
        texts.append(f"error {sum(errors):.2g}")
    return ", ".join(text for text in texts if text)


def total(decisions: Sequence[Decision], of: Callable[[Decision], Cost | None]) -> Cost | None:
    """The sum of costs, None when one is unknown."""
    costs = [of(decision) for decision in decisions]
    known = [cost for cost in costs if cost is not None]
    return sum(known, Cost()) if len(known) == len(costs) else None


def _change(name: str, before: Cost | None, after: Cost | None) -> str:
    label, unit = SAVED[name]
    new = format_value(getattr(after, name), unit)
    if before is None:
        return f"{label} {new}" if getattr(after, name) else ""
    old = format_value(getattr(before, name), unit)
    return f"{label} {old} -> {new}" if old != new else ""
