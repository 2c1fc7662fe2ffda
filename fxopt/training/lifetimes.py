"""From when to when each piece of memory of an unchanged step is alive, and how much that makes.

Counted once a step: what a plan changes is counted against it (`alive.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, fx

if TYPE_CHECKING:
    from .step import Step


@dataclass(frozen=True)
class Lifetimes:
    """The nodes of a step by number, the forward's first; memory by the node that owns it.

    `last` is the last node that needs a piece of memory, `in_forward` and `in_backward` the last
    of each half that reads or makes it. `live` are the bytes alive at each node but for
    workspaces, `between` those that wait before it, and `tangents` those that the backward is
    given. `large` are the nodes that take a workspace.
    """

    place: dict[fx.Node, int]
    last: dict[fx.Node, int]
    in_forward: dict[fx.Node, int]
    in_backward: dict[fx.Node, int]
    live: np.ndarray
    between: np.ndarray
    tangents: int
    large: tuple[fx.Node, ...]

    @classmethod
    def of(cls, step: Step) -> Lifetimes:
        """Parameters and inputs are not counted; gradients and outputs are, to the end."""
        nodes, opening = (*step.forward, *step.backward), len(step.forward)
        begin: dict[fx.Node, int] = {}
        halves: tuple[dict[fx.Node, int], ...] = ({}, {})
        for i, node in enumerate(nodes):
            for owner in touched(step, node):
                begin.setdefault(owner, opening if owner.op == "placeholder" else i)
                halves[i >= opening][owner] = i
        last = {**halves[0], **halves[1]}
        # the caller holds what it gave and what it was given
        last |= {o: len(nodes) - 1 for o in last if o in step.outputs or o.op == "placeholder"}
        change = np.zeros(len(nodes) + 1)
        for owner, start in begin.items():
            change[start] += step.bytes.get(owner, 0)
            change[last[owner] + 1] -= step.bytes.get(owner, 0)
        made = np.cumsum(change)[:-1]
        before = np.concatenate([[0.0], made[:-1]])
        for owner, end in last.items():
            if end + 1 < len(nodes):
                before[end + 1] -= step.bytes.get(owner, 0)
        untaken, waiting = unread(step, nodes)
        return cls(
            {node: i for i, node in enumerate(nodes)},
            last,
            *halves,
            made + untaken,
            before + waiting,
            sum(step.bytes[o] for o in begin if o.op == "placeholder"),
            tuple(node for node in nodes if step.workspace(node)),
        )


def touched(step: Step, node: fx.Node) -> Iterator[fx.Node]:
    """Owners of the memory that a node reads or makes; of the placeholders only gradients count."""
    for source in (*step.reads[node], node):
        owner = step.owner.get(source)
        if owner is not None and (owner.op != "placeholder" or is_tangent(owner)):
            yield owner


def unread(step: Step, nodes: Sequence[fx.Node]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of results with several parts that no part taken so far accounts for: at each of
    `nodes`, and between it and the one before."""
    here, before = np.zeros(len(nodes)), np.zeros(len(nodes))
    for i, node in enumerate(nodes):
        value = node.meta.get("val")
        if not isinstance(value, list | tuple):
            continue
        results = (t for t in value if isinstance(t, Tensor))
        held = {storage_of(t): t.untyped_storage().nbytes() for t in results}
        for source in step.reads[node]:
            if source in step.owner:
                held.pop(storage_of(source.meta["val"]), None)
        here[i] = sum(held.values())
        for j in range(i + 1, len(nodes)):
            if not is_part(nodes[j], node):
                break
            before[j] = sum(held.values())
            if nodes[j] in step.owner:
                held.pop(storage_of(nodes[j].meta["val"]), None)
            here[j] = sum(held.values())
    return here, before


def is_part(node: fx.Node, whole: fx.Node) -> bool:
    """Whether a node takes one result of an op with several."""
    return node.target is operator.getitem and node.args[0] is whole


def is_tangent(node: fx.Node) -> bool:
    """Whether a placeholder is a gradient that the backward is given."""
    return str(node.target).startswith("tangents")


def storage_of(value: Any) -> int:
    """What is equal of tensors that share memory."""
    return value.untyped_storage()._cdata
