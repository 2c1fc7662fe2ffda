"""Which module a node belongs to, and under which name it reads a parameter."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

ROOT_KEY = "L__self__"


def locate(graph: fx.Graph) -> None:
    """Set `meta["fqn"]`, the innermost module's name with its call index (`blk@1`).

    What stands in no module is given to the root. Traces of the user's source are dropped.
    """
    stacks = [n.meta.get("nn_module_stack") or {} for n in graph.nodes]
    root = next((dict([next(iter(s.items()))]) for s in stacks if ROOT_KEY in s), {})
    for node in graph.nodes:
        stack = {
            key: entry
            for key, entry in (node.meta.get("nn_module_stack") or {}).items()
            if key.startswith(ROOT_KEY)
        }
        kept = {name: node.meta[name] for name in ("val", "op") if name in node.meta}
        node.meta = {**kept, "nn_module_stack": stack or root, "fqn": called_name(stack)}


def called_name(stack: dict[str, Any]) -> str:
    """The innermost module of a stack; one called again shows it once: `blk@1.fc`."""
    name, parent, calls = "", "", 0
    for key, (path, _) in stack.items():
        _, _, again = key.rpartition("@") if "@" in key else ("", "", "0")
        index = int(again)
        name = name + path[len(parent) :] if path.startswith(parent) else path
        name = name.removeprefix(".")
        if index and index != calls:
            name = f"{name}@{index}"
        parent, calls = path, index
    return name


def name_parameters(gm: fx.GraphModule, model: nn.Module) -> dict[str, Any]:
    """Let every module read its parameters under its own names; returns what the graph reads.

    Export keeps one of the names of a tied parameter. Constants that export lifted out of the
    forward keep the name that it gave them, without the module.
    """
    names: dict[int, list[str]] = {}
    owners: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    owners |= dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in owners.items():
        names.setdefault(id(tensor), []).append(name)
    attributes: dict[str, Any] = {}
    constants: list[Tensor] = []
    for node in [n for n in gm.graph.nodes if n.op == "get_attr"]:
        held = owners.get(str(node.target))
        held = attribute(gm, str(node.target)) if held is None else held
        if id(held) not in names:
            target, held = _constant(constants, held)
            _read(gm.graph, node, list(node.users), target)
            attributes[target] = held
            continue
        uses: dict[str, list[fx.Node]] = {}
        for user in node.users:
            uses.setdefault(_own_name(names[id(held)], user), []).append(user)
        for target, users in uses.items():
            _read(gm.graph, node, users, target)
            attributes[target] = held
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and not n.users]:
        gm.graph.erase_node(node)
    return attributes


def attribute(root: nn.Module, path: str) -> Any:
    """The object at a dotted path below `root`."""
    for name in path.split("."):
        root = getattr(root, name)
    return root


def _constant(constants: list[Tensor], tensor: Tensor) -> tuple[str, Tensor]:
    for i, known in enumerate(constants):
        if known.dtype == tensor.dtype and torch.equal(known, tensor):
            return f"constant_{i}", known
    constants.append(tensor)
    return f"constant_{len(constants) - 1}", tensor


def _own_name(names: list[str], user: fx.Node) -> str:
    stack = user.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        inside = [n for n in names if n.startswith(f"{path}." if path else "")]
        if path and inside:
            return min(inside, key=len)
    return names[0]


def _read(graph: fx.Graph, node: fx.Node, users: list[fx.Node], target: str) -> None:
    """Read `target` right before the first of `users`, which read `node` so far."""
    if not users:
        return
    order = {n: i for i, n in enumerate(graph.nodes)}
    first = min(users, key=order.__getitem__)
    with graph.inserting_before(first):
        new = graph.create_node("get_attr", target, name=target.replace(".", "_"))
    stack, fqn = first.meta["nn_module_stack"], first.meta["fqn"]
    new.meta = {**node.meta, "nn_module_stack": stack, "fqn": fqn}
    for user in users:
        user.replace_input_with(node, new)


def site_keys(nodes: list[fx.Node]) -> dict[fx.Node, str]:
    """`fqn`, with `#ordinal` where several of `nodes` share it, in the order of the graph."""
    totals = Counter(node.meta["fqn"] for node in nodes)
    seen: Counter[str] = Counter()
    keys: dict[fx.Node, str] = {}
    for node in nodes:
        fqn = node.meta["fqn"]
        keys[node] = f"{fqn}#{seen[fqn]}" if totals[fqn] > 1 else fqn
        seen[fqn] += 1
    return keys
