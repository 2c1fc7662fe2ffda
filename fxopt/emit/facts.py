"""What is known of a node's result before it runs: dtype and sizes, symbols by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx


class Facts(NamedTuple):
    """A tensor's dtype and sizes; a size that depends on the input is the name of its symbol."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


def facts(node: Any) -> Facts | str | int | None:
    """Facts of a tensor, the expression of a size, the length of a list, None for the rest."""
    if not isinstance(node, fx.Node):
        return None
    if "facts" in node.meta:
        return node.meta["facts"]
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return Facts(value.dtype, tuple(_size(size) for size in value.shape))
    if isinstance(value, (list, tuple)):
        return len(value)
    return str(value) if isinstance(value, torch.SymInt) else None


def tensor_facts(node: Any) -> Facts | None:
    """Facts of a node whose result is a tensor."""
    found = facts(node)
    return found if isinstance(found, Facts) else None


def _size(size: int | torch.SymInt) -> int | str:
    """A symbol that turned out to have one value is that value."""
    text = str(size)
    return int(text) if text.isdigit() else text
