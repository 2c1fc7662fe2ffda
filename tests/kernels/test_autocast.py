"""Linear ops under autocast: dtypes as `F.linear` has them, in eager, on fake tensors and compiled,
and gradients against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.kernels import fp8_linear, low_rank_linear, monarch_linear, quantized_linear

BF16 = torch.bfloat16


class Case:
    """An op on float32 tensors: `trained` may have gradients, `frozen` stand between them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.x, self.residual = torch.randn(3, 5, 64), torch.randn(3, 5, 48)
        self.bias = torch.randn(48)
        weight = torch.randn(48, 64) / 8
        self.factors: tuple[Tensor, ...] = ()
        if name == "low_rank":
            self.op: Callable[..., Tensor] = low_rank_linear.low_rank_linear
            self.factors = torch.randn(16, 64) / 8, torch.randn(48, 16) / 4
            self.dense = self.factors[1].double() @ self.factors[0].double()
        elif name == "monarch":
            self.op = monarch_linear.monarch_linear
            self.factors = torch.randn(2, 16, 32) / 8, torch.randn(2, 24, 16) / 4
            self.dense = monarch_linear.dense(*(factor.double() for factor in self.factors))
        elif name == "fp8":
            self.op = fp8_linear.fp8_linear
            scale = fp8_linear.row_scale(weight)
            self.frozen: tuple[Any, ...] = fp8_linear.quantize(weight, scale), scale[:, 0]
            self.dense = fp8_linear.dequantize(*self.frozen).double()
        else:
            self.op = quantized_linear.quantized_linear
            self.frozen = quantized_linear.quantize(weight, 4, 32)
            self.dense = quantized_linear.dequantize(*self.frozen, 4, 32).double()
        self.rest = (4, 32) if name == "quantized" else ()

    def call(self, x: Tensor, bias: Tensor, *factors: Tensor, **following: Any) -> Tensor:
        weight = factors or self.frozen
        return self.op(x, *weight, bias, *self.rest, **following)

    @property
    def trained(self) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in (self.x, self.bias, *self.factors)]


@pytest.fixture(params=["low_rank", "monarch", "fp8", "quantized"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("activation", ["", "gelu"])
def test_operands_are_cast_and_the_residual_promotes(case: Case, activation: str) -> None:
    half = [t.to(BF16) for t in (case.x, case.bias, *case.factors)]
    with torch.autocast("cpu", BF16):
        y = case.call(case.x, case.bias, *case.factors, activation=activation)
        added = case.call(
            case.x, case.bias, *case.factors, activation=activation, residual=case.residual
        )
    assert y.dtype == BF16
    assert torch.equal(y, case.call(*half, activation=activation))
    assert added.dtype == torch.float32
    assert torch.equal(added, y + case.residual)


def test_float64_stays() -> None:
    case = Case("low_rank")
    double = [t.double() for t in (case.x, case.bias, *case.factors)]
    with torch.autocast("cpu", BF16):
        assert torch.equal(case.call(*double), case.call(*double))
        assert case.call(*double).dtype == torch.float64


def test_fakes_have_the_same_dtypes(case: Case) -> None:
    following: dict[str, Any] = {"activation": "silu", "residual": case.residual}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.autocast("cpu", BF16):
        real = case.call(case.x, case.bias, *case.factors)
        wide = case.call(case.x, case.bias, *case.factors, **following)
        with mode:
            x = mode.from_tensor(case.x)
            fake = case.call(x, case.bias, *case.factors)
            fake_wide = case.call(x, case.bias, *case.factors, **following)
    assert (fake.dtype, fake_wide.dtype) == (real.dtype, wide.dtype) == (BF16, torch.float32)


def gradients(case: Case, call: Callable[..., Tensor], grad: Tensor) -> list[Tensor]:
    given = case.trained
    with torch.autocast("cpu", BF16):
        y = call(*given)
    return list(torch.autograd.grad(y, given, grad.to(y.dtype)))


@pytest.mark.parametrize("activation", ["", "silu"])
def test_gradients_are_as_near_to_float64_as_those_of_calls(case: Case, activation: str) -> None:
    grad = torch.randn(3, 5, 48).to(BF16)

    def following(y: Tensor) -> Tensor:
        return F.silu(y) if activation else y

    def calls(x: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        if case.name == "low_rank":
            return following(F.linear(F.linear(x, factors[0]), factors[1], bias))
        weight = monarch_linear.dense(*factors) if factors else case.dense.float()
        return following(F.linear(x, weight, bias))

    found = gradients(case, lambda *given: case.call(*given, activation=activation), grad)
    own = gradients(case, calls, grad)
    exact = [t.detach().double().requires_grad_() for t in case.trained]
    if factors := exact[2:]:
        chained = case.name == "low_rank"
        weight = factors[1] @ factors[0] if chained else monarch_linear.dense(*factors)
    else:
        weight = case.dense
    y = following(F.linear(exact[0], weight, exact[1]))
    wanted = torch.autograd.grad(y, exact, grad.double())
    for got, calls_own, want in zip(found, own, wanted, strict=True):
        assert got.dtype == torch.float32
        budget = (calls_own.double() - want).norm()
        # fp8 rounds x as well, which an activation's derivative sees.
        slack = 0.03 if case.name == "fp8" and activation else 2**-9
        assert (got.double() - want).norm() <= 2 * budget + slack * want.norm()


def test_compiled_calls_compute_the_same(case: Case) -> None:
    grad = torch.randn(3, 5, 48).to(BF16)

    def call(*given: Tensor) -> Tensor:
        return case.call(*given, activation="gelu") * 2

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", BF16):
        assert torch.equal(compiled(*case.trained), call(*case.trained))
    # A compiled backward has autocast, too.
    for got, want in zip(gradients(case, compiled, grad), gradients(case, call, grad), strict=True):
        assert (got - want).norm() <= 2**-7 * want.norm()
