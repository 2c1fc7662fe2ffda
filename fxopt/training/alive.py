"""Bytes alive at each node of a scheduled step: the unchanged step's, and what the plan changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from .forms import OUTWARD, State
from .lifetimes import touched, unread

if TYPE_CHECKING:
    from .schedule import Item, Schedule

Key = tuple[fx.Node, State]
"""A piece of memory by the node that owns it."""


def live(laid: Schedule) -> np.ndarray:
    """Bytes alive at each node of the unchanged step, in its order.

    Other calls count at the node that they stand before. Parameters and inputs are not counted;
    gradients and outputs are, to the end.
    """
    step, known = laid.step, laid.step.lifetimes
    extra = np.zeros(len(known.live), dtype=int)
    for node, items in laid.extras.items():
        extra[known.place[node]] = len(items)
    runs = np.arange(len(extra)) + np.cumsum(extra)
    first = runs - extra
    alive = np.repeat(known.between, extra + 1)
    alive[runs] = known.live
    for node in known.large:
        alive[runs[known.place[node]]] += step.workspace(node)
    for node, owner in laid.replaced.items():
        alive[runs[known.place[node]]] += laid.images[owner].unpacking
    calls: list[tuple[int, Item]] = []
    for node, items in laid.extras.items():
        start = int(first[known.place[node]])
        calls += enumerate(items, start)
        alive[start : start + len(items)] += _own(laid, items)
        if node is step.backward[0]:
            early = sum(item.kind in OUTWARD for item in items)
            alive[start + early : start + len(items)] += known.tangents
    change = np.zeros(len(alive) + 1)
    for size, begin, end in _changes(laid, calls, runs):
        change[begin] += size
        change[end + 1] -= size
    return np.maximum.reduceat(alive + np.cumsum(change)[:-1], first)


def _own(laid: Schedule, items: Sequence[Item]) -> np.ndarray:
    """Bytes that inserted calls take beside the memory that has an owner."""
    taken, waiting = unread(laid.step, [item.node for item in items if item.kind == "again"])
    own = np.zeros(len(items))
    number, held = len(taken), 0.0
    for i, item in reversed(list(enumerate(items))):
        own[i] = held
        if item.kind == "again":
            number -= 1
            own[i], held = taken[number] + laid.step.workspace(item.node), waiting[number]
        elif item.kind == "pack":
            own[i] += laid.images[item.node].packing
        elif item.kind == "unpack":
            own[i] += laid.images[item.node].unpacking
    return own


def _changes(
    laid: Schedule, calls: Sequence[tuple[int, Item]], runs: np.ndarray
) -> Iterator[tuple[int, int, int]]:
    """Bytes that are alive from one call to another beyond those of the unchanged step, or, below
    0, no more. `calls` are inserted ones with their places, `runs` the places of the nodes."""
    step, known = laid.step, laid.step.lifetimes
    begin: dict[Key, int] = {}
    last: dict[Key, int] = {}
    for place, item in sorted(calls, key=lambda call: call[0]):
        for key in _touched(laid, item):
            begin.setdefault(key, place)
            last[key] = place
    for (owner, state), start in begin.items():
        end, size = last[owner, state], step.bytes.get(owner, 0)
        if state in ("sent", "fetched"):
            yield laid.images[owner].packed, start, end
        elif state == "image":
            # where others read it in place of the memory, they are nodes of the backward
            reads = known.in_backward if laid.images[owner].image.replaces else {}
            yield laid.images[owner].bytes, start, max(end, _at(runs, reads, owner))
        elif state == "again":
            yield size, start, max(end, _at(runs, known.in_backward, owner))
    ends = {o: end for (o, state), end in last.items() if state == "first"}
    moved = {o for o, state in begin if state != "first"}
    for owner in (moved | ends.keys()) - step.outputs:
        before = int(runs[known.last[owner]])
        reads = known.in_forward if owner in moved else known.last
        after = max(ends.get(owner, 0), _at(runs, reads, owner))
        size = step.bytes.get(owner, 0)
        yield (size, before + 1, after) if after > before else (-size, after + 1, before)


def _at(runs: np.ndarray, places: Mapping[fx.Node, int], owner: fx.Node) -> int:
    return int(runs[places[owner]]) if owner in places else 0


def _touched(laid: Schedule, item: Item) -> list[Key]:
    """The memory that an inserted call reads or makes."""
    if item.kind not in ("run", "again"):
        return laid.touched(item)
    # a view of kept memory may be taken again: the memory is the first run's
    return [(owner, laid.backward_state(owner)) for owner in touched(laid.step, item.node)]
