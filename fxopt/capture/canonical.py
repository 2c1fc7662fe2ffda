"""From what torch.export wrote to the canonical graph: few spellings, no noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

from ..ir.errors import CaptureError
from .attention import match_attention
from .inplace import without_overwriting
from .interface import PADDING, TRACED
from .linears import canonical_linears, free_layouts
from .names import locate, name_parameters
from .nodes import ALIASES, CASTS, COPIES, attention_node, padding_source, schema_of, value
from .shapes import read_sizes_once

aten = torch.ops.aten
FOREVER = 1 << 62

ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_async.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}


def canonicalize(gm: fx.GraphModule, model: nn.Module, inputs: list[str]) -> fx.GraphModule:
    """The canonical graph of `gm`, an exported program's module; parameters are `model`'s own.

    `inputs` are the names of the arguments, tensors or not, in the order of the placeholders.
    """
    graph = gm.graph
    for node, name in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.target = name
    _inline_regions(gm)
    _drop_assertions(graph)
    _drop_constants_inputs(graph)
    _replace_attention(graph)
    # Idle dropout returns its input: gone before anyone asks who owns a tensor.
    _drop_no_ops(graph)
    without_overwriting(graph)
    _drop_copies(graph)
    read_sizes_once(graph)
    _follow_inputs_device(graph)
    locate(graph)
    attributes = name_parameters(gm, model)
    flatten_output(graph)
    canonical = fx.GraphModule(attributes, graph, type(model).__name__)
    canonical_linears(graph)
    free_layouts(graph)
    match_attention(canonical)
    graph.eliminate_dead_code()
    read = {str(n.target): attributes[str(n.target)] for n in graph.find_nodes(op="get_attr")}
    return fx.GraphModule(read, graph, type(model).__name__)


def _inline_regions(gm: fx.GraphModule) -> None:
    """Splice in the bodies of `no_grad` and disabled `autocast` regions."""
    for node in list(gm.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if name == "wrap_with_set_grad_enabled":
            _, body, *inputs = node.args
        elif name == "wrap_with_autocast":
            _, _, enabled, _, body, *inputs = node.args
            if enabled:
                raise CaptureError(
                    "The forward opens an enabled torch.autocast region, whose casts a graph "
                    "cannot show. Convert the model itself (model.to(torch.bfloat16)) and remove "
                    "the region."
                )
        else:
            continue
        _splice(gm, node, getattr(gm, str(body.target)), inputs)


def _splice(gm: fx.GraphModule, node: fx.Node, body: fx.GraphModule, inputs: list[Any]) -> None:
    _inline_regions(body)
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    copies: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    with gm.graph.inserting_before(node):
        outputs = gm.graph.graph_copy(body.graph, copies)
    items: Any = outputs if isinstance(outputs, tuple | list) else (outputs,)
    for user in list(node.users):
        user.replace_all_uses_with(items[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        guard = node.op == "call_module" and "_guards_fn" in str(node.target)
        if guard or node.target in ASSERTIONS:
            graph.erase_node(node)


def _drop_constants_inputs(graph: fx.Graph) -> None:
    """Placeholders of arguments that are no tensors: their value is part of the trace."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(value(node), Tensor) and not node.users:
            graph.erase_node(node)


def _replace_attention(graph: fx.Graph) -> None:
    """The op that the interface left becomes the canonical call; masks lead to their input."""
    for node in graph.find_nodes(op="call_function", target=PADDING):
        stranger = next((user for user in node.users if user.target is not TRACED), None)
        if stranger is not None:
            raise CaptureError(
                f"The forward computes with the attention mask itself ({stranger.name}), not "
                "through transformers' attention interface."
            )
    for node in list(graph.nodes):
        if node.target is not TRACED:
            continue
        q, k, v, mask, bias, sinks, scale, causal, window, softcap = node.args
        with graph.inserting_before(node):
            new = attention_node(
                graph, q, k, v, mask=padding_source(mask), bias=_unless_zero(bias), sinks=sinks,
                scale=scale, causal=causal, window=window, softcap=softcap,
            )  # fmt: skip
        new.meta = {**node.meta, "op": "attention"}
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _unless_zero(bias: Any) -> Any:
    zeros = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
    return None if isinstance(bias, fx.Node) and bias.target in zeros else bias


