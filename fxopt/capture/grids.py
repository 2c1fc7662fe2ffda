"""Which tokens of an attention are the places of an image or a video.

Followed from the convolution that makes them, forwards: what an op does to a tensor's dimensions
says where its grid lies afterwards. Ops of which that is not known end the search.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch._ops import OpOverload

from ..ir.ops import attend
from .nodes import CASTS, COPIES, VIEWS, op_name, value
from .shapes import fixed, free_symbols

aten = torch.ops.aten
CONVOLUTIONS = {
    aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv3d.padding,
}  # fmt: skip
RESHAPES = VIEWS | {
    aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim,
}  # fmt: skip
EACH = CASTS | COPIES | {
    aten.dropout.default, aten.expand.default, aten.batch_norm.default, aten.linear.default,
    aten.layer_norm.default, aten.rms_norm.default,
}  # fmt: skip
"""Ops that keep places apart, beside those that PyTorch itself calls pointwise."""
PERMUTES = {aten.permute.default, aten.transpose.int, aten.mT.default}
SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}


@dataclass(frozen=True)
class _Grid:
    """From dimension `dim` on a tensor has the axes of the grid (`folded`), or that dimension has
    `prefix` tokens and then its places. `sizes` are those of the trace, numbers or symbols.
    `fixed`: a table of positions was added, or the like, which has the traced number of places."""

    sizes: tuple[int | SymInt, ...]
    dim: int
    prefix: int = 0
    folded: bool = False
    fixed: bool = False

    @property
    def dims(self) -> range:
        return range(self.dim, self.dim + (len(self.sizes) if self.folded else 1))

    @property
    def extent(self) -> list[int]:
        """The traced sizes of `dims`."""
        sizes = [_traced(size) for size in self.sizes]
        return sizes if self.folded else [self.prefix + math.prod(sizes)]

    @property
    def attended(self) -> bool:
        """Whether it is that of the tokens of queries or keys, [B, H, N, D]."""
        return self.dim == 2 and not self.folded

    def agrees(self, other: _Grid) -> bool:
        """Whether places stand alike in two tensors, of one shape but for dimensions of size 1."""
        mine, theirs = ((g.dim, g.prefix, g.folded) for g in (self, other))
        return mine == theirs and self.extent == other.extent


class Grids:
    """The grids of a graph's tensors."""

    def __init__(self, graph: fx.Graph) -> None:
        self._found: dict[fx.Node, _Grid] = {}
        self._lost: dict[fx.Node, str] = {}
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            known = [n for n in node.all_input_nodes if n in self._found]
            if grid := _made(node) or (self._after(node, known) if known else None):
                self._found[node] = grid
            elif known:
                self._lost[node] = (
                    f"behind {op_name(node)} in {node.meta.get('fqn') or 'the root'} it is not "
                    f"known where the {_words(self._found[known[0]])} places stand"
                )
            elif lost := [n for n in node.all_input_nodes if n in self._lost]:
                self._lost[node] = self._lost[lost[0]]

    def at(self, node: fx.Node) -> tuple[tuple[int, ...], str]:
        """(prefix, size, ...) of an attention's tokens; or () and why there is none."""
        grid = self._common(list(node.args[:3]))
        if grid is None:
            reasons = (self._lost.get(n) for n in node.all_input_nodes)
            unknown = "no convolution makes its tokens, so that they have no known grid"
            return (), next(filter(None, reasons), unknown)
        if not grid.attended:
            return (), f"it attends in another dimension than that of the {_words(grid)} places"
        symbols = {name for size in grid.sizes for name in free_symbols(size)}
        if len(symbols) > 1 and not grid.fixed:
            return (), f"{_words(grid)} places vary apart: their number does not tell their grid"
        return (grid.prefix, *map(_traced, grid.sizes)), ""

    def _common(self, operands: Sequence[Any]) -> _Grid | None:
        """The one grid of all operands."""
        first, *others = (self._found.get(n) for n in operands)
        if first is None or not all(g is not None and first.agrees(g) for g in others):
            return None
        return replace(first, fixed=first.fixed or any(g is not None and g.fixed for g in others))

    def _after(self, node: fx.Node, known: list[fx.Node]) -> _Grid | None:
        target = node.target
        if target is aten.cat.default:
            return self._joined(node)
        if target is attend:
            grid = self._common(list(node.args[:3]))
            return replace(grid, dim=1) if grid and grid.attended else None  # [B, N, H, D]
        source = node.args[0]
        grid = self._found.get(source) if isinstance(source, fx.Node) else None
        if target in RESHAPES and grid:
            return _reshaped(grid, value(source).shape, value(node).shape)
        if target in PERMUTES and grid:
            return _permuted(grid, _order(node))
        if target is aten.slice.Tensor and grid:
            return _sliced(grid, node)
        if target in SPLITS | {aten.unbind.int, aten.select.int} and grid:
            return _split(grid, node)
        if target is operator.getitem:
            return grid
        return self._each(node, known)

    def _each(self, node: fx.Node, known: list[fx.Node]) -> _Grid | None:
        """Behind an op that keeps places apart; operands are aligned at their last dimensions."""
        target, result = node.target, value(node)
        pointwise = isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags
        if not isinstance(result, Tensor) or not (pointwise or target in EACH):
            return None
        first, *others = (
            replace(self._found[n], dim=self._found[n].dim + result.dim() - value(n).dim())
            for n in known
        )
        over = int(target is aten.linear.default)
        if target in (aten.layer_norm.default, aten.rms_norm.default):
            over = len(node.args[1])  # pyright: ignore[reportArgumentType]
        kept = [_traced(result.shape[d]) for d in first.dims] == first.extent
        if first.dims.stop > result.dim() - over or not kept or not all(map(first.agrees, others)):
            return None
        tables = [n for n in node.all_input_nodes if pointwise and n not in known]
        known_size = any(g.fixed for g in (first, *others))
        return replace(first, fixed=known_size or any(_fixes(first, n, node) for n in tables))

    def _joined(self, node: fx.Node) -> _Grid | None:
        """Behind `cat`: tokens that come before the grid's are a prefix."""
        operands: list[Any] = list(node.args[0])  # pyright: ignore
        dim = int(node.args[1]) if len(node.args) > 1 else 0  # pyright: ignore
        dim %= value(node).dim()
        *before, last = operands
        grid = self._found.get(last)
        if grid is None or dim not in grid.dims:
            return self._common(operands)
        sizes = [fixed(value(n).shape[dim]) for n in before]
        known = [size for size in sizes if size is not None]
        if grid.folded or len(known) < len(sizes) or any(n in self._found for n in before):
            return None
        return replace(grid, prefix=grid.prefix + sum(known))


