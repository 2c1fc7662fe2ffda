"""A plan decided again from its own costs and errors: locked sites stay, nothing is scored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..ir.budget import Budget
from ..ir.cost import Cost
from ..ir.decision import KEEP, Alternative, Decision
from ..ir.errors import PlanError, RowResult
from ..ir.plan import Plan
from .outlook import nearest_note
from .problem import Group, Option, Problem, Row, total, weighed
from .quality import QUALITIES, Quality
from .search import FAINT
from .solve import nearest, solve

RESOURCES = ("latency", "weights", "kv_cache", "memory")


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
    made.settle()
    made.budget = budget
    made.totals = _totals(plan, budget, limits, problem, choice)
    made.notes = ["decided again from the plan's own costs and errors: not realised, not measured"]
    if plan.distilled and not made.distilled:
        made.notes.append(
            "errors are scaled to what was measured after distillation, in which what is chosen "
            "anew had no part"
        )
    if found is None:
        made.notes.append(nearest_note(problem))
    return made


def _columns(decision: Decision) -> list[Alternative]:
    """What can stand at a site: first what keeps it, where it may be kept; locked: one."""
    mine = _now(decision)
    if decision.locked:
        return [mine]
    others = [a for a in decision.alternatives if a.error is not None and math.isfinite(a.error)]
    return sorted([mine, *others], key=lambda a: a.rewrite != KEEP)


def _now(decision: Decision) -> Alternative:
    return Alternative(
        rewrite=decision.rewrite, label=decision.label, parameters=decision.parameters,
        version=decision.version, cost=decision.cost, error=decision.error,
    )  # fmt: skip


def _amounts(option: Alternative, plan: Plan) -> dict[str, float]:
    cost: Cost = option.cost
    return {
        "error": max(option.error or 0.0, 0.0) * plan.error_scale,
        "latency": cost.seconds,
        "weights": float(cost.weight_bytes),
        "kv_cache": float(cost.state_bytes),
        "memory": float(cost.weight_bytes + cost.state_bytes),
    }


def _quality(plan: Plan) -> Quality:
    row = next((r.name for r in plan.totals if r.name in QUALITIES), plan.budget.quality or "kl")
    return Quality(QUALITIES[row], per_position=False)


def note_totals(plan: Plan) -> None:
    """Keep what the totals say beyond the sites' own costs and errors, as long as the two belong
    together: an edited decision changes the latter alone."""
    known = {row.name: _value(row) for row in plan.totals}
    taken = [_amounts(_now(decision), plan) for decision in plan.decisions]
    alone = sum(amounts["error"] for amounts in taken)
    plan.outside = {
        name: value - sum(amounts[name] for amounts in taken)
        for name, value in known.items()
        if value is not None and name in RESOURCES
    }
    quality, row = _quality(plan), next((r for r in plan.totals if r.name in QUALITIES), None)
    whole = quality.additive((row and _value(row)) or 0.0)
    least = FAINT * quality.additive((row and row.limit) or 0.0)
    # a loss or a metric can be better than before by chance: that makes no error free
    if min(whole, alone) > least:
        plan.error_scale = whole / alone


def _value(row: RowResult) -> float | None:
    return row.predicted if row.measured is None else row.measured


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


def _constants(plan: Plan, rows: Iterable[str]) -> dict[str, float]:
    """What the model takes in each row beyond its sites."""
    missing = [name for name in rows if name != "error" and name not in plan.outside]
    if missing:
        raise PlanError(
            f"Budget.{missing[0]}: this plan was made without that row; make a plan with fxopt.plan"
        )
    return {name: plan.outside.get(name, 0.0) for name in rows}


def _objective(plan: Plan, budget: Budget) -> dict[str, float]:
    """What is minimised, weighed as a share of what the kept sites take."""
    sums = {name: sum(_amounts(c, plan)[name] for d in plan.decisions for c in [_columns(d)[0]])
            for name in ("latency", "memory")}  # fmt: skip
    scale = {name: 1 / max(value, 1e-9) for name, value in sums.items()}
    return weighed(budget.objective, scale)


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
            made.distilled = []
    return made


def _totals(
    plan: Plan,
    budget: Budget,
    limits: Mapping[str, float],
    problem: Problem,
    choice: Sequence[int],
) -> list[RowResult]:
    """The rows of `budget`, then those that the plan tells of without a limit."""
    quality, known = _quality(plan), {row.name: row for row in plan.totals}
    outside = {"error": 0.0, **plan.outside}
    rows: list[RowResult] = []
    for row in dict.fromkeys((*budget.rows(), *known)):
        name = "error" if row in QUALITIES else row
        if name not in outside:
            continue
        value, limit = total(problem, choice, name) + outside[name], limits.get(name)
        if name == "error":
            value = quality.measured(value)
            limit = None if limit is None else quality.measured(limit)
        before = known[row].before if row in known else None
        unit = known[row].unit if row in known else ""
        rows.append(RowResult(row, limit, value, None, unit, before))
    return rows