def _drop_no_ops(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        rule = NO_OPS.get(node.target)
        if rule is not None and rule(node):
            _skip(graph, node)


def _drop_copies(graph: fx.Graph) -> None:
    """Copies matter only where something is overwritten later."""
    if any(_mutates(node) for node in graph.nodes):
        return
    for node in list(graph.nodes):
        if node.target in COPIES and _same_strides(node):
            _skip(graph, node)


def _skip(graph: fx.Graph, node: fx.Node) -> None:
    source: Any = node.args[0]
    node.replace_all_uses_with(source)
    graph.erase_node(node)


def _mutates(node: fx.Node) -> bool:
    schema = schema_of(node)
    return schema is not None and schema.is_mutable and node.target not in ALIASES


def _same_dtype(node: fx.Node) -> bool:
    before, after = value(node.args[0]), value(node)
    return before.dtype == after.dtype and before.device == after.device


def _same_strides(node: fx.Node) -> bool:
    before, after = value(node.args[0]), value(node)
    return [str(s) for s in before.stride()] == [str(s) for s in after.stride()]


def _whole(node: fx.Node) -> bool:
    _, _, start, stop, *step = (*node.args, *(None, None, None)[: max(0, 4 - len(node.args))])
    return not start and (stop is None or _at_least(stop, FOREVER)) and step in ([], [1])


def _at_least(number: Any, bound: int) -> bool:
    return isinstance(number, int) and number >= bound


def _same_shape(node: fx.Node) -> bool:
    before, after = value(node.args[0]).shape, value(node).shape
    return len(before) == len(after) and all(str(a) == str(b) for a, b in zip(before, after))  # noqa: B905


def _times_one(node: fx.Node) -> bool:
    one: Any = node.args[1]
    return one in (1, 1.0) and _same_dtype(node)


def _idle_dropout(node: fx.Node) -> bool:
    _, rate, train = node.args
    return not train or rate in (0, 0.0)


NO_OPS: Mapping[Any, Callable[[fx.Node], bool]] = {
    **{alias: lambda _: True for alias in (*ALIASES, PADDING)},
    **{cast: _same_dtype for cast in CASTS},
    aten.slice.Tensor: _whole,
    aten.expand.default: _same_shape,
    aten.mul.Tensor: _times_one,
    aten.dropout.default: _idle_dropout,
    aten.feature_dropout.default: _idle_dropout,
    aten.alpha_dropout.default: _idle_dropout,
}


def _follow_inputs_device(graph: fx.Graph) -> None:
    """Device literals become the device of an input, so that the module can be moved."""
    tensors = [n for n in graph.nodes if n.op == "placeholder" and isinstance(value(n), Tensor)]
    if not tensors:
        return
    device: fx.Node | None = None
    for node in list(graph.nodes):
        if node.target is aten.to.device or node.target is aten.to.dtype_layout:
            with graph.inserting_before(node):
                cast = graph.call_function(aten.to.dtype, (node.args[0], value(node).dtype))
            cast.meta = node.meta
            node.replace_all_uses_with(cast)
            graph.erase_node(node)
        elif isinstance(node.kwargs.get("device"), torch.device | str):
            if device is None:
                with graph.inserting_after(tensors[-1]):
                    device = graph.call_function(getattr, (tensors[0], "device"))
                device.meta["val"] = value(tensors[0]).device
            node.update_kwarg("device", device)


def flatten_output(graph: fx.Graph) -> None:
    """The graph returns a flat tuple of the tensors among its outputs."""
    output = graph.output_node()
    leaves: list[fx.Node] = []
    map_arg(output.args[0], lambda n: leaves.append(n))
    output.args = (tuple(leaves),)
    graph.set_codegen(CodeGen())
