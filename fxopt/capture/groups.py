"""Linears that can be decided together: those that read one tensor, and those of one MLP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from ..ir.site import GroupInfo, LinearInfo, Site
from .nodes import op_name

LINEAR = torch.ops.aten.linear.default

# Channel c of the result is made of channel c of the operands alone.
CHANNELWISE = {
    "mul", "add", "sub", "div", "neg", "pow", "square", "exp", "abs", "relu", "gelu", "silu",
    "sigmoid", "tanh", "softplus", "hardswish", "hardtanh", "mish", "leaky_relu", "elu", "clamp",
    "dropout",
}  # fmt: skip


def group_sites(graph: fx.Graph, sites: Sequence[Site]) -> list[Site]:
    """Groups of the single linear sites among `sites`, none of which is blocked."""
    free = {s.node: s for s in sites if isinstance(s.info, LinearInfo) and s.blocked is None}
    nodes = [n for n in graph.nodes if n.name in free and n.target is LINEAR]
    by_input: dict[tuple[fx.Node, str], list[fx.Node]] = {}
    for node in nodes:
        # an encoder's output is read by every layer of a decoder: they are not one decision
        where = (node.args[0], _parent(free[node.name].key))
        by_input.setdefault(where, []).append(node)
    shared = [members for members in by_input.values() if len(members) > 1]
    found = [_site("shared_input", [free[n.name] for n in members], ()) for members in shared]
    for last in nodes:
        inner = _channels(last, free)
        if inner is not None:
            first = [free[n.name] for n in inner if n.target is LINEAR]
            between = tuple(n.name for n in inner if n.target is not LINEAR)
            found.append(_site("channels", [*first, free[last.name]], between))
    return found


def _site(kind: str, members: Sequence[Site], between: tuple[str, ...]) -> Site:
    last = members[-1]
    info = GroupInfo(kind, tuple(members), between)  # pyright: ignore[reportArgumentType]
    key = _key([site.key for site in members])
    return Site("linear", key, last.node, info, last.op, side=last.side)


def _key(keys: Sequence[str]) -> str:
    """ "mlp.gate_proj+up_proj" of "mlp.gate_proj" and "mlp.up_proj"."""
    prefix = _parent(keys[0])
    if not prefix or any(_parent(key) != prefix for key in keys):
        return "+".join(keys)
    return f"{prefix}.{'+'.join(key.rpartition('.')[2] for key in keys)}"


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


def _channels(last: fx.Node, free: Iterable[str]) -> list[fx.Node] | None:
    """The nodes from the linears behind `last`'s input up to it, in order; None unless each of
    its input channels is made of one channel of each of those, and of nothing else."""
    free, found, waiting = set(free), set[fx.Node](), [last.args[0]]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in found:
            continue
        linear = node.target is LINEAR
        if node.name not in free if linear else op_name(node) not in CHANNELWISE:
            return None
        found.add(node)
        waiting += () if linear else node.all_input_nodes
    inside = {*found, last}
    read_elsewhere = any(not inside.issuperset(node.users) for node in found)
    return None if read_elsewhere else [n for n in last.graph.nodes if n in found]
