"""A step taken apart: which memory its forward makes, and which of it the backward reads."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from ..ir.errors import CaptureError
from ..passes.activation.cut_cross_entropy import EARLY, workspace_of
from .capture import module_of
from .casts import merge_casts
from .lifetimes import Lifetimes, storage_of
from .link import Clock
from .norms import Sources, sources
from .random import dropout_noise, is_random

aten = torch.ops.aten
NORM = aten._native_batch_norm_legit_functional.default


@dataclass
class Step:
    """A joint graph in execution order, forward nodes first.

    An *owner* is the node that first holds a piece of memory; views share their base's owner,
    each output of an op with several has its own (its `getitem`). Placeholders own theirs.
    """

    graph: fx.Graph
    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    owner: dict[fx.Node, fx.Node]
    outputs: frozenset[fx.Node]
    changed: frozenset[fx.Node]
    """Placeholders that the step writes to: running statistics, inputs changed in place."""
    pace: dict[fx.Node, float] = field(default_factory=dict[fx.Node, float])
    """Seconds that each node takes, where it was asked: copies beside them are placed by it."""
    temporary: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])
    """Bytes that nodes were seen to take beside their results while they run."""

    @classmethod
    def of(cls, graph: fx.Graph, num_fwd_outputs: int) -> Step:
        """Take `graph` apart; nodes that only the backward needs are moved into it."""
        results = _results(graph)
        forward = _ancestors(results[:num_fwd_outputs])
        forward |= {n for n in graph.nodes if n.target is operator.getitem and n.args[0] in forward}
        merge_casts(graph, forward, set(results))
        _postpone(graph, forward)
        calls = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        owner = _owners(graph)
        descriptors = graph.output_node().meta.get("desc") or ()
        by_target = {n.meta["desc"]: n for n in graph.find_nodes(op="placeholder")}
        written = (getattr(d, "mutated_input", None) for d in descriptors)
        return cls(
            graph,
            tuple(n for n in calls if n in forward),
            tuple(n for n in calls if n not in forward),
            owner,
            frozenset(owner[n] for n in results if n is not None and n in owner),
            frozenset(by_target[d] for d in written if d in by_target),
        )

    @cached_property
    def saved(self) -> tuple[fx.Node, ...]:
        """Owners of what the forward makes and the backward reads, in order: the sites.

        What the step returns is alive anyway, and not among them.
        """
        inside, wanted = self.inside, set[fx.Node]()
        for node in self.backward:
            wanted |= {self.owner[n] for n in node.all_input_nodes if n in inside}
        return tuple(n for n in self.forward if n in wanted - self.outputs)

    @cached_property
    def shared(self) -> dict[fx.Node, Sources]:
        """What owners can be made of again, from the output of a norm."""
        return sources(self)

    @cached_property
    def readers(self) -> dict[fx.Node, list[fx.Node]]:
        """The backward nodes that read the memory of each forward owner, or view it, in order."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.backward:
            for owner in dict.fromkeys(self.owner.get(n) for n in node.all_input_nodes):
                if owner in self.inside:
                    found.setdefault(owner, []).append(node)
        return found

    @cached_property
    def kept(self) -> frozenset[fx.Node]:
        """What is alive when the backward begins: `saved`, and what the step returns."""
        return self.outputs.union(self.saved)

    @cached_property
    def lifetimes(self) -> Lifetimes:
        """When each piece of memory is alive while nothing is changed."""
        return Lifetimes.of(self)

    @cached_property
    def clock(self) -> Clock:
        """When each node starts; asked only once `pace` is known."""
        return Clock.of(self.forward, self.backward, self.pace)

    def workspace(self, node: fx.Node) -> int:
        """Bytes that a node takes beside its results while it runs."""
        return self.temporary.get(node, 0) + workspace_of(node)

    def read_back(self, owners: Collection[fx.Node]) -> list[fx.Node]:
        """The nodes of the backward that read the forward's memory of these owners, in order."""
        found = {node for owner in owners for node in self.readers.get(owner, ())}
        return sorted(found, key=self.lifetimes.place.__getitem__)

    @cached_property
    def reads(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """What each node reads."""
        return {node: tuple(node.all_input_nodes) for node in (*self.forward, *self.backward)}

    @cached_property
    def inside(self) -> frozenset[fx.Node]:
        """The forward nodes as a set."""
        return frozenset(self.forward)

    @cached_property
    def views(self) -> dict[fx.Node, list[fx.Node]]:
        """The forward nodes that lie in the memory of each owner, the owner first."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.forward:
            if node in self.owner:
                found.setdefault(self.owner[node], []).append(node)
        return found

    @cached_property
    def bytes(self) -> dict[fx.Node, int]:
        """Bytes of the memory of each owner, placeholders included."""
        return {
            n: n.meta["val"].untyped_storage().nbytes()
            for n in dict.fromkeys(self.owner.values())
            if isinstance(n.meta.get("val"), Tensor)
        }

    @cached_property
    def active(self) -> frozenset[fx.Node]:
        """Forward nodes whose value depends on parameters or floating inputs."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                value, name = node.meta.get("val"), type(node.meta.get("desc")).__name__
                if isinstance(value, Tensor) and value.is_floating_point() and "Buffer" not in name:
                    found.add(node)
            elif any(n in found for n in node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    def reader(self, owner: fx.Node) -> fx.Node:
        """The first op of the backward that reads an owner's memory, views of it aside."""
        return next(n for n in self.readers[owner] if self.owner.get(n) is not owner)

    def maker(self, owner: fx.Node) -> fx.Node:
        """The op that makes an owner's memory."""
        return owner.args[0] if owner.target is operator.getitem else owner  # pyright: ignore

    def is_view(self, node: fx.Node) -> bool:
        """Whether a node makes no memory of its own."""
        return node in self.owner and self.owner[node] is not node

    def blocked(self, op: fx.Node) -> str | None:
        """Why an op cannot be run again in the backward; None if it can."""
        target = op.target
        if target is dropout_noise or target is NORM or target is operator.getitem:
            return None
        if target is EARLY:
            return "it holds gradients, which are made with the loss"
        if not isinstance(target, OpOverload):
            return f"{target} is no operator whose effects are known"
        schema = target._schema  # pyright: ignore[reportPrivateUsage]
        if schema.is_mutable or target.namespace.startswith("_c10d"):
            return f"{target} has effects beside its result"
        written = [n for n in op.all_input_nodes if self.owner.get(n) in self.changed]
        if written:
            name = getattr(written[0].meta.get("desc"), "target", written[0].name)
            return f"{target} reads {name}, which the step changes"
        return None


def node_key(node: fx.Node) -> str:
    """Where a value comes from: `<module>.<op>`."""
    target: Any = node.args[0].target if node.target is operator.getitem else node.target  # pyright: ignore
    name = target.overloadpacket.__name__ if isinstance(target, OpOverload) else target.__name__
    name = "batch_norm" if target is NORM else name.lstrip("_")
    if node.target is operator.getitem and node.args[1] != 0:
        name += f".{node.args[1]}"
    module = module_of(node) or module_of(node.args[0])  # pyright: ignore
    return f"{module}.{name}" if module else name


def _results(graph: fx.Graph) -> list[Any]:
    """The leaves that the graph returns: forward outputs, then gradients."""
    return pytree.tree_leaves(graph.output_node().args[0], is_leaf=lambda x: x is None)


def _ancestors(nodes: Iterable[Any]) -> set[fx.Node]:
    waiting = [n for n in nodes if isinstance(n, fx.Node)]
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _postpone(graph: fx.Graph, forward: set[fx.Node]) -> None:
    """Move what only the backward needs from the forward's place to its first reader."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = max(order[n] for n in forward)
    for node in reversed(list(graph.nodes)[:last]):
        if node.op == "placeholder" or node in forward:
            continue
        if is_random(node):
            raise CaptureError(
                f"{module_of(node) or 'the model'}: {node.target} draws random numbers that only "
                "the backward reads; they would be drawn in another order than in eager"
            )
        readers = [u for u in node.users if u not in forward]
        if not readers:
            graph.erase_node(node)
            continue
        place = {n: i for i, n in enumerate(graph.nodes)}
        min(readers, key=place.__getitem__).prepend(node)


def _owners(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    first: dict[int, fx.Node] = {}
    owner: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            owner[node] = first.setdefault(storage_of(value), node)
    return owner
