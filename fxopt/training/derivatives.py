"""Saved tensors that the backward reads for the derivative of a function of each value alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..ir.site import Derivative
from .pricing import op_call
from .random import dropout_noise
from .step import Step

aten = torch.ops.aten
PLACES: dict[Any, int] = {
    aten.threshold_backward.default: 1,
    aten.leaky_relu_backward.default: 1,
    aten.hardtanh_backward.default: 1,
    aten.native_dropout_backward.default: 1,
    aten.gelu_backward.default: 1,
    aten.silu_backward.default: 1,
    aten.mish_backward.default: 1,
    aten.softplus_backward.default: 1,
    aten.hardswish_backward.default: 1,
    aten.elu_backward.default: 5,
    aten.tanh_backward.default: 1,
    aten.sigmoid_backward.default: 1,
}
"""Ops that are their first argument times a function of each value of another, by its place."""


def derivative_of(step: Step, owner: fx.Node) -> Derivative | None:
    """The one op of the backward that reads an owner's memory, if it is one of `PLACES`."""
    # views are taken for it
    ops = [n for n in step.readers.get(owner, ()) if step.owner.get(n) is not owner]
    if len(ops) != 1:
        return None
    (op,) = ops
    args, place, name = _call(op, owner)
    if place is None or not isinstance(gradient := args[0], fx.Node):
        return None
    x, given = args[place].meta["val"], gradient.meta["val"]
    inside = any(step.owner.get(n) is owner for n in op.all_input_nodes if n is not args[place])
    if inside or not whole(x, step.bytes[owner]) or op.meta["val"].dtype != given.dtype:
        return None
    rest = tuple(a for i, a in enumerate(args) if i not in (0, place))
    return Derivative(
        name,
        place,
        rest,
        tuple(op.kwargs.items()),  # pyright: ignore[reportArgumentType]
        tuple(map(int, x.shape)),
        tuple(map(int, x.stride())),
        tuple(map(int, given.stride())),
        given.dtype,
        op_call(op),
    )


def _call(op: fx.Node, owner: fx.Node) -> tuple[tuple[Any, ...], int | None, str]:
    """Arguments of an op, the place of x among them, and its name."""
    if op.target is aten.mul.Tensor and owner.target is dropout_noise:
        # its values are two; what is drawn with is part of the op then
        args = (*op.args, owner.args[1])
        return args, 1, "dropout_noise"
    name = getattr(getattr(op.target, "overloadpacket", None), "__name__", "")
    return op.args, PLACES.get(op.target), name


def whole(x: Tensor, size: int) -> bool:
    """Whether a tensor covers its memory of so many bytes, each place once."""
    with torch.no_grad():
        dense = x.stride() == torch.empty_like(x).stride()
    return dense and x.numel() * x.element_size() == size
