"""`fxopt::quantized_linear`: the reference everywhere, Triton on CUDA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._register import register

from . import reference

SCHEMA = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor zero, Tensor? bias, int bits, int group_size)"
    " -> Tensor"
)
# Beyond this many rows arithmetic outweighs the bytes of the weight, and cuBLAS is faster.
FUSED_ROWS = 256
# Up to these rows a kernel without tensor cores is the fastest, in one launch: with two on an H100
# by 5 to 18 % for 4 bits and 4 to 9 % for 8. With four, whose work three would take, it is slower.
VECTOR_ROWS = 2


def _cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    if not _triton.AVAILABLE or x.dtype == torch.float64:
        return reference.quantized_linear(x, packed, scale, zero, bias, bits, group_size)
    from . import triton

    reference.check(x, packed, scale, bits, group_size)
    if x.numel() > FUSED_ROWS * x.shape[-1]:
        weight = triton.dequantize(packed, scale, zero, bits, group_size)
        return F.linear(x, weight, bias).contiguous()
    return triton.quantized_linear(x, packed, scale, zero, bias, bits, group_size)


def _fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    reference.check(x, packed, scale, bits, group_size)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, zero, _, ctx.bits, ctx.group_size = inputs
    ctx.save_for_backward(packed, scale, zero)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the quantised weight is frozen."""
    needs_x, _, _, _, needs_bias, _, _ = ctx.needs_input_grad
    packed, scale, zero = ctx.saved_tensors
    weight = reference.dequantize(packed, scale, zero, ctx.bits, ctx.group_size)
    grad_x = grad @ weight if needs_x else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None
    return grad_x, None, None, None, grad_bias, None, None


quantized_linear = register(
    "quantized_linear",
    SCHEMA,
    reference.quantized_linear,
    cuda=_cuda,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
