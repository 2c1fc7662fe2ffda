"""Parts of a graph computed at chosen sizes, to see what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .names import attribute

Sizes = Mapping[str, int]
_SYMBOLIC = (SymInt, SymFloat, SymBool)


class Unknown(Exception):
    """The value depends on an input that was not given."""


def size_at(size: Any, sizes: Sizes) -> int:
    """A traced size, number or symbol, at concrete sizes of the symbols."""
    if not isinstance(size, _SYMBOLIC):
        return size
    expression = size.node.expr
    known = {s: sizes[str(s)] for s in expression.free_symbols if str(s) in sizes}
    result = expression.subs(known)
    if result.free_symbols:
        raise Unknown(str(result))
    return bool(result) if isinstance(size, SymBool) else int(result)


def shape_at(node: fx.Node, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a node's result at concrete sizes."""
    return tuple(size_at(size, sizes) for size in node.meta["val"].shape)


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number that follows from the inputs' shapes alone."""
    value = node.meta.get("val")
    return isinstance(value, (*_SYMBOLIC, int, torch.device))


def ancestors(node: fx.Node, cut: Mapping[fx.Node, Any] | None = None) -> list[fx.Node]:
    """What `node` is computed from, itself included, in order; sizes and `cut` are not entered."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        if not is_size(current) and current not in (cut or {}):
            waiting += current.all_input_nodes
    return [n for n in node.graph.nodes if n in found]


def runs_on(device: torch.device) -> torch.device:
    """Where what was traced on `device` is computed: the meta device computes nothing."""
    return torch.device("cpu") if device.type == "meta" else device


def evaluate(
    graph: fx.GraphModule, node: fx.Node, sizes: Sizes, given: Mapping[fx.Node, Any] | None = None
) -> Any:
    """The value of `node` with symbols at `sizes` and the nodes of `given` as given.

    Raises Unknown when it depends on any other input.
    """
    values: dict[fx.Node, Any] = dict(given or {})
    for current in ancestors(node, given):
        if current in values:
            continue
        if is_size(current):
            traced = current.meta["val"]
            device = isinstance(traced, torch.device)
            values[current] = runs_on(traced) if device else size_at(traced, sizes)
        elif current.op == "get_attr":
            values[current] = attribute(graph, str(current.target))
            if values[current].device.type == "meta":
                raise Unknown(f"{current.target}, which has no values")
        elif current.op == "call_function":
            args = _computed(map_arg(current.args, values.__getitem__))
            kwargs = _computed(map_arg(current.kwargs, values.__getitem__))
            values[current] = current.target(*args, **kwargs)  # pyright: ignore
        else:
            raise Unknown(current.name)
    return values[node]


def _computed(arguments: Any) -> Any:
    return pytree.tree_map_only(torch.device, runs_on, arguments)


def reads_inputs(node: fx.Node) -> bool:
    """Whether the value, not only its shape, follows from the model's inputs."""
    return any(
        n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor) for n in ancestors(node)
    )
