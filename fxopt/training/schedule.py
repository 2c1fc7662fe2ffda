"""The step with some saved tensors computed again: what runs when, and what is alive meanwhile."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

from .step import Step, storage_of


@dataclass(frozen=True)
class Item:
    """One call of the step. `again` marks the second run of a forward node, in the backward;
    `before` is the backward node that it runs for."""

    node: fx.Node
    again: bool = False
    before: fx.Node | None = None


@dataclass(frozen=True)
class Schedule:
    """The calls of a step in order. `again` are the forward nodes that run twice."""

    step: Step
    items: tuple[Item, ...]
    again: frozenset[fx.Node]

    def live(self) -> np.ndarray:
        """Bytes alive at each node of the unchanged step, in its order.

        Runs of forward nodes in the backward count at the backward node that they run for.
        Parameters and inputs are not counted; gradients and outputs are, to the end.
        """
        step = self.step
        begin, last = _ranges(step, self.items, self.again)
        change = np.zeros(len(self.items) + 1)
        for key, start in begin.items():
            change[start] += step.bytes.get(key[0], 0)
            change[last[key] + 1] -= step.bytes.get(key[0], 0)
        alive = np.cumsum(change)[:-1] + _unread(step, self.items)
        starts = [0]
        for i, item in enumerate(self.items[:-1]):
            if not item.again:
                starts.append(i + 1)
        return np.maximum.reduceat(alive, starts)

    def runs_again(self) -> list[fx.Node]:
        """The ops that are paid for a second time; views and parts of results are free."""
        return [
            n
            for n in self.step.forward
            if n in self.again and n.target is not operator.getitem and not self.step.is_view(n)
        ]


def schedule(step: Step, dropped: Collection[fx.Node], stops: Collection[fx.Node] = ()) -> Schedule:
    """Run `dropped` owners again, each just before the backward first needs it.

    What they are computed from is saved where the step saves it anyway, where it is one of
    `stops`, or where its op cannot run twice; else it is computed again as well.
    """
    kept = ({*step.saved, *step.outputs, *stops} - set(dropped)) | step.outputs
    forward, reads = step.inside, step.reads
    blocked: dict[fx.Node, bool] = {}

    def computed_again(node: fx.Node) -> bool:
        if node not in forward:
            return False
        owner = step.owner.get(node)
        if owner is None:
            return True
        if owner.op == "placeholder" or owner in kept:
            return False
        op = step.maker(owner)
        if op not in blocked:
            blocked[op] = step.blocked(op) is not None
        return not blocked[op]

    items = [Item(node) for node in step.forward]
    again: set[fx.Node] = set()
    place = {node: i for i, node in enumerate(step.forward)}
    for node in step.backward:
        needed: set[fx.Node] = set()
        waiting = list(reads[node])
        while waiting:
            source = waiting.pop()
            if source in again or source in needed or not computed_again(source):
                continue
            needed.add(source)
            waiting += reads[source]
        _with_parts(needed, computed_again)
        items += [Item(n, True, node) for n in sorted(needed, key=place.__getitem__)]
        again |= needed
        items.append(Item(node))
    return Schedule(step, tuple(items), frozenset(again))


def _with_parts(needed: set[fx.Node], computed_again: Callable[[fx.Node], bool]) -> None:
    """Parts of a result are taken at once, so that the rest of it can go."""
    for node in list(needed):
        if not isinstance(node.meta.get("val"), Tensor):
            needed.update(u for u in node.users if _is_part(u, node) and computed_again(u))


Key = tuple[fx.Node, bool]


def _ranges(
    step: Step, items: tuple[Item, ...], again: frozenset[fx.Node]
) -> tuple[dict[Key, int], dict[Key, int]]:
    """Where each piece of memory is made and last needed; results and outputs to the end."""
    forward, end = step.inside, len(items) - 1
    begin: dict[Key, int] = {}
    last: dict[Key, int] = {}
    for i, item in enumerate(items):
        copied = item.again
        sources = (*step.reads[item.node], item.node)
        in_backward = copied or item.node not in forward
        for source in sources:
            owner = step.owner.get(source)
            if owner is None or (owner.op == "placeholder" and not _is_tangent(owner)):
                continue
            # a view of kept memory may be taken again: the memory is the first run's
            key = (owner, in_backward and owner in again)
            if owner.op == "placeholder":
                begin.setdefault(key, len(step.forward))
            begin.setdefault(key, i)
            last[key] = i
    for key in last:
        # the caller holds what it gave and what it was given
        if not key[1] and (key[0] in step.outputs or key[0].op == "placeholder"):
            last[key] = end
    return begin, last


def _unread(step: Step, items: tuple[Item, ...]) -> np.ndarray:
    """Bytes of results with several parts that no part taken so far accounts for."""
    extra = np.zeros(len(items))
    for i, item in enumerate(items):
        value = item.node.meta.get("val")
        if not isinstance(value, list | tuple):
            continue
        held = {storage_of(t): t for t in value if isinstance(t, Tensor)}
        for source in step.reads[item.node]:
            if source in step.owner:
                held.pop(storage_of(source.meta["val"]), None)
        total = sum(t.untyped_storage().nbytes() for t in held.values())
        extra[i], j = total, i + 1
        while j < len(items) and _is_part(items[j].node, item.node):
            total -= step.bytes.get(step.owner[items[j].node], 0)
            extra[j], j = total, j + 1
    return extra


def _is_part(node: fx.Node, whole: fx.Node) -> bool:
    return node.target is operator.getitem and node.args[0] is whole


def _is_tangent(node: fx.Node) -> bool:
    return str(node.target).startswith("tangents")
