"""`fxopt::gated`: one kernel on a GPU, where activation and product are two."""

from __future__ import annotations

from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._epilogue import activate
from fxopt.kernels._register import register

from . import reference

SCHEMA = "(Tensor gate, Tensor up, str activation) -> Tensor"


def _reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return reference.gated(gate, up, activation).contiguous()


def _cuda(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    # Wider numbers would need an exponential that is as exact as the library's.
    if not _triton.AVAILABLE or gate.itemsize != 2 or not gate.numel():
        return _reference(gate, up, activation)
    from .triton import gated_forward

    return gated_forward(gate, up, activation)


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def follow(y: Tensor, activation: str, up: Tensor | None, residual: Tensor | None) -> Tensor:
    """What follows a product y, in calls of its own: its activation, times the product `up`, plus
    `residual`."""
    if up is not None and activation in reference.ACTIVATIONS:
        y = gated(y, up, activation)
    else:
        y = activate(y, activation)
        y = y if up is None else y * up
    return (y if residual is None else y + residual).contiguous()


gated = register("gated", SCHEMA, _reference, cuda=_cuda, fake=_fake)
