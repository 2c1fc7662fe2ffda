"""Families of ATen calls, and the canonical attention call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from ..ir.ops import attend
from .interface import PADDING

aten = torch.ops.aten

PRODUCTS = {aten.matmul.default, aten.bmm.default}
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
ALIASES = {
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
}
COPIES = {aten.clone.default, aten.contiguous.default, PADDING}
CASTS = {
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}


def schema_of(node: fx.Node) -> torch.FunctionSchema | None:
    """The schema of a registered op's call."""
    target = node.target
    return target._schema if isinstance(target, OpOverload) else None  # pyright: ignore[reportPrivateUsage]


def op_name(node: fx.Node) -> str:
    """ "add" for every overload of aten's add; the function's name for other calls."""
    schema = schema_of(node)
    if schema is None:
        return getattr(node.target, "__name__", "")
    return schema.name.rpartition("::")[2]


def value(node: Any) -> Any:
    """What export knows of a node's result: a fake tensor, a symbolic number, or None."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def attention_node(
    graph: fx.Graph, q: Any, k: Any, v: Any, *, window: int = 0, **arguments: Any
) -> fx.Node:
    """Insert a canonical attention call; arguments that say nothing are left out."""
    defaults = {"mask": None, "bias": None, "sinks": None, "causal": False, "softcap": 0.0}
    spoken = {n: a for n, a in arguments.items() if n not in defaults or a != defaults[n]}
    if window:
        spoken["window"] = (window,)
    node = graph.call_function(attend, (q, k, v), spoken)
    node.meta["op"] = "attention"
    return node


def padding_source(mask: Any) -> Any:
    """The node whose nonzero elements `mask` marks: past copies and casts to bool."""
    while isinstance(mask, fx.Node) and (
        mask.target in COPIES | ALIASES or _to_bool(mask) or _same_matrix(mask)
    ):
        mask = mask.args[0]
    return mask


def _same_matrix(node: fx.Node) -> bool:
    """A view of a [batch, length] mask with its own batch size, as GPT-2 makes."""
    if node.target is not aten.view.default:
        return False
    return value(node.args[0]).dim() == 2 and len(node.args[1]) == 2 and node.args[1][1] == -1  # pyright: ignore


def _to_bool(node: fx.Node) -> bool:
    if node.target in CASTS:
        return value(node).dtype == torch.bool
    return node.target is aten.ne.Scalar and node.args[1] in (0, False)


def call(like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call next to `like`, its result computed on the fake tensors."""
    node = like.graph.call_function(target, args)
    values = map_arg(args, value)
    node.meta = {**like.meta, "val": target(*values)}
    node.meta.pop("op", None)
    return node
