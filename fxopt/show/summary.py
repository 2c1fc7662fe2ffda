"""What a page says before its tables: rows against limits, what binds, what more would buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.ir.cost import Cost
from fxopt.ir.errors import RowResult
from fxopt.ir.evidence import Looser
from fxopt.ir.plan import Decision, Plan
from fxopt.ir.site import FAMILIES
from fxopt.ir.units import format_value

from .entries import Entry, counted, entries
from .fold import fold_keys, groups, merge_sentences
from .rows import cells, limit_texts, with_missing
from .text import SAVED, saving, shown_together, total

WORTH = 0.005
"""The least gain in what is minimised for which a row is said to bind."""


@dataclass(frozen=True)
class Card:
    """One row of the budget. `share` is the part of the limit that is used, None without one."""

    row: RowResult
    limit: str
    before: str
    predicted: str
    measured: str
    verdict: str
    share: float | None
    binds: bool
    note: str = ""


@dataclass(frozen=True)
class Line:
    """Sites that are decided alike: folded names, how many they are, and what is said of them."""

    mark: str
    names: list[str]
    count: int
    family: str
    what: str
    saving: list[str]
    reasons: list[str]
    keys: list[str]


def used(row: RowResult) -> float | None:
    """The share of its limit that a row takes, as measured or else as predicted."""
    value = row.predicted if row.measured is None else row.measured
    if row.limit is None or value is None:
        return None
    return value / row.limit if row.limit else (0.0 if value <= 0 else float("inf"))


def gains(plan: Plan) -> dict[str, float]:
    """By row: the most that loosening it lowers what is minimised, as a share; empty: unknown."""
    found: dict[str, float] = {}
    for looser in plan.looser:
        row = next((r for r in looser.rows if r.name == objective(plan)), None)
        if row is not None and row.before and row.predicted is not None:
            gain = 1 - row.predicted / row.before
            found[looser.row] = max(found.get(looser.row, 0.0), gain)
    return found


def objective(plan: Plan) -> str:
    """The name of the row that is minimised."""
    name = plan.budget.objective
    return (plan.budget.quality or "kl") if name == "error" else name


def binding(plan: Plan) -> list[str]:
    """The rows that stand in the way of a better plan, that which costs most first.

    Known from solving again with looser rows; else the row that is used most, if nearly full.
    """
    bought = {name: gain for name, gain in gains(plan).items() if gain >= WORTH}
    if plan.looser:
        return sorted(bought, key=lambda name: -bought[name])
    shares = {row.name: share for row in plan.totals if (share := used(row)) is not None}
    return (
        [max(shares, key=lambda name: shares[name])]
        if shares and max(shares.values()) > 0.9
        else []
    )


def cards(plan: Plan) -> list[Card]:
    texts, binds = limit_texts(plan.budget), binding(plan)
    made: list[Card] = []
    for row in with_missing(plan.totals, plan.budget):
        _, limit, before, predicted, measured, verdict = cells(row, texts)
        note = "before: keys and values in 16 bits, as budgets count them"
        made.append(
            Card(
                row, limit, before, predicted, measured, verdict, used(row),
                row.name in binds, note if row.name == "kv_cache" else "",
            )
        )  # fmt: skip
    return made


def binding_sentence(plan: Plan) -> str:
    """Which row binds, and by what one knows."""
    rows = {row.name: row for row in plan.totals}
    bound, bought = binding(plan), gains(plan)
    exceeded = [row.name for row in plan.totals if row.excess > 0]
    if exceeded:
        return f"{' and '.join(exceeded)} could not be kept: no plan was found that holds."
    if not any(row.limit is not None for row in plan.totals):
        return "No row has a limit, so none binds."
    if not bound:
        how = "more of any row buys nothing" if plan.looser else "every row has room left"
        return f"No row binds: {how}."
    texts: list[str] = []
    for name in bound:
        share = used(rows[name]) if name in rows else None
        text = f"{name} binds" + (f", {share:.1%} of its limit used" if share is not None else "")
        if name in bought:
            text += f": with more of it, {objective(plan)} would fall by up to {bought[name]:.0%}"
        texts.append(text)
    others = [row for row in plan.totals if row.limit is not None and row.name not in bound]
    rest = [f"{row.name} uses {share:.0%}" for row in others if (share := used(row)) is not None]
    return "; ".join(texts) + ("." if not rest else f". Not binding: {', '.join(rest)}.")


@dataclass(frozen=True)
class Outlook:
    """One looser limit: what is asked, and each row now and then."""

    row: str
    factor: str
    limit: str
    changes: list[tuple[str, str, str, str]]


def outlooks(plan: Plan) -> list[Outlook]:
    limits = {row.name: row.limit for row in plan.totals}
    return [_outlook(looser, limits.get(looser.row)) for looser in plan.looser]


def _outlook(looser: Looser, limit: float | None) -> Outlook:
    changes = [
        (
            row.name,
            format_value(row.before, row.unit),
            format_value(row.predicted, row.unit),
            _change(row.before, row.predicted),
        )
        for row in looser.rows
    ]
    factor = f"{looser.limit / limit:.3g}x" if limit else ""
    old = format_value(limit, looser.unit)
    return Outlook(
        looser.row, factor, f"{old} → {format_value(looser.limit, looser.unit)}", changes
    )


def at_sites(plan: Plan) -> list[tuple[str, str, str, str]]:
    """What the sites take before and after by the plan's own costs: name, before, after, change."""
    decisions = counted(plan.decisions)
    before = total(decisions, lambda decision: decision.kept)
    after: Cost | None = total(decisions, lambda decision: decision.cost)
    if before is None or after is None:
        return []
    lines: list[tuple[str, str, str, str]] = []
    for name, (label, unit) in SAVED.items():
        old, new = getattr(before, name), getattr(after, name)
        if (old or new) and name != "temporary_bytes":
            change = _change(old, new)
            lines.append((label, format_value(old, unit), format_value(new, unit), change))
    return lines


def _change(before: float | None, after: float | None) -> str:
    """By how much a quantity grew, as a share of what it was."""
    if before is None or after is None:
        return ""
    if not before:
        return "same" if after == before else ""
    share = after / before - 1
    return "same" if abs(share) < WORTH else f"{share:+.0%}".replace("-", "−")


def lines(plan: Plan) -> dict[str, list[Line]]:
    """The folded decisions by what happened: "rewritten", "kept", "refused"."""
    found: dict[str, list[Line]] = {"rewritten": [], "kept": [], "refused": []}
    order = {family: index for index, family in enumerate(FAMILIES)}
    sites = sorted(entries(plan), key=lambda entry: order[entry.family])
    for equal in groups(sites, lambda entry: (entry.family, shown_together(entry))):
        found[_kind(equal[0])].append(_line(equal))
    return found


def _kind(entry: Entry) -> str:
    if entry.mark == "x":
        return "refused"
    return "rewritten" if entry.decision is not None and entry.decision.rewritten else "kept"


def _line(equal: Sequence[Entry]) -> Line:
    first = equal[0]
    decisions: list[Decision] = [entry.decision for entry in equal if entry.decision]
    return Line(
        mark=first.mark,
        names=fold_keys(entry.key for entry in equal),
        count=len(equal),
        family=first.family,
        what=first.what,
        saving=[part.replace("->", "→") for part in saving(decisions).split(", ") if part],
        reasons=[merge_sentences(texts) for texts in zip(*(e.reasons for e in equal), strict=True)],
        keys=[entry.key for entry in equal],
    )
