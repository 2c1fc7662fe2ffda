"""`fxopt::quantized_experts`: the reference everywhere, Triton on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._register import register

from . import reference

SCHEMA = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor zero, Tensor offsets, int bits, int group_size)"
    " -> Tensor"
)


def _cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    if not _triton.AVAILABLE or x.dtype == torch.float64:
        return reference.quantized_experts(x, packed, scale, zero, offsets, bits, group_size)
    from . import triton

    reference.check(x, packed, scale, offsets, bits, group_size)
    return triton.quantized_experts(x, packed, scale, zero, offsets, bits, group_size)


def _fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    reference.check(x, packed, scale, offsets, bits, group_size)
    return x.new_empty((x.shape[0], packed.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, zero, offsets, ctx.bits, ctx.group_size = inputs
    ctx.save_for_backward(packed, scale, zero, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x; the quantised weights are frozen."""
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = _gradient(grad, *ctx.saved_tensors, ctx.bits, ctx.group_size)
    return grad_x, None, None, None, None, None, None


def _fake_gradient(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    return grad.new_empty((grad.shape[0], packed.shape[2] * 8 // bits))


# An op of its own: a tracer cannot follow how many rows an expert has.
_gradient = register(
    "quantized_experts_gradient",
    SCHEMA.replace("Tensor x,", "Tensor grad,"),
    reference.gradient,
    fake=_fake_gradient,
)
quantized_experts = register(
    "quantized_experts",
    SCHEMA,
    reference.quantized_experts,
    cuda=_cuda,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
