"""Gradients of hidden and weight from the classes of a chunk whose own gradient is not small.

A trained model gives most classes next to nothing. Of the gradient g [n, V] of a chunk's logits

    kept = classes with |g| >= eps in some row
    r, c = sums of the others along rows and columns, s = sum of all of them
    hidden gradient = g[:, kept] @ weight[kept]     + r (c @ weight) / s
    weight gradient = g[:, kept].T @ hidden[chunk]  + c (r @ hidden[chunk]) / s

Gradient filtering of "Cut Your Losses in Large-Vocabulary Language Models",
https://arxiv.org/abs/2411.09009, leaves out tiles of a kernel; library products leave out classes.
What is left out is small in each class but not in sum: it pulls every hidden towards the same mean
of the weight. The outer product of its sums stands for it, which has the same sums and costs
three passes over g and one over the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import FEW, Sums, add_product, narrow, wide_sum

PIECE = 8192
"""Classes that are gathered at a time."""
SIGN = 0.5
"""Share of the sums' magnitudes that must not cancel for an outer product to stand for them."""


class FilteredSums(Sums):
    """`Sums` without the products of the classes whose gradient is below `least` [] in a chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: Sequence[bool], chunk: int) -> None:
        super().__init__(hidden, weight, needs, chunk)
        self.weight.zero_()
        self._begun = True
        self._left: list[tuple[Tensor, Tensor]] = []

    def add(self, part: slice, gradient: Tensor, least: Tensor | float = 0.0) -> None:
        low, high = gradient.aminmax(dim=0)
        small = torch.maximum(-low, high) < least  # which what is not a number is not
        kept = small.logical_not_().nonzero()[:, 0]
        if 2 * len(kept) > gradient.shape[1]:
            super().add(part, gradient)
            return
        hidden, _ = self._operands
        self._products(part, gradient, kept)
        if self.needs[2]:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        self._rest(part, gradient, hidden[part], kept)

    def _products(self, part: slice, gradient: Tensor, kept: Tensor) -> None:
        """Both products over the kept classes, some at a time."""
        hidden, weight = self._operands
        if self.needs[0]:
            self.hidden[part].zero_()
        for classes in kept.split(PIECE):
            columns = gradient.index_select(1, classes)
            if self.needs[0]:
                self.hidden[part].addmm_(columns, weight.index_select(0, classes))
            if self.needs[1]:
                product = self.weight.new_empty(len(classes), weight.shape[1])
                add_product(product, columns.t(), hidden[part], 0)
                self.weight.index_add_(0, classes, product)

    def _rest(self, part: slice, gradient: Tensor, hidden: Tensor, kept: Tensor) -> None:
        """The outer product of the sums of all other classes."""
        others = gradient.new_ones(gradient.shape[1]).index_fill_(0, kept, 0.0)
        rows = gradient @ others
        columns = (gradient.new_ones(len(gradient)) @ gradient).mul_(others)
        rate = _rate(rows, columns)
        if self.needs[0]:
            mean = ((columns @ self._operands[1]) * rate).to(rows.dtype)
            self.hidden[part].addr_(rows, mean)
        if self.needs[1]:
            self._left.append((columns, ((rows @ hidden) * rate).to(rows.dtype)))
            if len(self._left) == FEW:
                self._take_left()

    def _take_left(self) -> None:
        """One pass over the weight's gradient for the outer products of several chunks."""
        if self._left:
            columns, means = (torch.stack(each) for each in zip(*self._left, strict=True))
            add_product(self.weight, columns.t(), means, 1)
            self._left.clear()

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        self._take_left()
        return super().gradients()


def _rate(rows: Tensor, columns: Tensor) -> Tensor:
    """1 over the sum of both; 0 where there is next to none, since signs cancel."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.sum(dtype=wide)
    most = torch.maximum(*(each.abs().sum(dtype=wide) for each in (rows, columns)))
    none = total.abs() <= SIGN * most  # not where it is nan
    return torch.where(none, 0.0, total.reciprocal())


def filtered_bytes(hidden: Tensor, weight: Tensor, needs: Sequence[bool], chunk: int) -> int:
    """Bytes of what is gathered of one chunk, and of the sums of those left out."""
    rows, size = min(chunk, len(hidden)), hidden.element_size()
    classes, features = weight.shape
    gathered = min(PIECE, classes // 2)
    wide = 4 if narrow(hidden.dtype) and wide_sum(len(hidden), chunk, hidden.dtype) else size
    product = max(needs[0] * size, needs[1] * wide) * features
    indices = 8 * (classes // 2)
    return (
        gathered * (rows * size + product)
        + indices
        # one by one, and joined for one product
        + 2 * min(FEW, -(-len(hidden) // chunk)) * (needs[1] * (classes + features) * size)
    )
