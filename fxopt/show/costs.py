"""What sites cost before and after, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxopt.ir.cost import Cost
from fxopt.ir.plan import Decision
from fxopt.ir.units import format_value

SAVED = {
    "weight_bytes": ("weights", "bytes"),
    "state_bytes": ("cache", "bytes"),
    "temporary_bytes": ("temporary", "bytes"),
    "seconds": ("time", "s"),
}


SAME = 0.005
"""The share below which a change is called none."""


def saving(decisions: Sequence[Decision]) -> str:
    """What rewritten sites cost before and after, and the error they add; "" when kept."""
    if not any(decision.rewritten for decision in decisions):
        return ""
    after = total(decisions, lambda decision: decision.cost)
    before = total(decisions, lambda decision: decision.kept)
    texts = [_changed(name, before, after) for name in SAVED] if after else []
    errors = [decision.error for decision in decisions if decision.error is not None]
    if len(errors) == len(decisions):
        texts.append(f"error {sum(errors):.2g}{_known_by(decisions)}")
    return ", ".join(text for text in texts if text)


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


def _changed(name: str, before: Cost | None, after: Cost | None) -> str:
    label, unit = SAVED[name]
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
