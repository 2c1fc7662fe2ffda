"""A scheduled step as two graphs, forward and backward, that eager PyTorch runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._functorch.partitioners import (
    _extract_fwd_bwd_modules,  # pyright: ignore[reportPrivateUsage]
)
from torch.fx.graph import CodeGen

from ..ir.saved import Image
from .forms import parts_of
from .random import is_random, replayed, rng_state
from .schedule import Schedule
from .step import NORM, aten


def partition(
    joint: fx.GraphModule, scheduled: Schedule, num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Write images and second runs into the joint graph, and cut it where the backward begins."""
    copies, packed = _write(joint.graph, scheduled)
    forward = {*scheduled.step.forward, *joint.graph.find_nodes(op="placeholder"), *packed}
    states = [n for n in joint.graph.nodes if n.target is rng_state]
    inside = {*scheduled.step.backward, *copies.values()}
    read = {source for node in inside for source in node.all_input_nodes}
    saved = [n for n in joint.graph.nodes if n in read and (n in forward or n in states)]
    saved = [n for n in saved if not str(n.target).startswith("tangents")]
    joint.recompile()
    parts = _extract_fwd_bwd_modules(joint, saved, [], num_fwd_outputs=num_fwd_outputs)
    for part in parts:
        part.graph.eliminate_dead_code()
        part.recompile()
    return parts


def _write(graph: fx.Graph, scheduled: Schedule) -> tuple[dict[fx.Node, fx.Node], list[fx.Node]]:
    """Insert what the schedule adds, and let the backward read it.

    Returns what stands for forward nodes in the backward, and the parts of images.
    """
    copies: dict[fx.Node, fx.Node] = {}
    packed: dict[fx.Node, list[fx.Node]] = {}
    for item in scheduled.items:
        if item.kind == "run":
            if item.node not in scheduled.again:
                _reread(item.node, copies)
            continue
        assert item.before is not None
        with graph.inserting_before(item.before):
            if item.kind == "pack":
                packed[item.node] = _pack(graph, item.node, scheduled.images[item.node].image)
            elif item.kind == "unpack":
                image = scheduled.images[item.node].image
                copies[item.node] = _unpack(graph, item.node, image, packed[item.node])
            else:
                copies[item.node] = _copy(graph, item.node, copies)
    return copies, [part for parts in packed.values() for part in parts]


def _pack(graph: fx.Graph, node: fx.Node, image: Image) -> list[fx.Node]:
    whole = graph.call_function(image.pack, (node, *image.pack_arguments))
    whole.meta["val"] = parts_of(image, node.meta["val"])
    parts: list[fx.Node] = []
    for i, value in enumerate(whole.meta["val"]):
        part = graph.call_function(operator.getitem, (whole, i))
        part.meta["val"] = value
        parts.append(part)
    return parts


def _unpack(graph: fx.Graph, node: fx.Node, image: Image, parts: list[fx.Node]) -> fx.Node:
    copy = graph.call_function(image.unpack, (*parts, *image.unpack_arguments))
    copy.meta = {**node.meta, "partitioner_tag": "is_backward"}
    return copy


def _copy(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    def again(source: fx.Node) -> fx.Node:
        return copies.get(source, source)

    if is_random(node):
        value = node.all_input_nodes[0].meta["val"]
        kind = str(value.device.type)
        with graph.inserting_before(node):
            state = graph.call_function(rng_state, (kind,))
        state.meta["val"] = _fake_state(value, kind)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), again)
        copy = graph.call_function(replayed(node.target), (state, kind, *args), kwargs)
    else:
        copy = graph.node_copy(node, again)
        if node.target is NORM:
            _without_statistics(copy)
    copy.meta = {**node.meta, "partitioner_tag": "is_backward"}
    return copy


def _without_statistics(copy: fx.Node) -> None:
    """Batch norm of a batch reads no running statistics, and the second run must not move them."""
    x, weight, bias, _mean, _var, *rest = copy.args
    copy.target = aten._native_batch_norm_legit.no_stats
    copy.args = (x, weight, bias, *rest)


def _fake_state(like: Any, kind: str) -> Any:
    """A fake tensor as large as the generator's state."""
    return like.new_empty(rng_state(kind).shape, dtype=rng_state(kind).dtype, device="cpu")


def _reread(node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
    if node.op == "call_function" and copies:
        node.args = fx.map_arg(node.args, lambda n: copies.get(n, n))
        node.kwargs = fx.map_arg(node.kwargs, lambda n: copies.get(n, n))


class _Boxed(CodeGen):
    """Takes its arguments in a list that it empties, so that each can die at its last use."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        names = [name.split(":")[0].split("=")[0].strip() for name in free_vars]
        names = [name for name in names if name != "self"]
        unpack = f"\n    {', '.join(names)}, = arguments" if names else ""
        return f"def forward(self, arguments):{unpack}\n    arguments.clear()"


def executable(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Half of a step as plain Python that frees each tensor at its last use."""
    del example_inputs
    gm.graph.set_codegen(_Boxed())
    gm.recompile()
    run = gm.forward

    def call(arguments: list[Any]) -> Any:
        return run(arguments)

    call._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
    return call
