"""Grouping the nodes of a flat graph into nested calls of the original's modules.

A frame is one call of one module. Nodes that only name something (parameters, lengths, one layer's
state) float: they are written wherever they are read. A module call whose nodes cannot stand
together is dissolved into its caller.
"""

from __future__ import annotations

import heapq
import operator
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx

from .facts import facts
from .targets import mutates
from .tree import Tree

Call = tuple[str, str]
"""(qualified name, call index) of one module call."""
Path = tuple[Call, ...]


@dataclass
class Frame:
    """One call of the module `module` (a key of the tree), reached as `path` from its caller."""

    module: str
    path: str
    items: list[fx.Node | Frame] = field(default_factory=list)

    @property
    def own(self) -> set[fx.Node]:
        """The nodes of the call itself."""
        return {item for item in self.items if isinstance(item, fx.Node)}

    def nodes(self) -> Iterator[fx.Node]:
        """All nodes of the call, those of inner calls included."""
        for item in self.items:
            if isinstance(item, Frame):
                yield from item.nodes()
            else:
                yield item


@dataclass
class Framing:
    """The root frame, and for nodes that were a whole module call the name of that module."""

    root: Frame
    hints: dict[fx.Node, str]


def frame(graph: fx.Graph, tree: Tree) -> Framing:
    """Nest the calls of `graph` into frames; floating nodes are left out."""
    body = [n for n in graph.nodes if n.op == "call_function" and not floats(n)]
    paths = _paths(body, tree)
    hints: dict[fx.Node, str] = {}
    _dissolve_single(paths, hints)
    order = {node: index for index, node in enumerate(body)}
    writers = {node for node in body if mutates(node)}
    builder = _Builder(tree, paths, order, writers)
    return Framing(builder.build("", "", body, 0), hints)


def floats(node: fx.Node) -> bool:
    """Whether a node only names something and is written in place where it is read."""
    if node.op in ("get_attr", "placeholder"):
        return True
    if node.op != "call_function":
        return False
    source = node.args[0] if node.args else None
    if node.target is torch.ops.aten.sym_size.int or is_size_arithmetic(node):
        return True
    if not (isinstance(source, fx.Node) and source.op == "placeholder"):
        return False
    return node.target is getattr or state_index(node) is not None


def is_size_arithmetic(node: fx.Node) -> bool:
    """Whether a node computes a length from other lengths."""
    return node.target in _ARITHMETIC and isinstance(facts(node), str)


_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod)


