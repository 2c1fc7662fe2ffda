"""`fxopt::low_rank_linear`: the reference everywhere, Triton for few rows on CUDA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._epilogue import (
    Epilogue,
    apart,
    out_dtype,
    product_gradients,
)
from fxopt.kernels._register import register
from fxopt.kernels.gated import follow

from . import reference

SCHEMA = (
    "(Tensor x, Tensor down, Tensor up, Tensor? bias, str activation='', Tensor? residual=None,"
    " Tensor? second_down=None, Tensor? second_up=None, Tensor? second_bias=None) -> Tensor"
)
# Up to these rows two kernels read factors of any size: one row on an H200 takes 1.57 times the
# speed of two calls of cuBLAS at 4096 x 4096 and half the parameters, 1.13 at 4096 x 14336 and 1.26
# at 14336 x 4096.
VECTOR_ROWS = 2
# Up to these rows they read factors of fewer numbers than LARGE: 16 rows take 1.26 times the speed
# for the first shape's 8.4 million, 0.99 and 0.95 for 29.5 million of the others. 64 rows took 1.07
# for the first, in a single configuration and with more shared memory than many devices have.
FUSED_ROWS, LARGE = 16, 1 << 24
MULTIPLE = 8
"""What rank and input features are multiples of where rows can be read 16 bytes at once."""


def _cuda(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, *following: Any) -> Tensor:
    after = reference.epilogue(*following)
    reference.check(x, down, up, after)
    if _fused(x, down, up, bias, after):
        from . import triton

        after, residual = apart(x.dtype, after)
        y = triton.low_rank_linear(x, down, up, bias, after=after)
        return y if residual is None else (y + residual).contiguous()
    y = reference.product(x, down, up, bias)
    second = None if after.up is None else reference.product(x, *after.up)
    return follow(y, after.activation, second, after.residual)


def _fused(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, after: Epilogue) -> bool:
    """Whether the kernels serve a call: few rows in half precision, two weights of one rank, sizes
    at which they are faster. Dtypes that differ are left to the reference to refuse."""
    second = (None, None, None) if after.up is None else after.up
    one_rank = second[0] is None or len(second[0]) == len(down)
    dtypes = {t.dtype for t in (x, down, up, bias, *second) if t is not None}
    fits = all(side > 0 and side % MULTIPLE == 0 for side in down.shape)
    most = FUSED_ROWS if down.numel() + up.numel() < LARGE else VECTOR_ROWS
    few = x.numel() <= most * x.shape[-1]
    alike = dtypes <= {x.dtype} and x.itemsize == 2
    return _triton.AVAILABLE and alike and one_rank and fits and few


def _fake(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, *following: Any) -> Tensor:
    after = reference.epilogue(*following)
    reference.check(x, down, up, after)
    dtype = out_dtype(x.dtype, after.residual)
    return x.new_empty((*x.shape[:-1], up.shape[0]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, down, up, bias, ctx.activation, _, *second = inputs
    # The products that an activation or a gate was given are computed again.
    again = (bias, *second) if ctx.activation or second[0] is not None else ()
    ctx.save_for_backward(x, down, up, *again)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The dispatcher drops arguments that are defaults.
    needs = (*ctx.needs_input_grad, *[False] * 5)
    x, down, up, *again = ctx.saved_tensors
    grad_residual = grad if needs[5] else None
    grad = grad.to(x.dtype)  # a sum may have promoted
    of_second: tuple[Tensor | None, ...] = (None, None, None, None)
    if again:
        bias, *second = again
        y = low_rank_linear(x, down, up, bias)
        other = None if second[0] is None else low_rank_linear(x, *second)
        grad, grad_second = product_gradients(grad, ctx.activation, y, other)
        if grad_second is not None and second[0] is not None:
            wanted = (needs[0], *needs[6:9])
            of_second = _of_product(grad_second, x, second[0], second[1], wanted)
    grad_x, *of_first = _of_product(grad, x, down, up, needs[:4])
    if grad_x is not None and of_second[0] is not None:
        grad_x = grad_x + of_second[0]
    return grad_x, *of_first, None, grad_residual, *of_second[1:]


def _of_product(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, both factors and the bias, those that are needed."""
    needs_x, needs_down, needs_up, needs_bias = needs
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_hidden = grad_rows @ up if needs_x or needs_down else None
    return (
        (grad_hidden @ down).reshape(x.shape) if needs_x and grad_hidden is not None else None,
        grad_hidden.T @ rows if needs_down and grad_hidden is not None else None,
        grad_rows.T @ (rows @ down.T) if needs_up else None,
        grad_rows.sum(0) if needs_bias else None,
    )


low_rank_linear = register(
    "low_rank_linear",
    SCHEMA,
    reference.low_rank_linear,
    cuda=_cuda,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    casts=("x", "down", "up", "bias", "second_down", "second_up", "second_bias"),
)
