"""The tensors that a graph reads, by their qualified names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn


def read(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor that a get_attr node of `gm` reads; the objects themselves."""
    return {
        str(node.target): attribute(gm, str(node.target))
        for node in gm.graph.nodes
        if node.op == "get_attr"
    }


def write_back(attributes: dict[str, Tensor], graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module that runs `graph` over `attributes`, parameters being the same objects."""
    holder: dict[str, Any] = dict(attributes)
    return fx.GraphModule(holder, graph, name)


def attribute(root: nn.Module, path: str) -> Any:
    """The object at a dotted path below `root`."""
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found
