"""Who holds the memory of a planned step, op by op, as evidence for the readers of its plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby

import numpy as np
from torch import fx

from ..ir.decision import KEEP
from ..ir.evidence import Memory, Policy, Span
from .capture import module_of
from .forms import Form
from .holders import border, held
from .losses import head_decisions
from .planned import Layout
from .schedule import Schedule

POINTS = 400
"""The most points of a curve."""
_LAYER = re.compile(r".*?(?:^|(?<=\.))\d+(?=\.|$)")


def memory_of(layout: Layout, weights: int, limit: float | None, limited_by: str) -> Memory:
    """What is alive at each op of a layout, and where it was watched, what was."""
    laid = layout.calls
    holders, opening = held(laid), border(laid)
    total = np.sum(list(holders.values()), axis=0)
    parts = [*_buckets(0, opening, len(total)), *_buckets(opening, len(total), len(total))]
    highest = [int(part[np.argmax(total[part])]) for part in parts]
    return Memory(
        weights=weights,
        border=sum(part[0] < opening for part in parts),
        holders={name: [int(values[i]) for i in highest] for name, values in holders.items()},
        spans=_spans(laid, highest),
        policies=_policies(layout),
        measured=_measured(layout.probe.found, parts),
        limit=limit,
        limited_by=limited_by,
        peak_at=layout.widest,
    )


def _buckets(start: int, end: int, count: int) -> list[np.ndarray]:
    """The items from `start` to `end` as runs of about equal lengths."""
    share = max(1, POINTS * (end - start) // max(count, 1))
    return np.array_split(np.arange(start, end), min(share, end - start))


def _spans(laid: Schedule, points: list[int]) -> list[Span]:
    """Runs of points by layer; ops of the model itself belong to what is before them."""
    names: list[str] = []
    for point in points:
        item = laid.items[point]
        # a copy may end layers after the op whose memory it takes
        name = _layer(module_of(item.before or item.node))
        names.append(name or (names[-1] if names else ""))
    spans: list[Span] = []
    for name, run in groupby(range(len(names)), key=names.__getitem__):
        spans.append(Span(name=name, start=next(run)))
    return spans


def _layer(module: str) -> str:
    """A module up to its first number; itself, where it has none."""
    found = _LAYER.match(module)
    return found.group() if found else module


def _measured(found: Mapping[int, int], parts: list[np.ndarray]) -> list[int] | None:
    """The most that was alive in each part; what ran unseen is as what is before it."""
    if not found:
        return None
    values: list[int] = []
    for part in parts:
        seen = [found[i] for i in part.tolist() if i in found]
        values.append(max(seen) if seen else values[-1] if values else 0)
    return values


def _policies(layout: Layout) -> list[Policy]:
    """What happens to the saved tensors, and to the losses of heads, kept ones first."""
    saved, chosen = layout.saved, layout.plan.choices
    owners: dict[tuple[str, str], list[fx.Node]] = {(KEEP, ""): []}
    for owner in saved.owners.values():
        taken = (o for o in saved.offers.get(owner, []) if o.treatment == chosen.get(owner))
        name = next((offer.name for offer in taken), (KEEP, ""))
        owners.setdefault(name, []).append(owner)
    further = set(saved.others.values()) & layout.calls.starts()
    owners[KEEP, ""] += sorted(further, key=lambda node: node.name)
    made = [_policy(layout, *name, nodes) for name, nodes in owners.items() if nodes]
    return [*made, *_heads(layout)]


def _policy(layout: Layout, rewrite: str, label: str, owners: list[fx.Node]) -> Policy:
    bytes_ = sum(layout.saved.step.bytes[owner] for owner in owners)
    treatments = [layout.plan.choices.get(owner) for owner in owners]
    forms = [t for t in treatments if isinstance(t, Form)]
    return Policy(
        rewrite=rewrite,
        label=label,
        tensors=len(owners),
        bytes=bytes_,
        waiting=bytes_ if rewrite == KEEP else sum(form.bytes for form in forms),
        host=sum(form.host for form in forms),
        seconds=0.0 if rewrite == KEEP else _seconds(layout, forms),
    )


def _seconds(layout: Layout, forms: list[Form]) -> float:
    """What a step takes longer for tensors in these forms; for those made again, without any."""
    if not forms:
        return sum(layout.saved.seconds[node] for node in layout.calls.runs_again())
    copied = sum(form.transfer for form in layout.plan.images.values())
    own = sum(form.transfer for form in forms)
    waits = layout.calls.wait * own / copied if copied else 0.0
    return waits + sum(form.seconds for form in forms)


def _heads(layout: Layout) -> list[Policy]:
    """Losses that are computed without logits."""
    return [
        Policy(
            rewrite=decision.rewrite,
            label=decision.label,
            tensors=1,
            bytes=decision.kept.temporary_bytes if decision.kept else 0,
            waiting=0,
            seconds=decision.cost.seconds,
        )
        for decision in head_decisions(layout)
        if decision.rewritten
    ]
