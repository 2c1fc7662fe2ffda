"""The step as the model has it, and the step whose losses are computed without logits.

The second is traced where the first does not keep the budget with everything saved: its results
differ in the last bits, and logits that the model returns become None. The better of the two is
taken.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from ..cost_models.measured import Measured
from ..decide.propose import Proposal
from ..ir.cost import OpCall
from ..ir.errors import BudgetError
from ..ir.plan import Plan
from ..ir.site import LossHeadInfo
from ..ir.units import format_value
from ..ir.workload import Train, scenarios
from ..passes.activation.cut_cross_entropy import OPS, filter_eps, rechunk
from .heads import Cut, HeadCut
from .module import Inputs, Run
from .planned import Layout, Request, as_decided, costs_of, fastest, planned
from .pricing import op_call
from .search import StepPlan
from .sites import Saved
from .step import Step

WORTH = 0.03
"""Logits are given up for what is more than this share of the forward's seconds."""

Made = tuple[Run, Layout]
Offers = Mapping[str, list[Proposal]]


def fastest_step(
    model: nn.Module, inputs: Inputs, request: Request, limit: float, error: float = 0.0
) -> Made:
    """The fastest planned step whose peak is below `limit` bytes, else the smallest; of those from
    which no larger error than `error` is expected."""
    begun = time.monotonic()
    whole = planned(model, inputs, request, fastest(limit, error), {})
    saved, plan = whole[1].saved, whole[1].plan
    offers = {key: found for key in saved.heads if (found := _within(saved.proposed(key), error))}
    if not offers or (plan.peak <= limit and not plan.seconds):
        return whole
    if request.time_limit is not None:
        left = begun + request.time_limit - time.monotonic()
        request = replace(request, time_limit=max(left, 1e-3))
    costs = costs_of(model)
    eps = max(filter_eps(p.candidate) for found in offers.values() for p in found)
    seconds = _chunk_seconds(offers, costs, request.workload)
    first = {key: HeadCut(min(seconds), filter_eps=eps) for key in offers}
    pick = _Chunks(seconds, limit, _left(error, first))
    run, layout = planned(model, inputs, request, pick, first)
    other = _others(saved.step, layout.saved.step, costs)
    costs.save()
    # never a gain: bits and logits are given up for bytes alone
    added = max(0.0, pick.seconds[pick.chosen] + other)
    cut = {key: HeadCut(pick.chosen, added / len(offers), eps) for key in offers}
    without = run, replace(layout, plan=_with_heads(layout.plan, cut), cut=cut)
    margin = WORTH * sum(saved.seconds.values())
    return whole if _suffices(whole[1].plan, without[1].plan, limit, margin) else without


def decided_step(model: nn.Module, inputs: Inputs, request: Request, plan: Plan) -> Made:
    """The step that `plan` describes, without a search."""
    names = {r.name for r in request.rewrites if getattr(r, "groups", "") == LossHeadInfo.kind}
    cut = {
        d.key: HeadCut(
            int(d.parameters["chunk"]), d.cost.seconds, float(d.parameters.get("filter_eps", 0.0))
        )
        for d in plan.rewritten
        if d.rewrite in names
    }
    run, layout = planned(model, inputs, request, as_decided(plan), cut)
    return run, replace(layout, plan=_with_heads(layout.plan, cut))


def _within(proposals: list[Proposal], error: float) -> list[Proposal]:
    """The candidates for a head that leave out small gradients, where that was asked for and no
    more than `error` is expected of it; else the exact ones."""
    filtered = [p for p in proposals if (eps := filter_eps(p.candidate)) and eps <= error**2]
    return filtered or [p for p in proposals if not filter_eps(p.candidate)]


def _heads_error(cut: Cut) -> float:
    return max((head.error for head in cut.values()), default=0.0)


def _left(error: float, cut: Cut) -> float:
    """What tensors may add to the error of heads; squares add up."""
    return max(0.0, error**2 - _heads_error(cut) ** 2) ** 0.5


def _with_heads(plan: StepPlan, cut: Cut) -> StepPlan:
    """A plan with the seconds that its heads add, and their error."""
    added = sum(head.seconds for head in cut.values())
    error = math.hypot(plan.error, _heads_error(cut))
    return replace(plan, seconds=plan.seconds + added, error=error)


