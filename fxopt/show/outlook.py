"""What was tried on the way to a plan, and what a looser budget would buy, as texts."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.ir.errors import RowResult
from fxopt.ir.evidence import Looser
from fxopt.ir.plan import Plan
from fxopt.ir.units import format_value

from .binding import objective
from .costs import change


@dataclass(frozen=True)
class Outlook:
    """One looser limit: what is asked, and each row now and then; `changes` is empty where the
    solver did not find out in time."""

    row: str
    factor: str
    limit: str
    changes: list[tuple[str, str, str, str]]


def outlooks(plan: Plan) -> list[Outlook]:
    """What each looser limit would buy; empty when nothing was solved again."""
    limits = {row.name: row.limit for row in plan.totals}
    return [_outlook(looser, limits.get(looser.row)) for looser in plan.looser]


def outlook_heads(plan: Plan) -> list[tuple[str, str]]:
    """The rows that outlooks tell of, each with its value as it is."""
    rows = next((looser.rows for looser in plan.looser if looser.rows), [])
    return [(row.name, format_value(row.before, row.unit)) for row in rows]


def _outlook(looser: Looser, limit: float | None) -> Outlook:
    changes = [
        (
            row.name,
            format_value(row.before, row.unit),
            format_value(row.predicted, row.unit),
            change(row.before, row.predicted),
        )
        for row in looser.rows
    ]
    factor = f"{looser.limit / limit:.3g}x" if limit else ""
    old = format_value(limit, looser.unit)
    return Outlook(
        looser.row,
        factor,
        f"{old} → {format_value(looser.limit, looser.unit)}",
        changes if looser.solved else [],
    )


@dataclass(frozen=True)
class Tried:
    """A choice that the search measured: `values` are those of `tried_heads`."""

    number: int
    values: list[str]
    verdict: str
    holds: bool
    taken: bool


def tried_heads(plan: Plan) -> list[str]:
    """The rows that the trials tell of: what is minimised, then those with a limit."""
    rows = plan.trials[0].rows if plan.trials else []
    limited = [row.name for row in rows if row.limit is not None]
    return list(dict.fromkeys((objective(plan), *limited)))


def tried(plan: Plan) -> list[Tried]:
    """Every choice that was measured, in order; what was not measured says so."""
    made: list[Tried] = []
    for number, trial in enumerate(plan.trials, 1):
        rows = {row.name: row for row in trial.rows}
        over = [row.name for row in trial.rows if row.excess > 0]
        verdict = "holds" if trial.holds else f"{' and '.join(over) or 'a row'} over the limit"
        values = [_tried(rows.get(name)) for name in tried_heads(plan)]
        made.append(Tried(number, values, verdict, trial.holds, trial.taken))
    return made


def _tried(row: RowResult | None) -> str:
    if row is None:
        return "-"
    if row.measured is None:
        return f"{format_value(row.predicted, row.unit)} predicted"
    return format_value(row.measured, row.unit)
