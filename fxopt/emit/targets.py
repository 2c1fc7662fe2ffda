"""What a graph may call, and under which name it is saved."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ..ir import ops
from ..ir.errors import FxoptError

# Registered ops that a graph may call; torchvision's and transformers' are part of models.
NAMESPACES = ("aten", "fxopt", "prims", "transformers", "torchvision")
FUNCTION_MODULES = ("_operator", "operator", "math")
FUNCTIONS: tuple[Any, ...] = (getattr, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_float)
_BUILTINS = {
    "builtins.getattr": getattr,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_not": torch.sym_not,
    "torch.sym_float": torch.sym_float,
}


def op_name(node: fx.Node) -> str:
    """The bare name of what a node calls: "linear", "attend", "getitem"."""
    target = node.target
    if isinstance(target, OpOverload):
        return bare_name(target)
    return getattr(target, "__name__", str(target))


def bare_name(target: OpOverload) -> str:
    """The name of a registered op without namespace and overload."""
    return target.name().rpartition("::")[2].partition(".")[0]


def mutates(node: fx.Node) -> bool:
    """Whether a node calls an op that writes to one of its arguments."""
    return isinstance(node.target, OpOverload) and any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in schema(node.target).arguments
    )


def is_quiet(first: fx.Node, last: fx.Node) -> bool:
    """Whether no call from `first` to `last` writes to a tensor, which one of them may read."""
    node = first
    while node is not last:
        if mutates(node):
            return False
        node = node.next
    return True


def written(graph: fx.Graph) -> frozenset[str]:
    """Names of the buffers that running `graph` writes to, in place or through views."""
    found = (root(node.args[0]) for node in graph.nodes if mutates(node) and node.args)
    return frozenset(str(n.target) for n in found if isinstance(n, fx.Node) and n.op == "get_attr")


def root(node: Any) -> Any:
    """The node whose memory a chain of views shows: `node` itself where it is no view."""
    source = node
    while isinstance(source, fx.Node):
        # a part of a list shows what the list shows
        whole: Any = source.args[0] if source.target is operator.getitem else source
        if not isinstance(whole, fx.Node) or not isinstance(whole.target, OpOverload):
            break
        results = schema(whole.target).returns
        if not results or results[0].alias_info is None:
            break
        source = whole.args[0]
    return source


def schema(target: OpOverload) -> Any:
    return target._schema  # pyright: ignore[reportPrivateUsage]


def check_legal(graph: fx.Graph) -> None:
    """Only registered ops of known namespaces and functions without side effects may be called."""
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.op != "call_function" or not is_legal(node.target):
            where = node.meta.get("fqn") or node.name
            raise FxoptError(
                f"{where}: the graph calls {node.target!r}, which fxopt can neither save nor "
                f"export (rewrite: {node.meta.get('fxopt') or 'none'}); use ops of "
                f"{', '.join(NAMESPACES)}"
            )


def is_legal(target: Any) -> bool:
    """Whether a graph may call `target`."""
    if isinstance(target, OpOverload):
        return target.namespace in NAMESPACES
    module = getattr(target, "__module__", "")
    if module in FUNCTION_MODULES:
        return hasattr(operator, target.__name__) or module == "math"
    return target in FUNCTIONS or (module == ops.__name__ and hasattr(ops, target.__name__))


def target_name(target: Any) -> str:
    """The name under which a target is saved."""
    if isinstance(target, (str, OpOverload)):
        return str(target)
    if not is_legal(target):
        raise FxoptError(f"the graph calls {target!r}, which cannot be saved")
    module = target.__module__.removeprefix("_")
    named = next((name for name, known in _BUILTINS.items() if known is target), None)
    return named or f"{module}.{target.__name__}"


def find_target(name: str) -> Any:
    """The op or function that a saved name stands for; ValueError unless it is allowed."""
    if name in _BUILTINS:
        return _BUILTINS[name]
    module, _, function = name.rpartition(".")
    spaces = {ops.__name__: ops, "operator": operator, "math": math}
    found: Any = None
    if module in spaces:
        found = getattr(spaces[module], function, None)
    elif name.count(".") == 2 and name.partition(".")[0] in NAMESPACES:
        namespace, op, overload = name.split(".")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        found = getattr(packet, overload, None)
    if found is None or not is_legal(found):
        raise ValueError(f"the call {name!r} is unknown or not allowed")
    return found
