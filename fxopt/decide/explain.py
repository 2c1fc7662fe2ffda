"""Why a site was rewritten, kept or refused, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.cost import Cost
from .table import Column


def chosen(column: Column, kept: Column, per_position: bool) -> str:
    """What a chosen column gains and what it costs in quality."""
    gains = [text for text in _gains(column.cost, kept.cost) if text]
    gain = ", ".join(gains) or "nothing in this budget's rows"
    return f"gains {gain}; error {_error(column, per_position)}"


def kept(columns: Sequence[Column], per_position: bool) -> str:
    """Why column 0 was better than the others: what the cheapest and the mildest would do."""
    others = columns[1:]
    if not others:
        return "nothing to choose from"
    base = columns[0].cost
    useful = [c for c in others if any(_gains(c.cost, base))]
    if not useful:
        best = min(others, key=lambda c: c.cost.seconds)
        return (
            "no candidate gains anything here; the fastest, "
            f"{best.label}, takes {_ratio(best.cost, base)}"
        )
    mild = min(useful, key=lambda c: c.error)
    gain = ", ".join(text for text in _gains(mild.cost, base) if text)
    return (
        f"the budget holds without it: the mildest candidate, {mild.label}, would gain {gain} "
        f"for an error of {_error(mild, per_position)}"
    )


def alternative(column: Column, kept_column: Column, chosen_column: Column) -> str:
    """Why an alternative was not taken."""
    if column.error > chosen_column.error and not any(_gains(column.cost, chosen_column.cost)):
        return "larger error for no gain"
    if column.error <= chosen_column.error:
        return "dearer than what was chosen"
    return f"error {column.error:.2e} against {chosen_column.error:.2e}"


def _gains(cost: Cost, base: Cost) -> list[str]:
    texts: list[str] = []
    if cost.seconds < base.seconds * 0.98:
        texts.append(f"{base.seconds / max(cost.seconds, 1e-12):.2f}x speed")
    if cost.weight_bytes < base.weight_bytes:
        texts.append(f"{size(base.weight_bytes - cost.weight_bytes)} of weights")
    if cost.state_bytes < base.state_bytes:
        texts.append(f"{size(base.state_bytes - cost.state_bytes)} of KV cache")
    return texts


def _ratio(cost: Cost, base: Cost) -> str:
    if base.seconds <= 0:
        return "as long"
    return f"{cost.seconds / base.seconds:.2f}x the time"


def _error(column: Column, per_position: bool) -> str:
    unit = " nats" if per_position else ""
    how = "predicted" if column.measured is None else "measured"
    return f"{column.error:.2e}{unit} ({how})"


def size(count: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
