"""Norms with their weight, and with the sum that they read, as one call.

CUDA runs it as one kernel; where a gradient is needed or `torch.compile` looks on, it is the calls
that it stands for.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from ..ir.ops import add_rms_norm, rms_norm
from .facts import tensor_facts
from .norms import HALVES, erase

aten = torch.ops.aten


class _Norm(NamedTuple):
    """`result` is x over its root mean square, times `weight`."""

    result: fx.Node
    x: fx.Node
    weight: fx.Node
    epsilon: float


def fuse_residuals(graph: fx.Graph) -> None:
    """Write weight * rms_norm(x) as one call, and with x = a + b as one that gives both.

    A sum of another module than the one that calls the norm stays a call of its own: layers
    would hand on two values, and each read a weight of the next.
    """
    for node in graph.find_nodes(op="call_function", target=aten.rms_norm.default):
        norm = _match(node)
        if norm is None:
            continue
        if _is_sum(norm.x) and _calls(norm.x, node):
            _join_sum(graph, norm)
        elif norm.result is not node:
            _replace(graph, norm.result, norm.result, rms_norm, norm[1:])


def _match(node: fx.Node) -> _Norm | None:
    x, sizes, weight, epsilon = (*node.args, None, None)[:4]
    known = tensor_facts(x)
    if known is None or not isinstance(epsilon, float) or list(sizes) != [known.shape[-1]]:  # pyright: ignore
        return None
    result = node
    if weight is None:
        result = next(iter(node.users)) if len(node.users) == 1 else node
        if result.target is not aten.mul.Tensor:
            return None
        weight = result.args[1] if result.args[0] is node else result.args[0]
    elif known.dtype in HALVES:
        return None  # not rounded before the weight
    held = isinstance(weight, fx.Node) and weight.op == "get_attr"
    if not held or tensor_facts(weight) != (known.dtype, (known.shape[-1],)):
        return None
    return _Norm(result, x, weight, epsilon)  # pyright: ignore[reportArgumentType]


def _is_sum(node: fx.Node) -> bool:
    known = tensor_facts(node)
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    return all(isinstance(x, fx.Node) and tensor_facts(x) == known for x in node.args)


def _calls(outer: fx.Node, inner: fx.Node) -> bool:
    """Whether the module call that `outer` belongs to is, or makes, that of `inner`."""
    stacks: Any = [list(n.meta.get("nn_module_stack") or ()) for n in (outer, inner)]
    return stacks[1][: len(stacks[0])] == stacks[0]


def _join_sum(graph: fx.Graph, norm: _Norm) -> None:
    total: Any = norm.x
    if total < norm.weight:  # else it may stand before other readers
        total.prepend(norm.weight)
    with graph.inserting_before(total):
        both = graph.call_function(add_rms_norm, (*total.args, norm.weight, norm.epsilon))
    both.meta = {**total.meta, "facts": 2}
    _replace(graph, total, norm.result, operator.getitem, (both, 1))
    _replace(graph, total, total, operator.getitem, (both, 0))


def _replace(graph: fx.Graph, place: fx.Node, old: fx.Node, target: Any, args: Any) -> None:
    """Let a call before `place` stand for `old`."""
    with graph.inserting_before(place):
        new = graph.call_function(target, tuple(args))
    new.meta = {**place.meta, "facts": tensor_facts(old)}
    old.replace_all_uses_with(new)
    erase(graph, old)
