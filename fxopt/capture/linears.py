"""Many spellings of a linear layer become `aten.linear(x, weight, bias)`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .nodes import VIEWS

aten = torch.ops.aten

CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
DEFAULTS: tuple[Any, ...] = ([1], [0], [1], 1)
"""Stride, padding, dilation and groups of a convolution."""
TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.mT.default}


def canonical_linears(graph: fx.Graph) -> None:
    """Rewrite `addmm`, `mm` and `matmul` with a two-dimensional parameter."""
    for node in list(graph.nodes):
        if node.target is aten.addmm.default and not node.kwargs:
            _replace(graph, node, node.args[1], node.args[2], node.args[0])
        elif node.target in (aten.matmul.default, aten.mm.default):
            _replace(graph, node, node.args[0], node.args[1], None)


def parameter(node: Any) -> tuple[fx.Node, bool] | None:
    """(get_attr, whether it is transposed) behind a two-dimensional weight operand."""
    flipped = False
    while isinstance(node, fx.Node) and node.target in TRANSPOSES:
        flipped = not flipped
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    tensor = node.meta.get("val")
    return (node, flipped) if tensor is not None and tensor.dim() == 2 else None


def stored(weight: Any) -> tuple[fx.Node, bool] | None:
    """`parameter`, or the get_attr of a convolution's weight."""
    held = isinstance(weight, fx.Node) and weight.op == "get_attr"
    return (weight, False) if held and weight.meta["val"].dim() > 2 else parameter(weight)


def patch_of(node: fx.Node) -> tuple[int, ...] | None:
    """Kernel sizes of a convolution over whole batches whose strides they are: a linear layer over
    patches. None for every other call."""
    if node.target not in CONVOLUTIONS or node.kwargs:
        return None
    arguments: tuple[Any, ...] = node.args
    x, weight, *given = arguments
    stride, padding, dilation, groups = (*given[1:], *DEFAULTS[max(0, len(given) - 1) :])
    shape = weight.meta["val"].shape
    kernel = tuple(int(size) for size in shape[2:])
    strides = tuple(stride) * (len(kernel) if len(stride) == 1 else 1)
    plain = not any(padding) and groups == 1 and (set(dilation) == {1} or math.prod(kernel) == 1)
    whole = x.meta["val"].dim() == len(shape)
    return kernel if plain and whole and strides == kernel else None


def free_layouts(graph: fx.Graph) -> None:
    """Let views copy where they must: a rewritten convolution may return channels last."""
    if any(patch_of(node) for node in graph.nodes):
        for node in graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default


def _replace(graph: fx.Graph, node: fx.Node, x: Any, weight: Any, bias: Any) -> None:
    found = parameter(weight)
    if found is None or (bias is not None and not _is_bias(bias, node)):
        return
    held, flipped = found
    last, x = _without_views(node, x)
    with graph.inserting_before(node):
        if not flipped:
            stored = held
            held = graph.call_function(aten.t.default, (stored,))
            held.meta = {**node.meta, "val": stored.meta["val"].t()}
        arguments = (x, held) if bias is None else (x, held, bias)
        new = graph.call_function(aten.linear.default, arguments)
    new.meta = {**node.meta, "val": last.meta["val"]}
    last.replace_all_uses_with(new)
    for old in dict.fromkeys((last, node)):
        graph.erase_node(old)


def _is_bias(bias: Any, node: fx.Node) -> bool:
    shape = bias.meta["val"].shape
    return len(shape) == 1 and shape[0] == node.meta["val"].shape[-1]


def _without_views(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Skip `view(-1, in)` before and the view that restores the leading sizes after."""
    if x.target not in VIEWS or len(node.users) != 1:
        return node, x
    after = next(iter(node.users))
    source = x.args[0]
    if after.target not in VIEWS or not isinstance(source, fx.Node):
        return node, x
    before, result = source.meta["val"].shape, after.meta["val"].shape
    same = [str(a) for a in before[:-1]] == [str(b) for b in result[:-1]]
    whole = str(before[-1]) == str(x.meta["val"].shape[-1])
    kept = str(result[-1]) == str(node.meta["val"].shape[-1])
    return (after, source) if same and whole and kept else (node, x)
