"""Peak bytes of temporaries by liveness over a graph at concrete sizes."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

Sizes = Mapping[Any, int]


@dataclass(frozen=True)
class Peak:
    """The largest sum of live temporaries, the node at which it stands, and who is alive."""

    bytes: int
    node: str
    live: tuple[tuple[str, int], ...]


def tensor_bytes(value: Any, sizes: Sizes) -> int:
    """Bytes of a (fake) tensor, or of all in a nest, with symbols replaced by `sizes`."""
    if isinstance(value, torch.Tensor):
        count = 1
        for dim in value.shape:
            count *= evaluate(dim, sizes)
        return count * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(tensor_bytes(item, sizes) for item in value)
    return 0


def evaluate(dim: Any, sizes: Sizes) -> int:
    """An int or SymInt as a number, its symbols replaced by `sizes` (by symbol name)."""
    if isinstance(dim, int):
        return dim
    expression = dim.node.expr
    return int(expression.subs({s: sizes[s.name] for s in expression.free_symbols}))


def symbols_of(node: fx.Node) -> set[str]:
    """Names of the symbols that the shape of a node's (fake) tensor is made of."""
    value = node.meta.get("val")
    dims: list[Any] = list(value.shape) if isinstance(value, torch.Tensor) else []
    return {s.name for d in dims if not isinstance(d, int) for s in d.node.expr.free_symbols}


def peak_temporaries(graph: fx.Graph, sizes: Sizes) -> Peak:
    """Liveness over `graph` in its order; parameters and inputs are not counted.

    A view keeps its base alive. Each node's own workspace is not known here.
    """
    best, where = 0, ""
    alive: dict[fx.Node, int] = {}
    for node, live in _walk(graph, sizes):
        total = sum(live.values())
        if total > best:
            best, where, alive = total, node.name, dict(live)
    return Peak(best, where, tuple((n.name, b) for n, b in alive.items()))


def live_bytes(graph: fx.Graph, sizes: Sizes) -> dict[str, int]:
    """Bytes of temporaries alive while each node of `graph` runs, by the node's name."""
    return {node.name: sum(live.values()) for node, live in _walk(graph, sizes)}


def _walk(graph: fx.Graph, sizes: Sizes) -> Iterator[tuple[fx.Node, dict[fx.Node, int]]]:
    base = _storages(graph)
    last = _last_uses(graph, base)
    live: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if base[node] is node and node.op not in ("placeholder", "get_attr", "output"):
            live[node] = tensor_bytes(node.meta.get("val"), sizes)
        yield node, live
        for dead in last.get(node, ()):
            live.pop(dead, None)


def _storages(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The node that owns each node's storage: itself, or the base of a view."""
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = _viewed(node)
        base[node] = base[source] if source is not None else node
    return base


def _viewed(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    if node.target is operator.getitem:
        return node.all_input_nodes[0]
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return value
    # `reshape` and `contiguous` alias or copy as strides permit: equal fake storages tell.
    return _same_storage(node)


def _same_storage(node: fx.Node) -> fx.Node | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    for source in node.all_input_nodes:
        other = source.meta.get("val")
        if isinstance(other, torch.Tensor) and _storage_key(other) == _storage_key(value):
            return source
    return None


def _storage_key(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _last_uses(graph: fx.Graph, base: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    final: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        final[base[node]] = node
        for source in node.all_input_nodes:
            final[base[source]] = node
    by_node: dict[fx.Node, list[fx.Node]] = {}
    for owner, node in final.items():
        by_node.setdefault(node, []).append(owner)
    return by_node