def _made(node: fx.Node) -> _Grid | None:
    """What a convolution of a batch makes."""
    if node.target not in CONVOLUTIONS or value(node).dim() != value(node.args[1]).dim():
        return None
    return _Grid(tuple(value(node).shape[2:]), 2, folded=True)


def _fixes(grid: _Grid, table: fx.Node, result: fx.Node) -> bool:
    """Whether an operand without a grid has a fixed number of entries where the grid lies."""
    if not isinstance(value(table), Tensor):
        return False
    shape = value(table).shape
    dims = [d - value(result).dim() + len(shape) for d in grid.dims]
    return dims[0] >= 0 and all((fixed(shape[d]) or 0) > 1 for d in dims)


def _reshaped(grid: _Grid, before: Sequence[Any], after: Sequence[Any]) -> _Grid | None:
    """Where the grid's axes, or their product, stand behind as many numbers as before."""
    old, new = ([_traced(size) for size in sizes] for sizes in (before, after))
    ahead = math.prod(old[: grid.dim])
    forms = [grid]
    if not grid.prefix:
        forms.append(replace(grid, folded=not grid.folded))
    for form in forms:
        extent = form.extent
        for dim in range(len(new) - len(extent) + 1):
            if new[dim : dim + len(extent)] == extent and math.prod(new[:dim]) == ahead:
                return replace(form, dim=dim)
    return None


def _order(node: fx.Node) -> list[int]:
    """The dimensions of the source in the order of the result."""
    rank = value(node).dim()
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]]  # pyright: ignore
    swapped: Any = node.args[1:] or (-2, -1)
    order, (a, b) = list(range(rank)), (d % rank for d in swapped)
    order[a], order[b] = b, a
    return order


def _permuted(grid: _Grid, order: list[int]) -> _Grid | None:
    there = [order.index(d) for d in grid.dims]
    together = there == list(range(there[0], there[0] + len(there)))
    return replace(grid, dim=there[0]) if together else None


def _sliced(grid: _Grid, node: fx.Node) -> _Grid | None:
    """Behind a slice of other dimensions, or one that leaves out tokens of the prefix alone."""
    given: list[Any] = list(node.args[1:])
    dim, start, end, step = (*given, *(0, None, None, 1)[len(given) :])
    if dim % value(node).dim() not in grid.dims:
        return grid
    start = 0 if start is None else start
    whole = step == 1 and (end is None or end == sys.maxsize) and isinstance(start, int)
    if grid.folded or not whole or not 0 <= start <= grid.prefix:
        return None
    return replace(grid, prefix=grid.prefix - start)


def _split(grid: _Grid, node: fx.Node) -> _Grid | None:
    """Of the pieces along another dimension, which is gone behind `unbind` and `select`."""
    by_dim = node.target in (aten.unbind.int, aten.select.int)
    given: Any = node.args[1 if by_dim else 2] if len(node.args) > (1 if by_dim else 2) else 0
    dim = given % value(node.args[0]).dim()
    if dim in grid.dims:
        return None
    return replace(grid, dim=grid.dim - int(by_dim and dim < grid.dim))


def _traced(size: Any) -> int:
    return size.node.hint if isinstance(size, SymInt) else size


def _words(grid: _Grid) -> str:
    return " x ".join(str(size) for size in grid.sizes)
