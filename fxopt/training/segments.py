"""Where a step's forward is narrow: cuts that computing again does not cross.

What is computed again starts from memory that was kept. Were none kept, the last layer's second
run would run all layers, and the peak would be that of no plan at all; so a plan is made for a
set of cuts whose one live tensor is kept, and several sets are tried.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx

from .step import Step, node_key

STRIDES = (1, 2, 4, 8)
PARTS = (2, 4)
ALONE = 64


@dataclass(frozen=True)
class Cut:
    """The forward after `position` nodes: `owner` is the one active tensor that is read later."""

    position: int
    owner: fx.Node
    kind: str


@dataclass(frozen=True)
class Segment:
    """Part of a forward, or a cut. `sites` are the saved owners that are decided in it."""

    sites: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Segments:
    """A forward in parts; what later parts read of earlier ones is in `stops`, and kept."""

    parts: tuple[Segment, ...]
    stops: frozenset[fx.Node]


def segmentations(
    step: Step, droppable: Collection[fx.Node], movable: Collection[fx.Node] = ()
) -> list[Segments]:
    """Ways to cut the forward, the undivided one first; `droppable` are the owners in question,
    `movable` those that may wait elsewhere unchanged, though second runs start from them.

    Small steps are also taken tensor by tensor, as if each stood alone.
    """
    cut_sets = dict.fromkeys([(), *_cut_sets(step)])
    found = [_divide(step, cut, droppable, movable) for cut in cut_sets]
    if len(droppable) <= ALONE:
        single = tuple(Segment((owner,)) for owner in step.saved if owner in droppable)
        found.append(Segments(single, frozenset()))
    return found


def cuts(step: Step) -> list[Cut]:
    """Every position that exactly one active tensor crosses, the first for each tensor."""
    place = {node: i for i, node in enumerate(step.forward)}
    ends: dict[fx.Node, int] = {}
    for node in step.forward:
        for source in node.all_input_nodes:
            owner = step.owner.get(source)
            if owner is not None and owner in place and owner in step.active:
                ends[owner] = place[node]
    opening = {place[owner]: owner for owner in ends}
    crossing: set[fx.Node] = set()
    found: dict[fx.Node, Cut] = {}
    for i, node in enumerate(step.forward):
        crossing = {o for o in crossing if ends[o] > i}
        if i in opening and ends[opening[i]] > i:
            crossing.add(opening[i])
        if len(crossing) == 1:
            (owner,) = crossing
            found.setdefault(owner, Cut(i + 1, owner, _kind(node, owner)))
    return list(found.values())


def _kind(node: fx.Node, owner: fx.Node) -> str:
    """Equal for the same place of repeated layers."""
    shape = tuple(owner.meta["val"].shape)
    return f"{re.sub('[0-9]+', '#', node_key(owner))} {shape} {node.target}"


def _cut_sets(step: Step) -> list[tuple[int, ...]]:
    found = cuts(step)
    if not found:
        return []
    counts = Counter(cut.kind for cut in found)
    sets: list[tuple[int, ...]] = []
    for kind, count in counts.most_common(2):
        places = [cut.position for cut in found if cut.kind == kind]
        sets += [tuple(places[::-1][::m][::-1]) for m in STRIDES if count >= max(2, m)]
    sets += [_even(step, found, parts) for parts in PARTS if parts <= len(found)]
    return [s for s in dict.fromkeys(sets) if s]


def _even(step: Step, found: Sequence[Cut], parts: int) -> tuple[int, ...]:
    """`parts` - 1 cuts that divide the saved bytes about evenly."""
    saved = set(step.saved)
    total, before = 0, list[int]()
    for node in step.forward:
        total += step.bytes.get(node, 0) if node in saved else 0
        before.append(total)
    places = [cut.position for cut in found]
    wanted = [total * i / parts for i in range(1, parts)]
    nearest = {min(places, key=lambda p: abs(before[p - 1] - w)) for w in wanted}
    return tuple(sorted(nearest))


def _divide(
    step: Step,
    positions: Sequence[int],
    droppable: Collection[fx.Node],
    movable: Collection[fx.Node],
) -> Segments:
    """What a later part reads of an earlier one stays: computing again ends there."""
    part = {node: bisect_right(positions, i) for i, node in enumerate(step.forward)}
    stops: set[fx.Node] = set()
    for node in step.forward:
        for source in node.all_input_nodes:
            owner = step.owner.get(source)
            if owner in part and part[owner] < part[node]:
                stops.add(owner)
    sites: list[list[fx.Node]] = [[] for _ in range(len(positions) + 1)]
    for owner in step.saved:
        if owner not in stops and owner in droppable:
            sites[part[owner]].append(owner)
    alone = [[owner] for owner in step.saved if owner in stops and owner in movable]
    return Segments(tuple(Segment(tuple(s)) for s in [*sites, *alone] if s), frozenset(stops))
