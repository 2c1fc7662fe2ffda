"""Low-rank and Monarch linear layers against the dense weight that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.low_rank_linear import low_rank_linear
from fxopt.kernels.monarch_linear import dense, monarch_linear

OPS = {
    "low_rank": (low_rank_linear, torch.ops.fxopt.low_rank_linear.default),
    "monarch": (monarch_linear, torch.ops.fxopt.monarch_linear.default),
}
SHAPES = {
    "low_rank": ((9, 63), (50, 9), 63, 50),
    "monarch": ((3, 15, 21), (3, 14, 15), 63, 42),
}


def factors(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """First and second factor, bias."""
    first, second, _, out = SHAPES[name]
    return torch.randn(first).to(dtype), torch.randn(second).to(dtype), torch.randn(out).to(dtype)


def weight(name: str, first: Tensor, second: Tensor) -> Tensor:
    """The dense weight, block by block for Monarch."""
    if name == "low_rank":
        return second @ first
    blocks, rank = first.shape[0], first.shape[1] // first.shape[0]
    return torch.cat(
        [
            torch.cat(
                [
                    second[i][:, j * rank : (j + 1) * rank] @ first[j][i * rank : (i + 1) * rank]
                    for j in range(blocks)
                ],
                dim=1,
            )
            for i in range(blocks)
        ]
    )


@pytest.fixture(params=list(OPS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_equals_float64(name: str, dtype: torch.dtype) -> None:
    first, second, bias = factors(name, dtype)
    x = torch.randn(5, 3, SHAPES[name][2]).to(dtype).transpose(0, 1)
    out = OPS[name][0](x, first, second, bias)
    assert out.dtype == dtype
    assert out.is_contiguous()
    exact_weight = weight(name, first.double(), second.double())
    exact = F.linear(x.double(), exact_weight, bias.double())
    rounded = exact_weight.to(dtype)
    own = F.linear(x, rounded, bias).double()
    budget = (own - F.linear(x.double(), rounded.double(), bias.double())).norm()
    assert (out.double() - exact).norm() <= 4 * budget + 1e-12


def test_dense_is_the_weight() -> None:
    first, second, _ = factors("monarch")
    torch.testing.assert_close(dense(first, second), weight("monarch", first, second))


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (1,), (2, 3)], ids=str)
def test_any_leading_dimensions(name: str, leading: tuple[int, ...]) -> None:
    first, second, bias = (t.requires_grad_() for t in factors(name))
    x = torch.randn(*leading, SHAPES[name][2], requires_grad=True)
    out = OPS[name][0](x, first, second, bias)
    torch.testing.assert_close(
        out, F.linear(x, weight(name, first, second), bias), rtol=1e-4, atol=1e-4
    )
    out.sum().backward()
    for tensor in (x, first, second, bias):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape


@pytest.mark.slow
def test_gradients(name: str) -> None:
    first, second, bias = (t.requires_grad_() for t in factors(name, torch.float64))
    x = torch.randn(2, 3, SHAPES[name][2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(OPS[name][0], (x, first, second, bias))
    assert torch.autograd.gradcheck(
        lambda x, first: OPS[name][0](x, first, second.detach(), None), (x, first)
    )


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(name: str, with_bias: bool) -> None:
    first, second, bias = (t.requires_grad_() for t in factors(name))
    x = torch.randn(5, 3, SHAPES[name][2]).transpose(0, 1).requires_grad_()
    torch.library.opcheck(OPS[name][1], (x, first, second, bias if with_bias else None))


def test_compiles_with_inductor(name: str) -> None:
    op: Callable[..., Tensor] = OPS[name][0]
    first, second, bias = factors(name)

    def block(x: Tensor) -> Tensor:
        return op(x.transpose(0, 1) * 2, first, second, bias).relu()

    x = torch.randn(5, 3, SHAPES[name][2])
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


def test_factors_that_do_not_chain_are_errors(name: str) -> None:
    first, second, _ = factors(name)
    op, x = OPS[name][0], torch.randn(2, SHAPES[name][2])
    with pytest.raises(ValueError, match="do not chain"):
        op(x[:, :-1], first, second, None)
    with pytest.raises(ValueError, match="do not chain"):
        op(x, first, second[..., :-1], None)


ACTIVATIONS = {
    "": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_follows(name: str, activation: str) -> None:
    """To the bit what calls of their own give, with their gradients."""
    op = OPS[name][0]
    first, second, bias = (factor / 4 for factor in factors(name, torch.float64))
    x, residual = torch.randn(3, 63).double(), torch.randn(SHAPES[name][3], 3).double().T
    inputs = [tensor.requires_grad_() for tensor in (x, first, second, bias, residual)]
    calls = ACTIVATIONS[activation](op(x, first, second, bias)) + residual
    assert_same(op(*inputs[:4], activation, residual), calls, inputs)


@pytest.mark.parametrize("activation", ["", "silu", "relu"])
@pytest.mark.parametrize("added", [False, True])
def test_two_weights_of_low_rank(activation: str, added: bool) -> None:
    """The second of another rank."""
    first, other = factors("low_rank", torch.float64), factors("low_rank", torch.float64)
    down, up = torch.randn(7, 63).double(), torch.randn(50, 7).double()
    x, residual = torch.randn(3, 63).double(), torch.randn(3, 50).double() if added else None
    inputs = [(t / 4).requires_grad_() for t in (x, *first, down, up, other[2])]
    gate, up_product = low_rank_linear(*inputs[:4]), low_rank_linear(inputs[0], *inputs[4:])
    calls = ACTIVATIONS[activation](gate) * up_product
    calls = calls if residual is None else calls + residual
    out = low_rank_linear(*inputs[:4], activation, residual, *inputs[4:])
    assert_same(out, calls, inputs)


def assert_same(out: Tensor, calls: Tensor, inputs: list[Tensor]) -> None:
    assert torch.equal(out, calls)
    assert out.is_contiguous()
    grad = torch.randn(out.shape, dtype=out.dtype)
    found, wanted = (torch.autograd.grad(y, inputs, grad) for y in (out, calls))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_opcheck_of_what_follows(name: str) -> None:
    first, second, bias = (t.requires_grad_() for t in factors(name))
    x, residual = torch.randn(3, 63), torch.randn(SHAPES[name][3], 3).T
    again = (first, second, bias) if name == "low_rank" else ()
    torch.library.opcheck(OPS[name][1], (x, first, second, bias, "silu", residual, *again))


@pytest.mark.parametrize("activation", ["", "gelu"])
def test_a_residual_of_another_dtype_promotes(name: str, activation: str) -> None:
    op, width = OPS[name][0], SHAPES[name][3]
    first, second, _ = factors(name, torch.bfloat16)
    x, residual = torch.randn(3, 63).bfloat16(), torch.randn(3, width)
    inputs = [tensor.requires_grad_() for tensor in (x, first, second, residual)]
    out = op(x, first, second, None, activation, residual)
    product = op(x, first, second, None)
    calls = (F.gelu(product) if activation else product) + residual
    assert (product.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, calls)
    found = torch.autograd.grad(out.square().sum(), inputs)
    wanted = torch.autograd.grad(calls.square().sum(), inputs)
    assert all(map(torch.equal, found, wanted))


def test_what_cannot_follow_is_an_error(name: str) -> None:
    op, width = OPS[name][0], SHAPES[name][3]
    first, second, bias = factors(name)
    x = torch.randn(3, 63)
    with pytest.raises(ValueError, match=f"{name}_linear: activation must be empty, silu"):
        op(x, first, second, bias, "tanh")
    with pytest.raises(ValueError, match=rf"{name}_linear: the residual is \[1, {width}\]"):
        op(x, first, second, bias, "", torch.randn(1, width))


def test_second_weights_of_low_rank_that_do_not_fit_are_errors() -> None:
    first, second, bias = factors("low_rank")
    x, plain = torch.randn(3, 63), ("silu", None)
    with pytest.raises(ValueError, match="a second weight is second_down and second_up"):
        low_rank_linear(x, first, second, bias, *plain, first, None)
    with pytest.raises(ValueError, match=r"down \[9, 63\] and up \[50, 8\] do not chain"):
        low_rank_linear(x, first, second, bias, *plain, first, second[:, 1:])
    with pytest.raises(ValueError, match="the second weight has 49 outputs, the first 50"):
        low_rank_linear(x, first, second, bias, *plain, first, second[1:])