def state_index(node: fx.Node) -> int | None:
    """i where the node is `past[i]`."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return None
    source: Any = node.args[0]
    return node.args[1] if source.op == "placeholder" and source.target == "past" else None


def _paths(body: Sequence[fx.Node], tree: Tree) -> dict[fx.Node, Path]:
    paths: dict[fx.Node, Path] = {}
    for node in body:
        stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        if stack and not next(iter(stack)).startswith("_empty"):
            paths[node] = tuple(
                (_name(fqn.partition("@")[0], tree), key.partition("@")[2])
                for key, (fqn, _) in stack.items()
                if fqn
            )
    for node in reversed(body):
        if node not in paths:
            users = [paths[user] for user in node.users if user in paths]
            paths[node] = _common(users)
    return paths


def _name(fqn: str, tree: Tree) -> str:
    """The name of a module that export reached through a slice: `h.slice(1, None, None).0`."""
    while match := _SLICE.search(fqn):
        container = tree.module_id(match[1])
        if container is None:
            return fqn
        bounds = (None if part == "None" else int(part) for part in match[2].split(", "))
        chosen = list(tree.modules[container].children)[slice(*bounds)]
        fqn = f"{match[1]}.{chosen[int(match[3])]}{fqn[match.end() :]}"
    return fqn


_SLICE = re.compile(r"^(.*?)\.slice\(([^)]*)\)\.(\d+)")


def _common(paths: Sequence[Path]) -> Path:
    if not paths:
        return ()
    shortest = min(paths, key=len)
    for depth, call in enumerate(shortest):
        if any(path[depth] != call for path in paths):
            return shortest[:depth]
    return shortest


def _dissolve_single(paths: dict[fx.Node, Path], hints: dict[fx.Node, str]) -> None:
    """A module call of one node becomes that node in the caller, named after the module."""
    members: dict[Path, list[fx.Node]] = defaultdict(list)
    for node, path in paths.items():
        for depth in range(1, len(path) + 1):
            members[path[:depth]].append(node)
    for node, path in paths.items():
        while path and len(members[path]) == 1:
            name = path[-1][0].rpartition(".")[2]
            if not name.isdigit():
                hints[node] = name
            path = path[:-1]
        paths[node] = path


@dataclass
class _Builder:
    tree: Tree
    paths: dict[fx.Node, Path]
    order: dict[fx.Node, int]
    writers: set[fx.Node]

    def build(self, module: str, path: str, nodes: Sequence[fx.Node], depth: int) -> Frame:
        """The frame of one call: `nodes` are all its nodes, whose paths agree up to `depth`."""
        known = self.tree.local_modules(module)
        unknown: set[Call] = set()
        while True:
            groups = self._group(nodes, depth, known, unknown)
            ordered = self._arrange(groups)
            if isinstance(ordered, list):
                break
            unknown |= ordered
        result = Frame(module, path)
        for call, members in ordered:
            if call is None:
                result.items.extend(members)
                continue
            child = self.tree.module_id(call[0])
            assert child is not None
            result.items.append(self.build(child, known[child], members, depth + 1))
        return result

    def _group(
        self, nodes: Sequence[fx.Node], depth: int, known: dict[str, str], unknown: set[Call]
    ) -> list[tuple[Call | None, list[fx.Node]]]:
        groups: dict[Any, tuple[Call | None, list[fx.Node]]] = {}
        for node in nodes:
            path = self.paths[node]
            while len(path) > depth and (
                path[depth] in unknown or self.tree.module_id(path[depth][0]) not in known
            ):
                path = path[:depth] + path[depth + 1 :]
            self.paths[node] = path
            call = path[depth] if len(path) > depth else None
            groups.setdefault(call or node, (call, []))[1].append(node)
        return list(groups.values())

    def _arrange(
        self, groups: list[tuple[Call | None, list[fx.Node]]]
    ) -> list[tuple[Call | None, list[fx.Node]]] | set[Call]:
        """The groups in an order that computes everything before its use, or, when there is
        none, the calls that have to be dissolved."""
        home = {node: index for index, (_, members) in enumerate(groups) for node in members}
        links = nx.DiGraph()
        links.add_nodes_from(range(len(groups)))
        for node, index in home.items():
            for source in self._sources(node):
                if home.get(source, index) != index:
                    links.add_edge(home[source], index)
        self._add_barriers(links, home)
        if not nx.is_directed_acyclic_graph(links):
            tangled = (part for part in nx.strongly_connected_components(links) if len(part) > 1)
            return {
                call for part in tangled for call in (groups[index][0] for index in part) if call
            }
        first = [min(self.order[node] for node in members) for _, members in groups]
        ready = [(first[index], index) for index in links if not links.in_degree(index)]
        waiting = dict(links.in_degree())
        heapq.heapify(ready)
        ordered: list[tuple[Call | None, list[fx.Node]]] = []
        while ready:
            _, index = heapq.heappop(ready)
            ordered.append(groups[index])
            for later in links.successors(index):
                waiting[later] -= 1
                if not waiting[later]:
                    heapq.heappush(ready, (first[later], later))
        return ordered

    def _sources(self, node: fx.Node) -> Iterator[fx.Node]:
        for source in node.all_input_nodes:
            if source.op == "call_function" and floats(source):
                yield from self._sources(source)
            else:
                yield source

    def _add_barriers(self, links: Any, home: Mapping[fx.Node, int]) -> None:
        """Nothing passes a call that writes to a tensor."""
        writers = [(self.order[n], group) for n, group in home.items() if n in self.writers]
        if not writers:
            return
        places: dict[int, list[int]] = defaultdict(list)
        for node, group in home.items():
            places[group].append(self.order[node])
        for written, writer in writers:
            for group, orders in places.items():
                if group != writer and min(orders) < written:
                    links.add_edge(group, writer)
                if group != writer and max(orders) > written:
                    links.add_edge(writer, group)