@dataclass(frozen=True)
class Further:
    """Plans the steps of inputs that come later: under the same limits, and with logits or without
    as the first."""

    request: Request
    limit: float
    error: float = 0.0
    cut: Cut = field(default_factory=dict[str, HeadCut])

    def __call__(self, model: nn.Module, inputs: Inputs) -> Run:
        pick = fastest(self.limit, _left(self.error, self.cut))
        run, layout = planned(model, inputs, self.request, pick, self.cut)
        if layout.plan.peak > self.limit:
            shapes = {n: tuple(t.shape) for n, t in inputs.items() if isinstance(t, torch.Tensor)}
            raise BudgetError(
                f"inputs {shapes} need {format_value(layout.plan.peak, 'bytes')} in a step at "
                f"the least (at {layout.widest}), more than the budget that the module was "
                "optimised for; call fxopt.optimize with the largest inputs as example_inputs",
                [], "memory", None,
            )  # fmt: skip
        return run


class _Chunks:
    """Picks a plan with the smallest chunk, then the fastest chunk that leaves it in the limit.

    `seconds` are those of the heads' losses by chunk.
    """

    def __init__(self, seconds: Mapping[int, float], limit: float, error: float) -> None:
        self.seconds = seconds
        self.chosen = min(seconds)
        self._limit, self._error = limit, error

    def __call__(self, saved: Saved, deadline: float) -> StepPlan:
        plan = fastest(self._limit, self._error)(saved, deadline)
        for chunk in sorted(self.seconds, key=self.seconds.__getitem__):
            rechunk(saved.step.graph, chunk)
            self.chosen = chunk
            counted = plan.counted(saved.step, saved.seconds)
            if counted.peak <= max(self._limit, plan.peak):
                return counted
        return plan


def _chunk_seconds(offers: Offers, costs: Measured, workload: Train) -> dict[int, float]:
    """Seconds of all heads' losses, by rows at a time; a head that is too short for a chunk takes
    the largest that it offers."""
    scenario = scenarios(workload)[0]
    every: list[dict[int, float]] = []
    for found in offers.values():
        calls = {
            int(p.candidate.parameters["chunk"]): p.rewrite.lower(p.match, p.candidate, scenario)
            for p in found
        }
        every.append({chunk: sum(_price(costs, c) for c in of) for chunk, of in calls.items()})
    chunks = {chunk for prices in every for chunk in prices}
    return {
        chunk: sum(prices.get(chunk, prices[max(prices)]) for prices in every) for chunk in chunks
    }


def _others(whole: Step, cut: Step, costs: Measured) -> float:
    """Seconds of the ops that `cut` has beyond `whole`, less those that it lacks, heads' losses
    apart."""
    before, after = _ops(whole), _ops(cut)
    count = Counter({key: len(nodes) for key, nodes in after.items()})
    count.subtract({key: len(nodes) for key, nodes in before.items()})
    total = 0.0
    for key, times in count.items():
        if times:
            node = (after.get(key) or before[key])[0]
            total += times * _price(costs, op_call(node))
    return total


def _price(costs: Measured, call: OpCall) -> float:
    """Seconds of a call: measured, but predicted where it does not run alone, for want of room or
    on inputs that are made up."""
    try:
        return costs(call).seconds
    except RuntimeError:  # of which OutOfMemoryError is one
        return costs.prior(call).seconds


def _ops(step: Step) -> dict[str, list[fx.Node]]:
    """The calls of a step that take time, equal ones together."""
    made = [n for n in (*step.forward, *step.backward) if n in step.owner and not step.is_view(n)]
    found: dict[str, list[fx.Node]] = {}
    for node in dict.fromkeys(map(step.maker, made)):
        if node.target not in OPS:
            found.setdefault(op_call(node).key, []).append(node)
    return found


def _suffices(whole: StepPlan, without: StepPlan, limit: float, margin: float) -> bool:
    """Whether the plan with logits does as well."""
    if whole.peak > limit or without.peak > limit:
        return whole.peak <= max(limit, without.peak)
    return whole.seconds <= without.seconds + margin
