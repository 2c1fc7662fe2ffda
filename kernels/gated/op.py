"""`fxopt::gated`: one kernel on a GPU, where activation and product are two."""

from __future__ import annotations

from torch import Tensor

from fxopt.kernels import _triton
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


gated = register("gated", SCHEMA, _reference, cuda=_cuda, fake=_fake)
