"""Where in reach of a method a length or a device can be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ..ir.ops import attend
from .facts import facts, tensor_facts
from .frames import Frame, floats
from .spelling import Expr, literal


def size_source(frame: Frame, inputs: Sequence[fx.Node], node: fx.Node) -> tuple[fx.Node, str]:
    """The value in reach of `frame` that has the length or device which `node` reads."""
    found = find_size(frame, inputs, node)
    assert found is not None
    return found


def find_size(frame: Frame, inputs: Sequence[fx.Node], node: fx.Node) -> tuple[fx.Node, str] | None:
    """(value, "shape[1]") for a length, (value, "device") for a device; None if out of reach."""
    source: Any = node.args[0]
    if node.target is getattr:
        near = [n for n in inputs if tensor_facts(n) is not None and not _maybe_none(n)]
        chosen = source if source in inputs else (near[0] if near else None)
        return None if chosen is None else (chosen, str(node.args[1]))
    where = f"shape[{literal(node.args[1], lambda n: Expr(n.name)).text}]"
    if source in inputs or (not floats(source) and source in set(frame.nodes())):
        return source, where
    wanted = facts(node)
    for candidate in inputs if wanted is not None else ():
        known = tensor_facts(candidate)
        if known is not None and wanted in known.shape and not _maybe_none(candidate):
            return candidate, f"shape[{known.shape.index(wanted)}]"
    return None


def _maybe_none(node: fx.Node) -> bool:
    """An input that only masks attention may be left out by the caller."""
    return node.op == "placeholder" and all(
        user.target is attend and user.kwargs.get("mask") is node for user in node.users
    )
