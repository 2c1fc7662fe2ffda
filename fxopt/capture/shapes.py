"""Sizes: each symbol is read once, from one input."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor, fx

aten = torch.ops.aten


def symbol(size: Any) -> str | None:
    """The name of the symbol that a size is, if it is exactly one."""
    if not isinstance(size, SymInt):
        return None
    expression = size.node.expr
    return str(expression) if expression.is_symbol else None


def fixed(size: Any) -> int | None:
    """A size as a number, if the trace fixed it; export may keep a symbol that it knows equal."""
    if isinstance(size, SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else None
    return size


def free_symbols(size: Any) -> list[str]:
    """The names of the symbols that a size depends on."""
    return sorted(map(str, size.node.expr.free_symbols)) if isinstance(size, SymInt) else []


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The tensor inputs, in order."""
    nodes = graph.find_nodes(op="placeholder")
    return [n for n in nodes if isinstance(n.meta.get("val"), Tensor)]


def symbol_sources(graph: fx.Graph, avoid: str = "attention_mask") -> dict[str, tuple[str, int]]:
    """symbol -> (input, dim) it is read from; an input named `avoid` only if there is no other."""
    sources: dict[str, tuple[str, int]] = {}
    for node in sorted(placeholders(graph), key=lambda n: avoid in str(n.target)):
        for dim, size in enumerate(node.meta["val"].shape):
            name = symbol(size)
            if name is not None:
                sources.setdefault(name, (str(node.target), dim))
    return sources


def read_sizes_once(graph: fx.Graph) -> None:
    """Replace each size that is one symbol by one `sym_size` of the input it comes from."""
    sources = symbol_sources(graph)
    inputs = {str(n.target): n for n in placeholders(graph)}
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
    if last is None:
        return
    reads: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not aten.sym_size.int:
            continue
        name = symbol(node.meta.get("val"))
        if name not in sources:
            continue
        if name not in reads:
            source, dim = sources[name]
            with graph.inserting_after(last):
                reads[name] = graph.call_function(aten.sym_size.int, (inputs[source], dim))
            reads[name].meta["val"] = node.meta["val"]
            last = reads[name]
        node.replace_all_uses_with(reads[name])
        graph.erase_node(node)


def static_dims(graph: fx.Graph) -> tuple[str, ...]:
    """Input dimensions that the trace fixed, as text."""
    return tuple(
        f"{node.target} dim {dim} = {size}"
        for node in placeholders(graph)
        for dim, size in enumerate(node.meta["val"].shape)
        if fixed(size) is not None
    )
