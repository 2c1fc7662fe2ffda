"""A scheduled step as two graphs, forward and backward, that eager PyTorch runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import (
    _extract_fwd_bwd_modules,  # pyright: ignore[reportPrivateUsage]
)
from torch.fx.graph import CodeGen

from ..ir.saved import Carrier, Image
from .forms import parts_of
from .random import is_random, replayed, rng_state
from .schedule import Item, Schedule
from .step import NORM, aten
from .watched import POINT, Probe


def partition(
    joint: fx.GraphModule, scheduled: Schedule, num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Write images and second runs into the joint graph, and cut it where the backward begins."""
    written = _Written()
    _write(joint.graph, scheduled, written)
    forward = {*scheduled.step.forward, *joint.graph.find_nodes(op="placeholder")}
    forward |= {part for parts in written.parts.values() for part in parts}
    states = [n for n in joint.graph.nodes if n.target is rng_state]
    back = {part for parts in written.back.values() for part in parts}
    inside = {*scheduled.step.backward, *written.copies.values(), *back}
    read = {source for node in inside for source in node.all_input_nodes}
    saved = [n for n in joint.graph.nodes if n in read and (n in forward or n in states)]
    saved = [n for n in saved if not str(n.target).startswith("tangents")]
    joint.recompile()
    parts = _extract_fwd_bwd_modules(joint, saved, [], num_fwd_outputs=num_fwd_outputs)
    for part in parts:
        part.graph.eliminate_dead_code()
        part.recompile()
    return parts


@dataclass(frozen=True)
class _Written:
    """What was inserted, by forward node: what stands for it in the backward, what packing it gave,
    the parts of its image that are saved, and those that were copied back."""

    copies: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    packed: dict[fx.Node, list[fx.Node]] = field(default_factory=dict[fx.Node, list[fx.Node]])
    parts: dict[fx.Node, list[fx.Node]] = field(default_factory=dict[fx.Node, list[fx.Node]])
    back: dict[fx.Node, list[fx.Node]] = field(default_factory=dict[fx.Node, list[fx.Node]])


def _write(graph: fx.Graph, scheduled: Schedule, written: _Written) -> None:
    """Insert what the schedule adds, and let the backward read it."""
    replaced = scheduled.replaced
    for point, item in enumerate(scheduled.items):
        if item.kind == "run":
            item.node.meta[POINT] = point
            if item.node in replaced:
                owner = replaced[item.node]
                _replace(item.node, owner, scheduled, written)
            if item.node not in scheduled.again:
                _reread(item.node, written.copies)
            continue
        assert item.before is not None
        made = item.before.prev
        with graph.inserting_before(item.before):
            if item.kind == "again":
                written.copies[item.node] = _copy(graph, item.node, written.copies)
            else:
                _image(graph, item, scheduled, written)
        while (made := made.next) is not item.before:
            made.meta[POINT] = point


def _image(graph: fx.Graph, item: Item, scheduled: Schedule, written: _Written) -> None:
    """Insert one of the calls that make, or read, an image."""
    node = item.node
    image = scheduled.images[node].image
    if item.kind == "pack":
        written.packed[node] = written.parts[node] = _pack(graph, node, image)
    elif image.shares:
        given = (written.copies.get(n, n) if n else None for n in scheduled.step.shared[node])
        arguments = (*given, *image.unpack_arguments)
        written.copies[node] = _like(graph, node, image.unpack, arguments)
    elif item.kind == "unpack":
        parts = written.back[node] if image.carrier else written.parts[node]
        arguments = (*parts, *image.unpack_arguments)
        written.copies[node] = _like(graph, node, image.unpack, arguments)
    else:
        assert image.carrier is not None
        _carry(graph, item, image.carrier, written)
        if item.kind == "arrive" and not image.pack:
            (written.copies[node],) = written.back[node]


def _carry(graph: fx.Graph, item: Item, carrier: Carrier, written: _Written) -> None:
    """Insert the calls at which the copies of an image begin or end."""
    node, parts, back = item.node, written.parts, written.back
    here = written.packed.get(node, [node])
    if item.kind == "send":
        parts[node] = [_call(graph, carrier.send, (part,)) for part in here]
    elif item.kind == "release":
        ends = zip(parts[node], here, strict=True)
        parts[node] = [_like(graph, there, carrier.sent, (there, part)) for there, part in ends]
    elif item.kind == "fetch":
        begins = zip(parts[node], here, strict=True)
        back[node] = [
            _like(graph, part, carrier.fetch, (there, *_layout(part))) for there, part in begins
        ]
    else:
        ends = zip(back[node], parts[node], strict=True)
        back[node] = [_like(graph, part, carrier.fetched, (part, there)) for part, there in ends]


def _layout(part: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    value = part.meta["val"]
    return tuple(map(int, value.shape)), tuple(map(int, value.stride())), str(value.device)


def _replace(node: fx.Node, owner: fx.Node, scheduled: Schedule, written: _Written) -> None:
    """Let the backward read an owner's image, and views of the memory go."""
    image = scheduled.images[owner].image
    assert image.unpack is not None
    node.target = image.unpack
    node.args = (node.args[0], *written.parts[owner], *image.unpack_arguments)
    node.kwargs = {}
    for view in reversed(scheduled.step.readers[owner]):
        if view is not node:
            node.graph.erase_node(view)


def _pack(graph: fx.Graph, node: fx.Node, image: Image) -> list[fx.Node]:
    assert image.pack is not None
    values = parts_of(image, node.meta["val"])
    whole = graph.call_function(image.pack, (node, *image.pack_arguments))
    if image.replaces:
        whole.meta["val"] = values[0]
        return [whole]
    parts = [graph.call_function(operator.getitem, (whole, i)) for i in range(len(values))]
    whole.meta["val"] = values
    for part, value in zip(parts, values, strict=True):
        part.meta["val"] = value
    return parts


def _call(graph: fx.Graph, target: Any, arguments: tuple[fx.Node, ...]) -> fx.Node:
    call = graph.call_function(target, arguments)
    with torch.no_grad():
        call.meta["val"] = target(*(node.meta["val"] for node in arguments))
    return call


def _like(graph: fx.Graph, node: fx.Node, target: Any, arguments: tuple[Any, ...]) -> fx.Node:
    """A call whose result is like that of `node`."""
    call = graph.call_function(target, arguments)
    call.meta = {"val": node.meta["val"]}
    return call


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


def executable(
    gm: fx.GraphModule, example_inputs: Sequence[Any], probe: Probe | None = None
) -> Callable[..., Any]:
    """Half of a step as plain Python that frees each tensor at its last use; op by op while
    `probe` is on."""
    del example_inputs
    gm.graph.set_codegen(_Boxed())
    gm.recompile()
    run = gm.forward

    def call(arguments: list[Any]) -> Any:
        return run(arguments) if probe is None or not probe.on else probe.run(gm, arguments)

    call._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
    return call
