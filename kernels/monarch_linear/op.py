"""`fxopt::monarch_linear`: the reference everywhere, Triton on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._epilogue import Epilogue, activate_backward, apart, out_dtype
from fxopt.kernels._register import register

from . import reference

SCHEMA = (
    "(Tensor x, Tensor right, Tensor left, Tensor? bias,"
    " str activation='', Tensor? residual=None) -> Tensor"
)

# Beyond this many rows, and with more than twice as many inputs as outputs, two batched products
# of cuBLAS and a copy are faster: on an H100 at 14336 x 4096 by 15 % or more with 4,096 rows, while
# with 256 they are 4 % slower. At the other shapes they are slower by 15 to 36 %.
LIBRARY_ROWS = 256


def _cuda(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    long = x.shape[-1] > 2 * left.shape[0] * left.shape[1]
    many = x.numel() > LIBRARY_ROWS * x.shape[-1]
    if (long and many) or not _triton.AVAILABLE or x.dtype == torch.float64:
        return reference.monarch_linear(x, right, left, bias, activation, residual)
    from . import triton

    after = Epilogue(activation, residual)
    reference.check(x, right, left, after)
    after, residual = apart(x.dtype, after)
    y = triton.monarch_linear(x, right, left, bias, after)
    return y if residual is None else (y + residual).contiguous()


def _fake(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    reference.check(x, right, left, Epilogue(activation, residual))
    dtype = out_dtype(x.dtype, residual)
    return x.new_empty((*x.shape[:-1], left.shape[0] * left.shape[1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, right, left, bias, ctx.activation, _ = inputs
    # The product that an activation was given is computed again.
    ctx.save_for_backward(x, right, left, *((bias,) if ctx.activation else ()))


def _swap(hidden: Tensor, blocks: int) -> Tensor:
    """[b, rows, b * k] with the block axis and the one inside the last axis exchanged."""
    return hidden.unflatten(-1, (blocks, -1)).permute(2, 1, 0, 3).flatten(-2)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The dispatcher drops arguments that are defaults.
    needs = (*ctx.needs_input_grad, False, False)
    needs_x, needs_right, needs_left, needs_bias = needs[:4]
    x, right, left, *bias = ctx.saved_tensors
    grad_residual = grad if needs[5] else None
    if bias:
        product = monarch_linear(x, right, left, *bias)
        grad = activate_backward(grad.to(product.dtype), product, ctx.activation)
    grad = grad.to(left.dtype)
    blocks, out_width = left.shape[:2]
    rows = x.reshape(-1, blocks, right.shape[2]).transpose(0, 1)
    grad_rows = grad.reshape(-1, blocks, out_width).transpose(0, 1)
    grad_hidden = _swap(torch.bmm(grad_rows, left), blocks)
    hidden = _swap(torch.bmm(rows, right.mT), blocks) if needs_left else None
    return (
        torch.bmm(grad_hidden, right).transpose(0, 1).reshape(x.shape) if needs_x else None,
        torch.bmm(grad_hidden.mT, rows) if needs_right else None,
        torch.bmm(grad_rows.mT, hidden) if hidden is not None else None,
        grad.reshape(-1, blocks * out_width).sum(0) if needs_bias else None,
        None,
        grad_residual,
    )


monarch_linear = register(
    "monarch_linear",
    SCHEMA,
    reference.monarch_linear,
    cuda=_cuda,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    casts=("x", "right", "left", "bias"),
)
