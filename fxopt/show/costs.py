"""What sites cost before and after, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fxopt.ir.cost import Cost
from fxopt.ir.plan import Decision, Plan
from fxopt.ir.units import format_value
from fxopt.ir.workload import Train

from .binding import error_row

SAVED = {
    "weight_bytes": ("weights", "bytes"),
    "state_bytes": ("cache", "bytes"),
    "temporary_bytes": ("temporary", "bytes"),
    "seconds": ("time", "s"),
}

WAITING = "saved for backward"
"""What a training step's temporary bytes are: they wait for the backward, all at once."""
TEMPORARY = (
    "temporary: bytes beside weights and cache that are alive only while a call runs; of several "
    "sites the most, since they are not alive at once."
)

SAME = 0.005
"""The share below which a change is called none."""


def is_training(plan: Plan) -> bool:
    """Whether the temporary bytes of sites are those of saved tensors."""
    return isinstance(plan.workload, Train)


def is_relative(plan: Plan) -> bool:
    """Whether errors are relative: so they are too where a plan was made without weights, and has
    no row of them."""
    return error_row(plan) in ("relative_error", "error")


def together(errors: Iterable[float], plan: Plan | None) -> float:
    """Errors of sites, added up as those of one plan are, as its budget states them: relative ones
    as roots of squares, which plans hold, though those of training steps hold the roots."""
    if plan is None or not is_relative(plan):
        return sum(errors)
    power = 2 if is_training(plan) else 1
    return math.sqrt(sum(max(error, 0.0) ** power for error in errors))


def saving(decisions: Sequence[Decision], plan: Plan | None = None) -> str:
    """What rewritten sites cost before and after, and the error they add; "" when kept."""
    if not any(decision.rewritten for decision in decisions):
        return ""
    training = plan is not None and is_training(plan)
    after = total(decisions, lambda decision: decision.cost)
    before = total(decisions, lambda decision: decision.kept)
    if training and before is not None and after is not None:
        before = replace(before, temporary_bytes=sum(_waiting(d.kept) for d in decisions))
        after = replace(after, temporary_bytes=sum(_waiting(d.cost) for d in decisions))
    texts = [_changed(name, before, after, training) for name in SAVED] if after else []
    errors = [decision.error for decision in decisions if decision.error is not None]
    if len(errors) == len(decisions):
        texts.append(f"error {together(errors, plan):.2g}{_known_by(decisions)}")
    return ", ".join(text for text in texts if text)


def _waiting(cost: Cost | None) -> int:
    return 0 if cost is None else cost.temporary_bytes


def label_of(name: str, training: bool) -> str:
    """What a cost is called."""
    return WAITING if training and name == "temporary_bytes" else SAVED[name][0]


def _known_by(decisions: Sequence[Decision]) -> str:
    """How errors of single sites are known."""
    known = {decision.error_measured for decision in decisions}
    if len(known) > 1:
        return " partly measured"
    return {True: " measured", False: " predicted", None: ""}[known.pop()]


def total(decisions: Sequence[Decision], of: Callable[[Decision], Cost | None]) -> Cost | None:
    """The sum of costs, None when one is unknown."""
    costs = [of(decision) for decision in decisions]
    known = [cost for cost in costs if cost is not None]
    return sum(known, Cost()) if len(known) == len(costs) else None


def _changed(name: str, before: Cost | None, after: Cost | None, training: bool) -> str:
    label, unit = label_of(name, training), SAVED[name][1]
    new = format_value(getattr(after, name), unit)
    if before is None:
        return f"{label} {new}" if getattr(after, name) else ""
    old = format_value(getattr(before, name), unit)
    return f"{label} {old} -> {new}" if old != new else ""


def change(before: float | None, after: float | None) -> str:
    """By how much a quantity grew, as a share of what it was."""
    if before is None or after is None:
        return ""
    if not before:
        return "same" if after == before else ""
    share = after / before - 1
    return "same" if abs(share) < SAME else f"{share:+.0%}".replace("-", "−")
