"""Which rows of the budget stand in the way of a better plan, and what more of them would buy."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fxopt.ir.errors import RowResult
from fxopt.ir.evidence import Looser, Price
from fxopt.ir.plan import Plan
from fxopt.ir.units import format_value
from fxopt.ir.workload import Train

WORTH = 0.005
"""The least gain in what is minimised, as a share, for which a solved row is said to bind."""
BINDS = 1e-4
"""The same for a limit that grows by its own size at its shadow price."""
FULL = 0.9
"""The share of its limit from which a row of which nothing else is known may bind."""
STEP = 0.05
"""The share of a limit that a price is quoted for, about."""


def objective(plan: Plan) -> str:
    """The name of the row that is minimised; of training steps that hold, the fastest is taken."""
    if isinstance(plan.workload, Train):
        return "latency"
    name = plan.budget.objective
    return error_row(plan) if name == "error" else name


def error_row(plan: Plan) -> str:
    """The name of the quality row: of a budget that has none, what was measured anyway, if any."""
    known = {row.name for row in plan.totals}
    names = (n for n in ("kl", "relative_error", "loss_increase") if n in known)
    return plan.budget.quality or next(names, "error")


def used(row: RowResult) -> float | None:
    """The share of its limit that a row takes, as measured or else as predicted."""
    value = row.predicted if row.measured is None else row.measured
    if row.limit is None or value is None:
        return None
    return value / row.limit if row.limit else (0.0 if value <= 0 else float("inf"))


def gains(plan: Plan) -> dict[str, float]:
    """By row that was solved again with more of it: the most that this lowers what is minimised,
    as a share."""
    return bought(plan.looser, objective(plan))


def bought(outlooks: Iterable[Looser], main: str) -> dict[str, float]:
    """The same of outlooks where `main` is minimised."""
    found: dict[str, float] = {}
    for looser in outlooks:
        row = next((r for r in looser.rows if r.name == main), None)
        if looser.solved and row is not None and row.before and row.predicted is not None:
            gain = 1 - row.predicted / row.before
            found[looser.row] = max(found.get(looser.row, 0.0), gain)
    return found


def binding(plan: Plan) -> list[str]:
    """The rows that stand in the way of a better plan, that which costs most first.

    By shadow price, but for rows that were proved to buy nothing; where a plan has no prices, by
    what solving again found, and by how full the other rows are.
    """
    known = gains(plan)
    if plan.prices:
        worth = {price.row: _elasticity(plan, price) for price in plan.prices}
        found = [n for n, share in worth.items() if share > BINDS and known.get(n, 1.0) >= WORTH]
        return sorted(found, key=lambda name: -worth[name])
    found = sorted((n for n in known if known[n] >= WORTH), key=lambda name: -known[name])
    shares = {row.name: used(row) or 0.0 for row in plan.totals if row.name not in known}
    full = [name for name, share in shares.items() if share > FULL]
    return found + sorted(full, key=lambda name: -shares[name])


def _elasticity(plan: Plan, price: Price) -> float:
    """The share of what is minimised that a limit as large again would buy at this price."""
    rows = _rows(plan)
    limit = rows[price.row].limit if price.row in rows else None
    now = _value(rows.get(price.objective))
    if not limit or not now:
        return math.inf if price.price > 0 else 0.0
    return price.price * limit / now


def _rows(plan: Plan) -> dict[str, RowResult]:
    """The totals, and what is minimised as the trial that was taken knows it."""
    taken = [row for trial in plan.trials if trial.taken for row in trial.rows]
    return {row.name: row for row in (*taken, *plan.totals)}


def _value(row: RowResult | None) -> float | None:
    return None if row is None else row.predicted if row.measured is None else row.measured


def quote(plan: Plan, row: str) -> str:
    """What a round amount more of a row would buy: "500 KiB more would buy about 16 ms"."""
    price = next((p for p in plan.prices if p.row == row and p.price > 0), None)
    limit = next((r.limit for r in plan.totals if r.name == row), None)
    if price is None or not limit:
        return ""
    step = _round(limit * STEP, price.unit)
    buys = format_value(price.price * step, price.objective_unit)
    return f"{format_value(step, price.unit)} more would buy about {buys}"


def _round(value: float, unit: str) -> float:
    """The largest 1, 2 or 5 times a power of ten, in the unit that suits it, below `value`."""
    scale = 1.0
    while unit == "bytes" and value / scale >= 1024:
        scale *= 1024
    power = 10.0 ** math.floor(math.log10(value / scale))
    return max(n * power for n in (1, 2, 5) if n * power <= value / scale * (1 + 1e-9)) * scale


def sentence(plan: Plan) -> str:
    """Which rows bind, by how much, and what is known of the others."""
    exceeded = [row.name for row in plan.totals if row.excess > 0]
    if exceeded:
        return f"{' and '.join(exceeded)} could not be kept: no plan was found that holds."
    limited = [row for row in plan.totals if row.limit is not None]
    if not limited:
        return "No row has a limit, so none binds."
    rows = {row.name: row for row in limited}
    bound = [name for name in binding(plan) if name in rows]
    texts = [_bound(plan, rows[name]) for name in bound]
    rest = [f"{row.name}{_free(plan, row)}" for row in limited if row.name not in bound]
    if not bound:
        proved = {row.name for row in limited} <= set(gains(plan))
        little = "next to " if any(gain > BINDS for gain in gains(plan).values()) else ""
        how = f"more of any row buys {little}nothing" if proved else "every row has room left"
        return f"No row binds: {how}."
    return "; ".join(texts) + ("." if not rest else f". Not binding: {', '.join(rest)}.")


def _bound(plan: Plan, row: RowResult) -> str:
    price = next((p for p in plan.prices if p.row == row.name), None)
    share, text = used(row), f"{row.name} binds"
    if share is not None:
        text += f", {share:.1%} of its limit used"
    if share is not None and price is not None and abs(price.used - share) > 0.02:
        text += f" ({price.used:.1%} as the solver predicted it)"
    if quoted := quote(plan, row.name):
        text += f": {quoted} of {objective(plan)}"
    elif gain := gains(plan).get(row.name):
        text += f": with more of it, {objective(plan)} would fall by up to {gain:.0%}"
    return text


def _free(plan: Plan, row: RowResult) -> str:
    share = used(row)
    text = "" if share is None else f" uses {share:.0%}"
    found = gains(plan)
    if row.name not in found:
        return text
    return text + f", more of it buys {'next to ' if found[row.name] > BINDS else ''}nothing"
