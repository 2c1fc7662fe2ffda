"""How many rows a layer that computes row by row has of one item of the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import SymInt

from ..ir.workload import LENGTHY
from .captured import Captured, Dimension
from .shapes import fixed, free_symbols, placeholders


class Rows:
    """Counts rows of one item by the sizes of a trace."""

    def __init__(self, captured: Captured) -> None:
        inputs = {str(n.target): n.meta["val"].shape for n in placeholders(captured.graph.graph)}
        known = captured.symbols.items()
        ranks = {name: len(shape) for name, shape in inputs.items()}
        self._tokens = {name for name, dim in known if _counts_tokens(dim, ranks[dim.input])}
        batches = {name for name, dim in known if dim.role == "batch"}
        traced = {name: inputs[dim.input][dim.dim].node.hint for name, dim in known}
        self._sizes = {name: 1 if name in batches else size for name, size in traced.items()}
        first = next((shape for shape in inputs.values() if shape), (1,))
        self._batch = 1 if batches else fixed(first[0]) or 1

    def of_item(self, sizes: Iterable[Any], *, traced: bool = False) -> int | None:
        """The product of `sizes` for a batch of one; None where it goes with the call's tokens,
        or, with `traced`, where data decide it. Sizes of images are those of the trace."""
        rows: Any = math.prod(sizes)
        symbols = set(free_symbols(rows))
        if not symbols <= self._sizes.keys() or (not traced and symbols & self._tokens):
            return None
        if isinstance(rows, SymInt):
            expression = rows.node.expr
            return int(expression.subs({s: self._sizes[s.name] for s in expression.free_symbols}))
        return rows if rows % self._batch else rows // self._batch

    def of_token(self, sizes: Iterable[Any]) -> int:
        """How many rows each token of an item has; 1 where their number is no multiple of that of
        the tokens."""
        rows: Any = math.prod(sizes)
        symbols = free_symbols(rows)
        tokens = [name for name in symbols if name in self._tokens]
        if len(tokens) != 1 or not {*symbols} <= self._sizes.keys():
            return 1
        expression: Any = rows.node.expr
        others = [s for s in expression.free_symbols if s.name != tokens[0]]
        (token,) = expression.free_symbols.difference(others)
        each = expression.subs({s: self._sizes[s.name] for s in others}) / (token * self._batch)
        return int(each) if each.is_Integer else 1


def _counts_tokens(dimension: Dimension, rank: int) -> bool:
    """Whether a workload's length says how large it is: of inputs without roles, the second of
    those that have a length."""
    if dimension.role:
        return dimension.role != "batch"
    return dimension.dim == 1 and rank <= LENGTHY
