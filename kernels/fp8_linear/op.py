"""`fxopt::fp8_linear`: the reference everywhere, tensor cores on CUDA devices that have e4m3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._epilogue import apart, contiguous, out_dtype, product_gradients
from fxopt.kernels._register import register
from fxopt.kernels.gated import follow

from . import reference

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str activation='',"
    " Tensor? residual=None, Tensor? up_weight=None, Tensor? up_scale=None,"
    " Tensor? up_bias=None) -> Tensor"
)
# What `torch._scaled_mm` with a scale a row asks for: sides, and the first capability with e4m3.
MULTIPLE, CAPABILITY = 16, (8, 9)
# Up to these rows the time is that of reading the weight, which `_scaled_mm` does well only where
# it has many output tiles: with 16 rows on an H100 1.54 times cuBLAS's speed in bf16 at
# 4096 x 14336 (the kernel of few rows 1.27), but 1.07 at 4096 x 4096 (1.11) and 1.11 at
# 14336 x 4096 (1.24).
FEW_ROWS, WIDE = 16, 8192


def _cuda(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *following: Any) -> Tensor:
    after = reference.epilogue(*following)
    reference.check(x, weight, scale, after)
    odd = any(side % MULTIPLE for side in weight.shape)
    old = torch.cuda.get_device_capability(x.device) < CAPABILITY
    if odd or old or not _triton.AVAILABLE or x.dtype != torch.bfloat16 or x.numel() == 0:
        return reference.fp8_linear(x, weight, scale, bias, *following)
    from . import triton

    count = x.numel() // x.shape[-1]
    alone = count == 1 and x.shape[-1] <= triton.LONGEST
    if alone or (count <= FEW_ROWS and len(weight) < WIDE):
        after, residual = apart(x.dtype, after)
        kernel = triton.one_row if alone else triton.fp8_linear
        y = kernel(x, weight, scale, bias, after=after)
        return y if residual is None else (y + residual).contiguous()
    rows, own = triton.quantize_rows(x.reshape(-1, x.shape[-1]))

    def product(weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        scaled: Any = torch.ops.aten._scaled_mm.default
        # The library refuses gaps in weights and scales, and reads a bias as if it had none.
        weight, scale, bias = weight.contiguous(), scale.contiguous(), contiguous(bias)
        y = scaled(rows, weight.t(), own, scale[None], bias, None, x.dtype, True)
        return y.reshape(*x.shape[:-1], len(weight))

    y = product(weight, scale, bias)
    up = None if after.up is None else product(*after.up)
    return follow(y, after.activation, up, after.residual)


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *following: Any) -> Tensor:
    after = reference.epilogue(*following)
    reference.check(x, weight, scale, after)
    dtype = out_dtype(x.dtype, after.residual)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, bias, ctx.activation, _, *up = inputs
    # The products that an activation or a gate was given are computed again.
    again = (bias, *up) if ctx.activation or up[0] is not None else ()
    ctx.dtype = x.dtype
    ctx.save_for_backward(weight, scale, *((x, *again) if again else ()))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, the biases and the residual; rounding x counts as the identity, the weights
    are frozen."""
    # The dispatcher drops arguments that are defaults.
    needs = (*ctx.needs_input_grad, *[False] * 5)
    weight, scale, *again = ctx.saved_tensors
    grad_residual = grad if needs[5] else None
    grad = grad.to(ctx.dtype)  # a sum may have promoted
    of_up: tuple[Tensor | None, Tensor | None] = (None, None)
    if again:
        x, bias, *up = again
        y = fp8_linear(x, weight, scale, bias)
        other = None if up[0] is None else fp8_linear(x, *up)
        grad, grad_up = product_gradients(grad, ctx.activation, y, other)
        if grad_up is not None and up[0] is not None:
            of_up = _of_product(grad_up, up[0], up[1], needs[0], needs[8])
    grad_x, grad_bias = _of_product(grad, weight, scale, needs[0], needs[3])
    if grad_x is not None and of_up[0] is not None:
        grad_x = grad_x + of_up[0]
    return grad_x, None, None, grad_bias, None, grad_residual, None, None, of_up[1]


def _of_product(
    grad: Tensor, weight: Tensor, scale: Tensor, needs_x: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and the bias, those that are needed."""
    restored = reference.dequantize(weight, scale).to(grad.dtype) if needs_x else None
    return (
        None if restored is None else grad @ restored,
        grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None,
    )


fp8_linear = register(
    "fp8_linear",
    SCHEMA,
    reference.fp8_linear,
    cuda=_cuda,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    casts=("x", "bias", "up_bias"),
)
