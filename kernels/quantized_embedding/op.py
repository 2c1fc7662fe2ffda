"""`fxopt::quantized_embedding`: the reference everywhere, Triton on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._register import register

from . import reference

SCHEMA = (
    "(Tensor packed, Tensor indices, Tensor scale, Tensor zero, int bits, int group_size) -> Tensor"
)


def _cuda(
    packed: Tensor, indices: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int
) -> Tensor:
    if not _triton.AVAILABLE or scale.dtype == torch.float64:
        return reference.quantized_embedding(packed, indices, scale, zero, bits, group_size)
    from . import triton

    reference.check(packed, scale, bits, group_size)
    return triton.quantized_embedding(packed, indices, scale, zero, bits, group_size)


def _fake(
    packed: Tensor, indices: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int
) -> Tensor:
    reference.check(packed, scale, bits, group_size)
    return scale.new_empty((*indices.shape, packed.shape[1] * 8 // bits))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    """The quantised table is frozen."""
    return (None,) * 6


quantized_embedding = register(
    "quantized_embedding",
    SCHEMA,
    reference.quantized_embedding,
    cuda=_cuda,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
