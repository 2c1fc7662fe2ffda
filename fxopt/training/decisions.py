"""A layout as a plan: what happens to each saved tensor, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ..cost_models.hardware import probe
from ..decide.propose import Proposal
from ..ir.budget import Budget
from ..ir.cost import Cost
from ..ir.errors import RowResult
from ..ir.plan import KEEP, Alternative, Decision, Plan, Refused
from ..ir.units import format_value
from ..ir.workload import Train
from .measure import device_of
from .planned import Layout


def plan_of(
    layout: Layout,
    workload: Train,
    budget: Budget,
    rows: list[RowResult],
    model: nn.Module,
    notes: Sequence[str],
) -> Plan:
    """The plan of a layout, one decision for each tensor that eager saves or this plan does."""
    facts = probe(device_of(model))
    return Plan(
        budget=budget,
        workload=workload,
        hardware={"device": facts.name, "kind": facts.kind, "torch": str(torch.__version__)},
        fingerprint_structure=layout.structure,
        decisions=[*_decisions(layout), *_further(layout)],
        refusals=_refusals(layout),
        totals=rows,
        notes=list(notes),
    )


def _decisions(layout: Layout) -> list[Decision]:
    return [_decision(layout, key, owner) for key, owner in layout.saved.owners.items()]


def _decision(layout: Layout, key: str, owner: fx.Node) -> Decision:
    saved, plan = layout.saved, layout.plan
    where = ("activation", key)
    offered = saved.proposals.by_site.get(where, [])
    bytes_ = saved.step.bytes[owner]
    alone = saved.alone[key]
    if owner in plan.dropped:
        proposal = offered[0]
        return Decision(
            key=key,
            family="activation",
            rewrite=proposal.rewrite.name,
            version=proposal.rewrite.version,
            cost=Cost(seconds=alone),
            error=0.0,
            reason=f"{_size(bytes_)} less to save; alone it takes {_time(alone)} to run again",
            alternatives=[Alternative(rewrite=KEEP, cost=Cost(temporary_bytes=bytes_), error=0.0)],
        )
    refused = saved.proposals.refused.get(where)
    if refused:
        reason = refused[0][1]
    elif owner in plan.stops:
        reason = "what later ops run again from; without it their second run would not end here"
    elif not plan.dropped:
        reason = "the budget holds with everything saved"
    else:
        reason = f"{_size(bytes_)} for {_time(alone)}: other tensors make room for less"
    return Decision(
        key=key,
        family="activation",
        cost=Cost(temporary_bytes=bytes_),
        error=0.0,
        reason=reason,
        alternatives=[_alternative(p, alone) for p in offered],
        locked=where in saved.proposals.kept,
    )


def _alternative(proposal: Proposal, alone: float) -> Alternative:
    return Alternative(
        rewrite=proposal.rewrite.name,
        version=proposal.rewrite.version,
        cost=Cost(seconds=alone),
        error=0.0,
        reason="slower, and the budget holds without it",
    )


def _further(layout: Layout) -> list[Decision]:
    """Tensors that eager does not save and this plan does, so that second runs start there."""
    forward = set(layout.saved.step.forward)
    owner = layout.saved.step.owner
    read = {
        owner[source]
        for node in layout.calls.again
        for source in node.all_input_nodes
        if source in owner and source in forward and source not in layout.calls.again
    }
    return [
        Decision(
            key=key,
            family="activation",
            cost=Cost(temporary_bytes=layout.saved.step.bytes[found]),
            error=0.0,
            reason="not saved before; ops that run again start from it",
        )
        for key, found in layout.saved.others.items()
        if found in read
    ]


def _refusals(layout: Layout) -> list[Refused]:
    return [
        Refused(family="activation", key=key, rewrite=None if name == "*" else name, reason=reason)
        for (_, key), reasons in layout.saved.proposals.refused.items()
        for name, reason in reasons
    ]


def _size(value: Any) -> str:
    return format_value(value, "bytes")


def _time(value: Any) -> str:
    return format_value(value, "s")
