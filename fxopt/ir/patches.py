"""Convolutions whose kernel is their stride: linear layers over the patches of an input.

x [batch, channels, *sizes] is cut into patches, each one row of channels * prod(patch) numbers in
the order of the weight [out, channels, *patch]; y is [batch, out, *counts]. What a stride leaves
over at the end of a size belongs to no patch. For patches of one position both ways are views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Step = tuple[Any, tuple[Any, ...]]
"""An op and its arguments after the tensor."""


def input_steps(patch: Sequence[int]) -> list[Step]:
    """x [batch, channels, *sizes] -> rows [batch, *counts, channels * prod(patch)]; none for a
    layer that is no convolution."""
    if not patch:
        return []
    count = len(patch)
    places = range(2, 2 + count)
    order = [0, *places, 1]
    permute = torch.ops.aten.permute.default
    if math.prod(patch) == 1:
        return [(permute, (order,))]
    unfold = torch.ops.aten.unfold.default
    inside = range(2 + count, 2 + 2 * count)
    return [
        *((unfold, (place, size, size)) for place, size in zip(places, patch, strict=True)),
        (permute, ([*order, *inside],)),
        (torch.ops.aten.flatten.using_ints, (1 + count,)),
    ]


def output_steps(patch: Sequence[int]) -> list[Step]:
    """Rows [batch, *counts, out] -> y [batch, out, *counts], as a view."""
    if not patch:
        return []
    return [(torch.ops.aten.permute.default, ([0, 1 + len(patch), *range(1, 1 + len(patch))],))]


def to_rows(x: Tensor, patch: Sequence[int]) -> Tensor:
    """The rows that a layer with these patches multiplies; x itself without any."""
    return _run(x, input_steps(patch))


def from_rows(y: Tensor, patch: Sequence[int]) -> Tensor:
    """What the layer returns, from its rows."""
    return _run(y, output_steps(patch))


def output_rows(y: Tensor, patch: Sequence[int]) -> Tensor:
    """The rows of what the layer returned."""
    return y.movedim(1, -1) if patch else y


def _run(x: Tensor, steps: Sequence[Step]) -> Tensor:
    for target, arguments in steps:
        x = target(x, *arguments)
    return x
