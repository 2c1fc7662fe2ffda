"""Products with the weights of several experts, stacked in one parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, fx, nn

from ..ir.site import ExpertsInfo, Site
from .linears import TRANSPOSES
from .names import attribute

aten = torch.ops.aten


def is_experts(node: fx.Node) -> bool:
    """A product with the weights of several experts, stacked in one parameter."""
    if not _grouped(node) and node.target is not aten.bmm.default:
        return False
    held = behind(node.args[1])
    return held.op == "get_attr" and held.meta["val"].dim() == 3


def behind(node: Any) -> fx.Node:
    """What a chain of transpositions starts from."""
    while node.target in TRANSPOSES:
        node = node.args[0]
    return node


def experts_site(graph: fx.GraphModule, node: fx.Node, key: str) -> Site | None:
    """The site of a grouped product of sorted rows and nothing besides; None for others."""
    if not is_experts(node) or not _grouped(node) or _more(node):
        return None
    held = behind(node.args[1])
    parameter = isinstance(attribute(graph, str(held.target)), nn.Parameter)
    if not parameter or len(held.users) > 1:
        return None
    x, weight = (value.meta["val"] for value in node.args[:2])  # pyright: ignore
    count, columns, rows = (int(size) for size in weight.shape)
    chosen = _factor(x.shape[0])
    info = ExpertsInfo(str(held.target), count, chosen, columns, rows, x.dtype)
    return Site("linear", key, node.name, info, op=key)


def _grouped(node: fx.Node) -> bool:
    return "grouped_mm" in str(node.target)


def _more(node: fx.Node) -> bool:
    """Whether it is given a bias, or another dtype to return."""
    given = {**dict(enumerate(node.args[3:])), **node.kwargs}
    return any(value is not None for name, value in given.items() if name != "offs")


def _factor(size: Any) -> int:
    """How often each token is a row: the number in 2 * batch * length."""
    if not isinstance(size, SymInt):
        return 1
    number, _ = size.node.expr.as_coeff_Mul()
    return max(1, int(number))
