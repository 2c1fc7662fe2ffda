"""`fxopt::fp8_linear`: the reference everywhere, tensor cores on CUDA devices that have e4m3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._register import register

from . import reference

SCHEMA = "(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor"
# What `torch._scaled_mm` with a scale a row asks for: sides, and the first capability with e4m3.
MULTIPLE, CAPABILITY = 16, (8, 9)
# Up to these rows the time is that of reading the weight, which `_scaled_mm` does well only where
# it has many output tiles: with 16 rows on an H100 1.54 times cuBLAS's speed in bf16 at
# 4096 x 14336 (the kernel of few rows 1.27), but 1.07 at 4096 x 4096 (1.11) and 1.11 at
# 14336 x 4096 (1.24).
FEW_ROWS, WIDE = 16, 8192


def _cuda(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    reference.check(x, weight, scale)
    odd = any(side % MULTIPLE for side in weight.shape)
    old = torch.cuda.get_device_capability(x.device) < CAPABILITY
    if odd or old or not _triton.AVAILABLE or x.dtype != torch.bfloat16 or x.numel() == 0:
        return reference.fp8_linear(x, weight, scale, bias)
    from . import triton

    count = x.numel() // x.shape[-1]
    if count == 1 and x.shape[-1] <= triton.LONGEST:
        return triton.one_row(x, weight, scale, bias)
    if count <= FEW_ROWS and len(weight) < WIDE:
        return triton.fp8_linear(x, weight, scale, bias)
    rows, own = triton.quantize_rows(x.reshape(-1, x.shape[-1]))
    scaled: Any = torch.ops.aten._scaled_mm.default
    y = scaled(rows, weight.t(), own, scale[None], bias, None, x.dtype, True)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    reference.check(x, weight, scale)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, _ = inputs
    ctx.save_for_backward(weight, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; rounding x counts as the identity, the weight is frozen."""
    needs_x, _, _, needs_bias = ctx.needs_input_grad
    weight, scale = ctx.saved_tensors
    restored = reference.dequantize(weight, scale).to(grad.dtype)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None
    return grad @ restored if needs_x else None, None, None, grad_bias


fp8_linear = register(
    "fp8_linear",
    SCHEMA,
    reference.fp8_linear,
    cuda=_cuda,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
