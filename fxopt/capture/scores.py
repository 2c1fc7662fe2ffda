"""From a softmax back to the product of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .evaluate import Sizes, Unknown, evaluate
from .masks import HIDDEN
from .nodes import CASTS, COPIES, PRODUCTS, call

aten = torch.ops.aten


class Scores:
    """Walks from the softmax back to the product of queries and keys."""

    def __init__(self, graph: fx.GraphModule, sizes: Sizes) -> None:
        self.graph, self.sizes = graph, sizes
        self.scale, self.softcap = 1.0, 0.0
        self.terms: list[tuple[fx.Node, bool]] = []

    def walk(self, node: Any) -> fx.Node | None:
        """The product, or None when a step is not understood."""
        while isinstance(node, fx.Node):
            if node.target in PRODUCTS:
                return node
            if len(node.users) != 1:
                return None
            node = self._step(node)
        return None

    def _step(self, node: fx.Node) -> Any:
        target, args = node.target, node.args
        if target in CASTS | COPIES:
            return args[0]
        if target in (aten.mul.Tensor, aten.div.Tensor):
            return self._scaled(node)
        if target in (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor):
            return self._added(node)
        if target in (aten.masked_fill.Scalar, aten.masked_fill_.Scalar):
            return self._hidden(args[0], args[1], args[2], True)
        if target is aten.where.self:
            constant = self._constant(args[2])
            if constant is not None:
                return self._hidden(args[1], args[0], constant, False)
            return self._hidden(args[2], args[0], self._constant(args[1]), True)
        if target is aten.where.ScalarOther:
            return self._hidden(args[1], args[0], args[2], False)
        return None

    def _hidden(self, scores: Any, mask: Any, value: Any, hides: bool) -> Any:
        value = self._constant(value)
        if value is None or value > HIDDEN or not isinstance(mask, fx.Node):
            return None
        self.terms.append((mask, hides))
        return scores

    def _added(self, node: fx.Node) -> Any:
        if self.scale != 1.0 or self.softcap or node.kwargs:
            return None
        a, b = node.args[:2]
        minus = node.target is aten.sub.Tensor
        scores, term = (a, b) if minus or self._leads_to_product(a) else (b, a)
        if not isinstance(term, fx.Node) or not isinstance(term.meta.get("val"), Tensor):
            return None
        if minus:
            with term.graph.inserting_before(node):
                term = call(term, aten.neg.default, term)
        self.terms.append((term, False))
        return scores

    def _leads_to_product(self, node: Any) -> bool:
        probe = Scores(self.graph, self.sizes)
        return probe.walk(node) is not None

    def _scaled(self, node: fx.Node) -> Any:
        scores, other = node.args[:2]
        factor = self._constant(other)
        if factor is None and node.target is aten.mul.Tensor:
            scores, factor = other, self._constant(scores)
        if not factor or not isinstance(scores, fx.Node):
            return None
        if scores.target is aten.tanh.default and node.target is aten.mul.Tensor:
            inner = Scores(self.graph, self.sizes)
            self.softcap, product = factor, inner.walk(scores.args[0])
            self.scale = inner.scale * factor
            return product if not inner.terms and not inner.softcap else None
        self.scale *= factor if node.target is aten.mul.Tensor else 1.0 / factor
        return scores

    def _constant(self, value: Any) -> float | None:
        if isinstance(value, fx.Node):
            try:
                value = evaluate(self.graph, value, self.sizes)
            except (Unknown, RuntimeError):
                return None
            if isinstance(value, Tensor):
                value = value.item() if value.numel() == 1 else None
        return float(value) if isinstance(value, int | float) else None
