"""Rotary position embeddings as one call, which CUDA runs as one kernel and to the same bits; one
for the queries and keys of an attention, with what mixes their channels.

Where a gradient is needed or `torch.compile` looks on, the call is the formula that it stands for.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from ..ir.ops import arguments_of_attend, attend, mix_channels, rotate, rotate_both
from .facts import tensor_facts
from .norms import erase, put
from .targets import is_quiet

aten = torch.ops.aten


def fuse_rotary(graph: fx.Graph) -> None:
    """Write x * cos + cat([-x[half:], x[:half]], -1) * sin as `rotate(x, cos, sin)`."""
    for total in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if (found := _match(total)) is not None:
            put(graph, total, rotate, found)


class _Side(NamedTuple):
    """Queries or keys: what is turned by `angles` (cos and sin, or nothing), and then mixed by
    `matrix`, if there is one, in `heads` of how many there are; `first` reads x."""

    result: fx.Node
    first: fx.Node
    x: fx.Node
    angles: tuple[Any, ...]
    matrix: Any
    heads: tuple[Any, ...]


def fuse_both(graph: fx.Graph) -> None:
    """Write what is done to the queries and keys of an attention as one call that gives both."""
    for node in graph.find_nodes(op="call_function", target=attend):
        given = arguments_of_attend(*node.args, **node.kwargs)
        q, k = _side(given["q"]), _side(given["k"])
        if q is None or k is None or q.angles != k.angles or q.heads != k.heads:
            continue
        if (q.matrix is None) != (k.matrix is None):
            continue
        # The keys of cross-attention are made once, its queries in every step.
        if q.angles or given["causal"]:
            _join(graph, q, k)


def _side(node: Any) -> _Side | None:
    x, first, matrix, heads, angles = node, node, None, (), ()
    if _is(x, mix_channels) and len(x.args) == 2:
        (x, matrix), heads = x.args, tuple(x.kwargs.items())
        if len(node.users) > 1 or (_is(x, rotate) and len(x.users) > 1):
            return None
    if _is(x, rotate):
        first, (x, *angles) = x, x.args
    found = _Side(node, first, x, tuple(angles), matrix, heads)
    return None if x is node else found


def _join(graph: fx.Graph, q: _Side, k: _Side) -> None:
    """One call in the place of the later one, before all that reads either."""
    place = max(q.result, k.result)
    if any(user <= place for side in (q, k) for user in side.result.users):
        return
    if q.result is k.result or not is_quiet(min(q.first, k.first), place):
        return
    angles = q.angles or (None, None)
    arguments: tuple[Any, ...] = (q.x, k.x, *angles, q.matrix, k.matrix)
    while arguments[-1] is None:
        arguments = arguments[:-1]
    with graph.inserting_before(place):
        both = graph.call_function(rotate_both, arguments, dict(q.heads))
        both.meta = {**place.meta, "facts": 2}
        for index, side in enumerate((q, k)):
            part = graph.call_function(operator.getitem, (both, index))
            part.meta = {**place.meta, "facts": tensor_facts(side.result)}
            side.result.replace_all_uses_with(part)
    for side in (q, k):
        erase(graph, side.result)


def _match(total: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """x, cos and sin, which the call reads in the place of `total`."""
    if total.kwargs or not all(_is(n, aten.mul.Tensor) for n in total.args):
        return None
    for plain, turned in (total.args, total.args[::-1]):
        factors: Any = turned.args  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        for cat, sin in (factors, factors[::-1]):
            x = _turned(cat)
            cos = None if x is None else _other(plain, x)
            if x is None or cos is None or not _fits(x, cos, sin):
                continue
            first: Any = min(plain, cat.args[0][0])  # pyright: ignore[reportArgumentType]
            if is_quiet(first, total):
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
