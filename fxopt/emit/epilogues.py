"""What follows the product of a rewritten linear layer as part of its call: the kernel that stores
the product does it.

    y = gated(quantized_linear(x, gate), quantized_linear(x, up), "silu")
    y = residual + gelu(quantized_linear(x, weight))

The op rounds where the calls that it replaces round, and has their gradients. A runtime that reads
an ONNX file joins what it can by itself: `separate` makes calls of their own again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ir.ops import gated
from .facts import tensor_facts
from .gates import activation_of
from .norms import erase
from .targets import is_quiet

aten = torch.ops.aten
_CALLS: dict[str, tuple[Any, dict[str, str]]] = {
    "silu": (aten.silu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "relu": (aten.relu.default, {}),
}
_SECOND: dict[str, tuple[str, ...]] = {
    "fxopt.quantized_linear.default": ("up_packed", "up_scale", "up_zero", "up_bias"),
    "fxopt.low_rank_linear.default": ("second_down", "second_up", "second_bias"),
    "fxopt.fp8_linear.default": ("up_weight", "up_scale", "up_bias"),
    "fxopt.monarch_linear.default": (),
}
"""Products that take an activation and a residual, and their arguments of a second weight, in the
order in which those of the first one follow x."""


def fuse_epilogues(graph: fx.Graph) -> None:
    """Join products with their gate, their activation and the sum that reads them, each where
    nothing else reads what is in between."""
    for node in graph.find_nodes(op="call_function", target=gated):
        gate, up, activation = node.args
        if _are_alike(gate, up) and is_quiet(gate, node) and is_quiet(up, node):
            _join(graph, node, gate, up, activation)
    for node in _products(graph):
        _take_activation(graph, node)
        _take_residual(graph, node)


def separate(graph: fx.Graph) -> None:
    """The inverse: each product, activation and sum as a call of its own."""
    for node in _products(graph):
        if node.kwargs:
            with graph.inserting_before(node):
                last = _spell_out(graph, node)
            node.replace_all_uses_with(last)
            graph.erase_node(node)


def _spell_out(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The calls that `node` stands for; returns the last."""
    given: dict[str, Any] = dict(node.kwargs)

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.call_function(target, args, kwargs)
        new.meta = dict(node.meta)
        return new

    y, activation = call(node.target, *node.args), given.get("activation", "")
    names = _SECOND[str(node.target)]
    if names and names[0] in given:
        weight = (given.get(name) for name in names)
        up = call(node.target, node.args[0], *weight, *node.args[1 + len(names) :])
        up.meta |= _of_weight(node, str(given[names[0]].target))
        y = call(gated, y, up, activation)
    elif activation:
        target, kwargs = _CALLS[activation]
        y = call(target, y, **kwargs)
    return call(aten.add.Tensor, y, given["residual"]) if "residual" in given else y


def _of_weight(node: fx.Node, target: str) -> dict[str, str]:
    """Where a second weight is from: what says the first's module of `node` says its module."""
    first: Any = node.args[1]
    own, other = (name.rpartition(".")[0] for name in (str(first.target), target))
    return {name: other for name in ("fqn", "site") if node.meta.get(name) == own}


def _products(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if _is_product(node)]


def _is_product(node: Any) -> bool:
    # By name: an op is registered by the rewrite that calls it.
    return isinstance(node, fx.Node) and str(node.target) in _SECOND


def _are_alike(gate: Any, up: Any) -> bool:
    """Whether two products are of one x with weights of one kind, and read by the gate alone."""
    both = gate is not up and all(
        _is_product(node) and not node.kwargs and len(node.users) == 1 for node in (gate, up)
    )
    if not both or gate.target is not up.target:
        return False
    names = _SECOND[str(gate.target)]
    rest = 1 + len(names)
    return bool(names) and gate.args[0] is up.args[0] and gate.args[rest:] == up.args[rest:]


def _join(graph: fx.Graph, node: fx.Node, gate: fx.Node, up: fx.Node, activation: Any) -> None:
    """One call in the place of the gate, which belongs to the module that has both weights."""
    names = _SECOND[str(gate.target)]
    weight = zip(names, up.args[1 : 1 + len(names)], strict=True)
    second = {name: value for name, value in weight if value}
    with graph.inserting_before(node):
        new = graph.call_function(
            gate.target,  # pyright: ignore[reportArgumentType]
            gate.args,
            {"activation": activation, **second},
        )
    new.meta = {**gate.meta, "nn_module_stack": node.meta.get("nn_module_stack")}
    node.replace_all_uses_with(new)
    erase(graph, node)


def _take_activation(graph: fx.Graph, node: fx.Node) -> None:
    user = _only_user(node)
    name = "relu" if user is not None and user.target is aten.relu.default else activation_of(user)
    if user is not None and name is not None and not node.kwargs:
        node.kwargs = {"activation": name}
        _stand_for(graph, node, user)


def _take_residual(graph: fx.Graph, node: fx.Node) -> None:
    """Add what is there before the product; else the call would have to wait for it."""
    total = _only_user(node)
    if total is None or total.target is not aten.add.Tensor or total.kwargs:
        return
    other = total.args[1] if total.args[0] is node else total.args[0]
    known = tensor_facts(node)
    fits = known is not None and tensor_facts(other) == known == tensor_facts(total)
    if fits and isinstance(other, fx.Node) and other < node and is_quiet(node, total):
        node.kwargs = {**node.kwargs, "residual": other}
        _stand_for(graph, node, total)


def _stand_for(graph: fx.Graph, node: fx.Node, user: fx.Node) -> None:
    """Let `node` give what its only user gave."""
    user.replace_all_uses_with(node)
    graph.erase_node(user)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
