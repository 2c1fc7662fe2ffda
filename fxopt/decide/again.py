"""A plan decided again from its own costs and errors: locked sites stay, nothing is scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..ir.budget import Budget
from ..ir.cost import Cost
from ..ir.decision import BY_HAND, KEEP, Alternative, Decision
from ..ir.errors import PlanError, RowResult
from ..ir.plan import Plan
from .quality import QUALITIES, Quality
from .solve import Group, Option, Problem, Row, nearest, solve, total

COSTS = ("latency", "weights", "kv_cache", "memory")


def solve_again(plan: Plan, budget: Budget | None = None, *, time_limit: float = 10.0) -> Plan:
    """Decide the sites of `plan` that are not locked again, under `budget` or its own.

    Costs and errors are those in the plan, errors scaled to what was measured of it as a whole;
    attention and cache of one head are taken to add up. What comes back is a prediction: realise
    it with `fxopt.apply`, measure it with `fxopt.verify`. A budget that no choice keeps gives the
    nearest one, and a note that says so. PlanError where the plan cannot tell.
    """
    budget = budget or plan.budget
    limits = _limits(plan, budget)
    columns, exclusive = _apart(plan)
    constants = _constants(plan, limits)
    problem = Problem(
        tuple(
            Group(d.key, tuple(Option(c.label, _amounts(c, plan)) for c in options))
            for d, options in zip(plan.decisions, columns, strict=True)
        ),
        tuple(Row(name, limit, constants[name]) for name, limit in limits.items()),
        _objective(plan, budget),
        exclusive=exclusive,
    )
    found = solve(problem, time_limit=time_limit)
    choice = found.choice if found else nearest(problem, time_limit=time_limit)
    made = _chosen(plan, columns, choice)
    made.budget = budget
    made.totals = _totals(plan, budget, limits, constants, problem, choice)
    made.notes = ["decided again from the plan's own costs and errors: not realised, not measured"]
    if found is None:
        made.notes.append("no choice was found that keeps every row; this is the nearest")
    return made


def _columns(decision: Decision) -> list[Alternative]:
    """What can stand at a site: first what keeps it, where it may be kept; locked: one."""
    mine = Alternative(
        rewrite=decision.rewrite, label=decision.label, parameters=decision.parameters,
        version=decision.version, cost=decision.cost, error=decision.error,
    )  # fmt: skip
    if decision.locked:
        return [mine]
    others = [a for a in decision.alternatives if a.error is not None and math.isfinite(a.error)]
    return sorted([mine, *others], key=lambda a: a.rewrite != KEEP)


def _amounts(option: Alternative, plan: Plan) -> dict[str, float]:
    error = max(option.error or 0.0, 0.0) * _scale(plan)
    return {"error": error, **{name: _of(option.cost, name) for name in COSTS}}


def _of(cost: Cost, row: str) -> float:
    """What a cost adds to a row."""
    match row:
        case "latency":
            return cost.seconds
        case "weights":
            return float(cost.weight_bytes)
        case "kv_cache":
            return float(cost.state_bytes)
        case _:
            return float(cost.weight_bytes + cost.state_bytes)


def _quality(plan: Plan) -> Quality:
    row = next((r.name for r in plan.totals if r.name in QUALITIES), plan.budget.quality or "kl")
    return Quality(QUALITIES[row], per_position=False)


def _scale(plan: Plan) -> float:
    """By how much the whole plan errs more than its sites added up."""
    alone = sum(max(d.error or 0.0, 0.0) for d in plan.decisions if d.rewritten)
    row = next((r for r in plan.totals if r.name in QUALITIES), None)
    value = None if row is None else row.predicted if row.measured is None else row.measured
    if value is None or alone <= 0:
        return 1.0
    return _quality(plan).additive(value) / alone


def _limits(plan: Plan, budget: Budget) -> dict[str, float]:
    """The rows of `budget` in the solver's terms."""
    for name in budget.rows():
        if name.startswith("latency.") or name == "activations":
            raise PlanError(
                f"Budget.{name}: a plan alone cannot tell it; make a plan with fxopt.plan"
            )
    if budget.quality and plan.totals and budget.quality not in {r.name for r in plan.totals}:
        raise PlanError(
            f"Budget.{budget.quality}: the errors of this plan are of another quality row; make a "
            "plan with fxopt.plan"
        )
    try:
        rows = budget.absolute(plan.baseline)
    except ValueError as error:
        raise PlanError(str(error)) from None
    if budget.quality:
        rows["error"] = _quality(plan).additive(rows.pop(budget.quality))
    return rows


