"""Gated feed-forward units as one call, which CUDA runs as one kernel.

Where a gradient is needed or `torch.compile` looks on, the call is the two that it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ir.ops import gated
from .facts import tensor_facts
from .norms import put
from .targets import is_quiet

aten = torch.ops.aten


def fuse_gates(graph: fx.Graph) -> None:
    """Write silu(gate) * up, and gelu, as `gated(gate, up, activation)`."""
    for product in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        if (found := _match(product)) is not None:
            put(graph, product, gated, found)


def _match(product: fx.Node) -> tuple[fx.Node, fx.Node, str] | None:
    for active, up in (product.args, product.args[::-1]):
        name = activation_of(active)
        if name is None or not isinstance(active, fx.Node) or not isinstance(up, fx.Node):
            continue
        gate: Any = active.args[0]
        known = tensor_facts(gate)
        # What else reads the activation would compute it again.
        alike = known is not None and tensor_facts(up) == known
        if alike and len(active.users) == 1 and is_quiet(active, product):
            return gate, up, name
    return None


def activation_of(node: Any) -> str | None:
    """The name by which `gated` knows an activation."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.silu.default:
        return "silu"
    if node.target is not aten.gelu.default or len(node.args) > 1:
        return None
    how = node.kwargs.get("approximate", "none")
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(how))
