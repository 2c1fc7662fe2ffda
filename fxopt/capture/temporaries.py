"""Large intermediates that token-wise computation need not hold for all tokens at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.site import Site, TemporaryInfo
from .captured import Captured
from .nodes import op_name, schema_of
from .rows import Rows
from .shapes import fixed

aten = torch.ops.aten
LINEAR = aten.linear.default

# Each row of the last axis is computed from the same row of the inputs.
TOKENWISE = {
    "add", "sub", "mul", "div", "neg", "pow", "square", "exp", "log", "sqrt", "rsqrt", "abs",
    "relu", "gelu", "silu", "sigmoid", "tanh", "erf", "softplus", "hardswish", "hardtanh", "mish",
    "leaky_relu", "elu", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "linear",
    "layer_norm", "rms_norm", "glu", "_to_copy", "to", "where", "mean", "sum", "slice", "chunk",
    "split", "split_with_sizes", "narrow", "cat", "dropout", "log_softmax", "softmax", "t",
}  # fmt: skip
LAST_AXIS = {"mean": 1, "sum": 1, "slice": 1, "chunk": 2, "split": 2, "split_with_sizes": 2}


def temporary_sites(captured: Captured) -> list[Site]:
    """One site for each MLP, named after the module around it, and one for a head's logits."""
    graph, rows = captured.graph.graph, Rows(captured)
    found = [*_mlps(graph, rows), *_heads(graph, rows)]
    names = [name for name, *_ in found]
    sites: list[Site] = []
    for i, (name, node, info) in enumerate(found):
        key = f"{name}#{names[:i].count(name)}" if names.count(name) > 1 else name
        sites.append(Site("activation", key, node.name, info, op=key))
    return sites


def _mlps(graph: fx.Graph, rows: Rows) -> Iterable[tuple[str, fx.Node, TemporaryInfo]]:
    """A linear whose input leads back, token by token, to linears that share one input."""
    for node in graph.nodes:
        inner = _between(node) if node.target is LINEAR else None
        if inner is None:
            continue
        wide = max(inner, key=_features)
        if _features(wide) <= _features(node):
            continue
        yield _around([*inner, node]), node, _info("mlp", [*inner, node], rows)


def _between(last: fx.Node) -> list[fx.Node] | None:
    """The nodes from the first linears up to `last`, in order.

    None if there is no other linear, a step mixes tokens, or a result is read elsewhere too.
    """
    waiting, found = [last.args[0]], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in found or node.op == "get_attr":
            continue
        if not _tokenwise(node):
            return None
        found.add(node)
        if node.target is not LINEAR:
            waiting += node.all_input_nodes
    inside = {*found, last}
    sources = {id(n.args[0]) for n in found if n.target is LINEAR}
    if len(sources) != 1 or any(not inside.issuperset(n.users) for n in found):
        return None
    return [n for n in last.graph.nodes if n in found]


def _around(nodes: list[fx.Node]) -> str:
    """The innermost module that holds all of `nodes`; the last one's own where it is the root."""
    paths = [node.meta["fqn"].split(".") for node in nodes]
    columns = list(zip(*paths, strict=False))
    end = next((i for i, parts in enumerate(columns) if len(set(parts)) > 1), len(columns))
    return ".".join(paths[0][:end]) or nodes[-1].meta["fqn"]


def _tokenwise(node: fx.Node) -> bool:
    name = op_name(node)
    if name == "getitem":
        return True
    if name not in TOKENWISE or schema_of(node) is None:
        return False
    return _dims(node) <= {-1, _rank(node.args[0]) - 1}


def _dims(node: fx.Node) -> set[int]:
    """Axes that an op of `LAST_AXIS`, or a `cat`, works on."""
    name = op_name(node)
    if name == "cat":
        return {node.args[1] if len(node.args) > 1 else 0}  # pyright: ignore
    if name not in LAST_AXIS and "softmax" not in name and name != "glu":
        return set()
    place = LAST_AXIS.get(name, 1)
    default: Any = 0 if name in LAST_AXIS else -1
    axes: Any = node.args[place] if len(node.args) > place else default
    return set(axes) if isinstance(axes, list | tuple) else {axes}


def _rank(node: Any) -> int:
    held = node.meta.get("val") if isinstance(node, fx.Node) else None
    return held.dim() if isinstance(held, Tensor) else -1


def _heads(graph: fx.Graph, rows: Rows) -> Iterable[tuple[str, fx.Node, TemporaryInfo]]:
    """A linear without a successor whose output is wider than its input: logits."""
    for node in graph.output_node().all_input_nodes:
        wider = node.target is LINEAR and _features(node) > _features(node.args[0])
        if wider and _rank(node) > 2:
            yield node.meta["fqn"], node, _info("head", [node], rows)


def _info(kind: Any, nodes: list[fx.Node], rows: Rows) -> TemporaryInfo:
    names = tuple(node.name for node in nodes)
    positions = rows.of_item(nodes[-1].meta["val"].shape[:-1])
    return TemporaryInfo(kind, names, _widest(nodes), _row_bytes(nodes[-1]), positions)


def _widest(nodes: list[fx.Node]) -> int:
    """Bytes a token of the results of `nodes` at the moment when most are alive."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        views = (source for source in node.all_input_nodes if _shares_storage(node, source))
        source = next(views, node)
        owner[node] = owner.get(source, node)
    last = {owner[s]: node for node in nodes for s in node.all_input_nodes if s in owner}
    alive: dict[fx.Node, int] = {}
    widest = 0
    for node in nodes:
        alive.setdefault(owner[node], _row_bytes(owner[node]))
        widest = max(widest, sum(alive.values()))
        for dead in [n for n in alive if last.get(n) is node]:
            del alive[dead]
    return widest


def _shares_storage(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` is a view of `source`: a piece of it, or its fake storage itself."""
    if op_name(node) == "getitem":
        return True
    mine, its = (n.meta.get("val") for n in (node, source))
    if not isinstance(mine, Tensor) or not isinstance(its, Tensor):
        return op_name(node) in {"chunk", "split", "split_with_sizes"}
    return mine.untyped_storage()._cdata == its.untyped_storage()._cdata  # pyright: ignore


def _row_bytes(node: fx.Node) -> int:
    held = node.meta.get("val")
    return _features(node) * held.element_size() if isinstance(held, Tensor) else 0


def _features(node: Any) -> int:
    held = node.meta.get("val")
    if not isinstance(held, Tensor) or held.dim() == 0:
        return 0
    size = held.shape[-1]
    return fixed(size) or 0