def _constants(plan: Plan, rows: Mapping[str, float]) -> dict[str, float]:
    """What the model takes in each row beyond its sites.

    Totals are of the plan as it was solved: once a decision was chosen by hand they tell nothing
    of the sites as they are now, and what the original measured stands in.
    """
    totals = {row.name: row for row in plan.totals}
    edited = any(decision.reason == BY_HAND for decision in plan.decisions)
    kept = [decision.kept for decision in plan.decisions]
    found: dict[str, float] = {}
    for name in rows:
        if name == "error":
            found[name] = 0.0
            continue
        before = plan.baseline.get("kv_cache_now" if name == "kv_cache" else name)
        if edited and before is not None and None not in kept:
            sites = sum(_of(cost, name) for cost in kept if cost is not None)
            found[name] = before - sites
            continue
        row = totals.get(name)
        value = None if row is None else row.predicted if row.measured is None else row.measured
        if value is None:
            raise PlanError(
                f"Budget.{name}: this plan was made without that row; make a plan with fxopt.plan"
            )
        taken = [_amounts(_columns(d)[_now(d)], plan)[name] for d in plan.decisions]
        found[name] = value - sum(taken)
    return found


def _now(decision: Decision) -> int:
    """Which of a decision's columns it is."""
    mine = (decision.rewrite, decision.label)
    return [(c.rewrite, c.label) for c in _columns(decision)].index(mine)


def _objective(plan: Plan, budget: Budget) -> dict[str, float]:
    """One main row, and another to break ties, each as a share of what it is."""
    sums = {name: sum(_amounts(c, plan)[name] for d in plan.decisions for c in [_columns(d)[0]])
            for name in ("latency", "memory")}  # fmt: skip
    scale = {name: 1 / max(value, 1e-9) for name, value in sums.items()}
    match budget.objective:
        case "error":
            return {"error": 1.0, "latency": 1e-9 * scale["latency"]}
        case "latency":
            return {"latency": scale["latency"], "memory": 1e-3 * scale["memory"]}
        case "memory":
            return {"memory": scale["memory"], "latency": 1e-3 * scale["latency"]}


def _apart(plan: Plan) -> tuple[list[list[Alternative]], tuple[tuple[int, ...], ...]]:
    """The columns of each decision, and those of which at most one may rewrite anything: a linear
    and the groups that it is in. What is locked keeps the others as they are."""
    columns = [_columns(decision) for decision in plan.decisions]
    changing: dict[str, list[int]] = {}
    for g, decision in enumerate(plan.decisions):
        if decision.family == "linear":
            for key in decision.members or [decision.key]:
                changing.setdefault(key, []).append(g)
    exclusive: list[tuple[int, ...]] = []
    for together in changing.values():
        fixed = [g for g in together if columns[g][0].rewrite != KEEP]
        if fixed:
            for g in set(together) - set(fixed):
                columns[g] = columns[g][:1]
        elif len(together) > 1:
            exclusive.append(tuple(together))
    return columns, tuple(dict.fromkeys(exclusive))


def _chosen(plan: Plan, columns: Sequence[Sequence[Alternative]], choice: Sequence[int]) -> Plan:
    made = plan.model_copy(deep=True)
    made.tensors = plan.tensors
    made.trials, made.prices, made.looser, made.blocks, made.sources = [], [], [], [], []
    for decision, options, o in zip(made.decisions, columns, choice, strict=True):
        taken = options[o]
        if (taken.rewrite, taken.label) != (decision.rewrite, decision.label):
            decision.choose(taken.rewrite, taken.label)
            decision.reason = "decided again from the plan's own costs"
    return made


def _totals(
    plan: Plan,
    budget: Budget,
    limits: Mapping[str, float],
    constants: Mapping[str, float],
    problem: Problem,
    choice: Sequence[int],
) -> list[RowResult]:
    quality, known = _quality(plan), {row.name: row for row in plan.totals}
    rows: list[RowResult] = []
    for name, limit in limits.items():
        row = budget.quality if name == "error" and budget.quality else name
        value = total(problem, choice, name) + constants[name]
        if name == "error":
            value, limit = quality.measured(value), quality.measured(limit)
        before = known[row].before if row in known else None
        unit = known[row].unit if row in known else ""
        rows.append(RowResult(row, limit, value, None, unit, before))
    return rows
