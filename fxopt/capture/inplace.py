"""Calls that overwrite a temporary become calls that return a new one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .nodes import op_name, schema_of


def without_overwriting(graph: fx.Graph) -> None:
    """Replace `relu_`, `add_` and the like where nothing else can see the overwritten tensor.

    Inputs, buffers and tensors with other views keep the in-place call: there it is meant.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = _functional(node)
        source = node.args[0] if node.args else None
        if target is None or not isinstance(source, fx.Node) or not _own(source, node):
            continue
        for user in list(source.users):
            if order[user] > order[node]:
                user.replace_input_with(source, node)
        node.target = target


def _functional(node: fx.Node) -> Any:
    """The same op without the trailing underscore, or None."""
    schema = schema_of(node)
    if schema is None or not schema.is_mutable or not schema.name.startswith("aten::"):
        return None
    name = op_name(node)
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, schema.overload_name or "default", None)


def _own(source: fx.Node, node: fx.Node) -> bool:
    """Whether `source` is fresh memory that only `node` overwrites and nobody holds a view of."""
    others = [user for user in source.users if user is not node]
    return _fresh(source) and all(_fresh(user) or user.op == "output" for user in others)


def _fresh(node: fx.Node) -> bool:
    schema = schema_of(node)
    return schema is not None and all(result.alias_info is None for result in schema.returns)
