"""RMSNorm, its weight and its sum in one kernel: no further from float64 than the calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.ir import ops
from fxopt.kernels.rms_norm import REFERENCE, add_rms_norm, rms_norm

pytest.importorskip("triton")

from fxopt.kernels.rms_norm.triton import norm_forward
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = 1e-5
# The interpreter has no bfloat16 of its own.
DTYPES = [torch.float16, torch.float32, torch.float64]
DTYPES += [torch.bfloat16] if DEVICE == "cuda" else []


def draw(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = (3 * torch.randn(*shape, device=DEVICE) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(shape[-1], device=DEVICE)
    return x.to(dtype), residual.to(dtype), weight.to(dtype)


def formula(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, True) + EPSILON).sqrt() * weight


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 63), (1, 1, 2049), (3, 500), (33,), (2, 3, 7, 16)])
@pytest.mark.parametrize("summed", [False, True])
def test_as_close_as_the_calls(dtype: torch.dtype, shape: tuple[int, ...], summed: bool) -> None:
    x, residual, weight = draw(dtype, *shape)
    total, out = norm_forward(x, residual if summed else None, weight, EPSILON)
    assert torch.equal(total, x + residual if summed else x)
    exact = formula(total, weight)
    assert out.is_contiguous()
    assert out.dtype == dtype
    rounding = 2 * torch.finfo(dtype).eps * float(exact.square().mean().sqrt())
    bound = 1.05 * error(REFERENCE(total, weight, EPSILON), exact)
    assert error(out, exact) <= max(bound, rounding if dtype.itemsize > 2 else 0)


def test_rows_that_lie_apart() -> None:
    x, residual, weight = draw(torch.float32, 4, 6, 20)
    turned = x.transpose(0, 1), residual.transpose(0, 1)
    found = norm_forward(*turned, weight, EPSILON)
    expected = norm_forward(x, residual, weight, EPSILON)
    assert all(torch.equal(a, b.transpose(0, 1)) for a, b in zip(found, expected, strict=True))


def test_a_row_of_zeros_is_zero() -> None:
    zero = torch.zeros(2, 20, device=DEVICE)
    assert not norm_forward(zero, zero, torch.ones(20, device=DEVICE), EPSILON)[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype: torch.dtype) -> None:
    x, residual, weight = draw(dtype, 2, 3, 20)
    torch.library.opcheck(rms_norm, (x, weight, EPSILON))
    torch.library.opcheck(add_rms_norm, (x, residual, weight, EPSILON))


def test_gradients_flow_where_they_are_needed() -> None:
    x, residual, weight = (t.double().requires_grad_() for t in draw(torch.float64, 2, 5))
    check = torch.autograd.gradcheck
    assert check(lambda *given: ops.add_rms_norm(*given, EPSILON), (x, residual, weight))
    assert check(lambda *given: ops.rms_norm(*given, EPSILON), (x, weight))


COMPILE = """
import triton.language as tl
from fxopt.kernels.rms_norm.triton import _norm_kernel as kernel
from tests.kernels.ahead_of_time import build

for summed, block, columns in ((True, 1, 4096), (False, 16, 128), (True, 1, 16384)):
    constants = dict(HAS_RESIDUAL=summed, WIDE=tl.float32, BLOCK_M=block, BLOCK_D=columns)
    pointers = {n: "*bf16" for n in ("x", "residual", "weight", "total", "out")}
    pointers["epsilon"] = "fp32"
    assert build(kernel, pointers, **constants).asm["cubin"]
"""


def test_compile_ahead_of_time_for_hopper() -> None:
    compiled(COMPILE)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 1, 4096), (3, 777, 511), (5, 9, 128), (2, 20000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_the_device(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual, weight = draw(dtype, *shape)
    total, out = ops.add_rms_norm(x, residual, weight, EPSILON)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, ops.rms_norm(total, weight, EPSILON))
    exact = formula(total, weight)
    theirs = error(REFERENCE(total, weight, EPSILON), exact)
    least = torch.finfo(torch.float32).eps * float(exact.square().mean().sqrt())
    assert error(out, exact) <= max(1.05 * theirs, least)
