"""Rotary position embeddings as one call, which CUDA runs as one kernel and to the same bits.

Where a gradient is needed or `torch.compile` looks on, the call is the formula that it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ir.ops import rotate
from .facts import tensor_facts
from .norms import put

aten = torch.ops.aten


def fuse_rotary(graph: fx.Graph) -> None:
    """Write x * cos + cat([-x[half:], x[:half]], -1) * sin as `rotate(x, cos, sin)`."""
    for total in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if (found := _match(total)) is not None:
            put(graph, total, rotate, found)


def _match(total: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    if total.kwargs or not all(_is(n, aten.mul.Tensor) for n in total.args):
        return None
    for plain, turned in (total.args, total.args[::-1]):
        factors: Any = turned.args  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        for cat, sin in (factors, factors[::-1]):
            x = _turned(cat)
            cos = None if x is None else _other(plain, x)
            if x is not None and cos is not None and _fits(x, cos, sin):
                return x, cos, sin
    return None


def _turned(cat: Any) -> fx.Node | None:
    """x of cat([-x[..., half:], x[..., :half]], -1)."""
    if not _is(cat, aten.cat.default) or len(cat.args[0]) != 2:
        return None
    minus, low = cat.args[0]
    if not _is(minus, aten.neg.default) or not _is(low, aten.slice.Tensor):
        return None
    high, x = minus.args[0], low.args[0]
    known = tensor_facts(x)
    if not _is(high, aten.slice.Tensor) or high.args[0] is not x or known is None:
        return None
    rank, size = len(known.shape), known.shape[-1]
    last = (-1, rank - 1)
    if (
        rank != 4
        or not isinstance(size, int)
        or size % 2
        or cat.args[1:] not in [(d,) for d in last]
    ):
        return None
    half = size // 2
    starts = low.args[1] in last and high.args[1] in last
    ends = low.args[2:] == (0, half) and high.args[2] == half and high.args[3] >= size
    return x if starts and ends else None


def _fits(x: fx.Node, *factors: Any) -> bool:
    """Whether cos and sin are of one head, of x's dtype and of all its channels."""
    known = tensor_facts(x)
    given = [tensor_facts(factor) for factor in factors]
    return known is not None and all(
        f is not None
        and f.dtype == known.dtype
        and len(f.shape) == 4
        and f.shape[1] == 1
        and f.shape[3] == known.shape[3]
        for f in given
    )


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _other(product: Any, factor: fx.Node) -> Any:
    if factor not in product.args:
        return None
    return product.args[1] if product.args[0] is factor else product.args[0]
