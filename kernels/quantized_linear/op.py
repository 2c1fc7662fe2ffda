"""`fxopt::quantized_linear`: the reference everywhere, Triton on CUDA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._epilogue import apart, out_dtype, product_gradients
from fxopt.kernels._register import register
from fxopt.kernels.gated import follow

from . import reference

SCHEMA = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor zero, Tensor? bias, int bits, int group_size,"
    " str activation='', Tensor? residual=None, Tensor? up_packed=None, Tensor? up_scale=None,"
    " Tensor? up_zero=None, Tensor? up_bias=None) -> Tensor"
)
# Beyond this many rows arithmetic outweighs the bytes of the weight, and cuBLAS is faster.
FUSED_ROWS = 256
# Up to these rows a kernel without tensor cores is the fastest, in one launch: with two on an H100
# by 5 to 18 % for 4 bits and 4 to 9 % for 8. With four, whose work three would take, it is slower.
VECTOR_ROWS = 2
# By two 4-bit weights it took 44.8 µs for two rows on an H200, where both products and their gate
# took 43.3 apart; tensor cores take 40.8 for sixteen.
PAIRED_VECTOR_ROWS = {4: 1}
# Up to these rows one launch multiplies by two weights. With more, tiles of both sums would be too
# large for the registers of a program.
PAIRED_ROWS = 16


def _cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    *following: Any,
) -> Tensor:
    after = reference.epilogue(*following)
    reference.check(x, packed, scale, bits, group_size, after)
    if not _triton.AVAILABLE or x.dtype == torch.float64:
        return reference.quantized_linear(
            x, packed, scale, zero, bias, bits, group_size, *following
        )
    from . import triton

    if x.numel() <= (FUSED_ROWS if after.up is None else PAIRED_ROWS) * x.shape[-1]:
        after, residual = apart(x.dtype, after)
        y = triton.quantized_linear(x, packed, scale, zero, bias, bits, group_size, after=after)
        return y if residual is None else (y + residual).contiguous()
    y = _product(bits, group_size, x, packed, scale, zero, bias)
    up = None if after.up is None else _product(bits, group_size, x, *after.up)
    return follow(y, after.activation, up, after.residual)


def _product(
    bits: int,
    group_size: int,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
) -> Tensor:
    from . import triton

    if x.numel() <= FUSED_ROWS * x.shape[-1]:
        return triton.quantized_linear(x, packed, scale, zero, bias, bits, group_size)
    weight = triton.dequantize(packed, scale, zero, bits, group_size)
    return F.linear(x, weight.to(x.dtype), bias).contiguous()


def _fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    *following: Any,
) -> Tensor:
    after = reference.epilogue(*following)
    reference.check(x, packed, scale, bits, group_size, after)
    dtype = out_dtype(x.dtype, after.residual)
    return x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero, bias, ctx.bits, ctx.group_size, ctx.activation, _, *up = inputs
    # The products that an activation or a gate was given are computed again.
    again = (x, bias, *up) if ctx.activation or up[0] is not None else ()
    ctx.save_for_backward(packed, scale, zero, *again)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, the biases and the residual; the quantised weights are frozen."""
    # The dispatcher drops arguments that are defaults.
    needs, grid = (*ctx.needs_input_grad, *[False] * 6), (ctx.bits, ctx.group_size)
    packed, scale, zero, *again = ctx.saved_tensors
    grad_residual = grad if needs[8] else None
    grad_x = grad_up_bias = None
    if again:
        x, bias, *up = again
        y = quantized_linear(x, packed, scale, zero, bias, *grid)
        other = None if up[0] is None else quantized_linear(x, *up, *grid)
        grad, grad_up = product_gradients(grad.to(y.dtype), ctx.activation, y, other)
        if grad_up is not None and up[0] is not None:
            if needs[0]:
                weight = reference.dequantize(up[0], up[1], up[2], *grid)
                grad_x = grad_up.to(scale.dtype) @ weight
            grad_up_bias = _of_bias(grad_up) if needs[12] else None
    if needs[0]:
        product = grad.to(scale.dtype) @ reference.dequantize(packed, scale, zero, *grid)
        grad_x = product if grad_x is None else grad_x + product
    grad_bias = _of_bias(grad) if needs[4] else None
    frozen = (None, None, None)
    return grad_x, *frozen, grad_bias, None, None, None, grad_residual, *frozen, grad_up_bias


def _of_bias(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


quantized_linear = register(
    "quantized_linear",
    SCHEMA,
    reference.quantized_linear,
    cuda=_cuda,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    casts=("x", "bias", "up_bias"),
)
