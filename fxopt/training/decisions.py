"""A layout as a plan: what happens to each saved tensor, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ..cost_models.hardware import probe
from ..ir.budget import Budget
from ..ir.cost import Cost
from ..ir.errors import RowResult
from ..ir.plan import KEEP, Alternative, Decision, Plan, Refused
from ..ir.units import format_value
from ..ir.workload import Train
from .forms import Form
from .losses import head_decisions, head_notes
from .measure import device_of
from .planned import Layout
from .sites import Offer


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
    made = Plan(
        budget=budget,
        workload=workload,
        hardware={"device": facts.name, "kind": facts.kind, "torch": str(torch.__version__)},
        fingerprint_structure=layout.structure,
        decisions=[*head_decisions(layout), *_decisions(layout), *_further(layout)],
        refusals=_refusals(layout),
        totals=rows,
        notes=[*notes, *head_notes(layout)],
    )
    made.settle()
    return made


def _decisions(layout: Layout) -> list[Decision]:
    return [_decision(layout, key, owner) for key, owner in layout.saved.owners.items()]


def _decision(layout: Layout, key: str, owner: fx.Node) -> Decision:
    offers = layout.saved.offers.get(owner, [])
    bytes_ = layout.saved.step.bytes[owner]
    chosen = layout.plan.choices.get(owner)
    taken = next((offer for offer in offers if offer.treatment == chosen), None)
    reason = "slower, and the budget holds without it"
    if taken is not None:
        reason = "with it the plan would take longer, or err more"
    others = [_alternative(layout, offer, reason) for offer in offers if offer is not taken]
    if taken is None:
        return Decision(
            key=key,
            family="activation",
            cost=Cost(temporary_bytes=bytes_),
            error=0.0,
            reason=_kept(layout, key, owner),
            alternatives=others,
            locked=("activation", key) in layout.saved.proposals.kept,
        )
    kept = Alternative(rewrite=KEEP, cost=Cost(temporary_bytes=bytes_), error=0.0)
    return Decision(
        key=key,
        family="activation",
        rewrite=taken.proposal.rewrite.name,
        version=taken.proposal.rewrite.version,
        label=taken.proposal.candidate.label,
        parameters=dict(taken.proposal.candidate.parameters),
        cost=taken.cost,
        error=_error(layout, taken),
        reason=_taken(taken, bytes_),
        alternatives=[kept, *others],
    )


def _kept(layout: Layout, key: str, owner: fx.Node) -> str:
    """Why a tensor is saved as it is."""
    saved, plan = layout.saved, layout.plan
    if not saved.offers.get(owner):
        refused = saved.proposals.refused.get(("activation", key), [("", "nothing serves it")])
        return "; ".join(dict.fromkeys(reason for _, reason in refused))
    if owner in plan.stops:
        return "what later ops run again from; without it their second run would not end here"
    if not plan.choices:
        return "the budget holds with everything saved"
    alone = _time(saved.alone[key])
    return f"{_size(saved.step.bytes[owner])} for {alone}: other tensors make room for less"


def _taken(offer: Offer, bytes_: int) -> str:
    """What a choice does with a tensor of so many bytes, and what for."""
    form, seconds = offer.treatment, _time(offer.cost.seconds)
    if not isinstance(form, Form):
        return f"{_size(bytes_)} less to save; alone it takes {seconds} to run again"
    if form.image.shares:
        return f"{_size(bytes_)} less to save: in {seconds} it is made of what the norm returned"
    if form.host:
        where, what = f"{_size(form.host)} wait in host memory", "standing still for copies"
        if form.image.pack:
            where, what = f"{where} in place of {_size(bytes_)}", f"packing and {what}"
        return f"{where}; alone it takes {seconds} of {what}"
    return (
        f"{_size(form.bytes)} saved in place of {_size(bytes_)}; there and back it takes {seconds}"
    )


def _error(layout: Layout, offer: Offer) -> float:
    """The relative error of the gradients that is expected of this tensor alone."""
    form = offer.treatment
    return layout.scale * form.error**0.5 if isinstance(form, Form) else 0.0


def _alternative(layout: Layout, offer: Offer, reason: str) -> Alternative:
    return Alternative(
        rewrite=offer.proposal.rewrite.name,
        version=offer.proposal.rewrite.version,
        label=offer.proposal.candidate.label,
        parameters=dict(offer.proposal.candidate.parameters),
        cost=offer.cost,
        error=_error(layout, offer),
        reason=reason,
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
