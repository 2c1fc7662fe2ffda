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


@pytest.mark.parametrize("activation", ["", "silu", "gelu", "gelu_tanh", "relu"])
def test_what_follows_monarch(activation: str) -> None:
    """To the bit what calls of their own give, with their gradients."""
    first, second, bias = (factor / 4 for factor in factors("monarch", torch.float64))
    x, residual = torch.randn(3, 63).double(), torch.randn(42, 3).double().T
    inputs = [tensor.requires_grad_() for tensor in (x, first, second, bias, residual)]

    def call(*given: Tensor) -> Tensor:
        return monarch_linear(*given[:4], activation, given[4])

    product = monarch_linear(x, first, second, bias)
    known = {"": lambda y: y, "gelu_tanh": partial(F.gelu, approximate="tanh")}
    active = (known.get(activation) or getattr(F, activation))(product)
    assert torch.equal(call(*inputs), active + residual)
    assert torch.autograd.gradcheck(call, inputs)
    given = [tensor.detach().float().requires_grad_() for tensor in inputs]
    torch.library.opcheck(OPS["monarch"][1], (*given[:4], activation, given[4]))


@pytest.mark.parametrize("activation", ["", "gelu"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_residual_of_another_dtype_promotes(activation: str, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    first, second, _ = factors("monarch", dtype)
    x, residual = torch.randn(3, 63).bfloat16(), torch.randn(3, 42)
    inputs = [tensor.requires_grad_() for tensor in (x, first, second, residual)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = monarch_linear(x, first, second, None, activation, residual)
        product = monarch_linear(x, first, second, None)
        calls = (F.gelu(product) if activation else product) + residual
    assert (product.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, calls)
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert all(torch.isfinite(gradient).all() for gradient in found)
    if not autocast:
        wanted = torch.autograd.grad(calls.square().sum(), inputs)
        assert all(map(torch.equal, found, wanted))
        torch.library.opcheck(OPS["monarch"][1], (x, first, second, None, activation, residual))


def test_what_cannot_follow_monarch_is_an_error() -> None:
    first, second, bias = factors("monarch")
    x = torch.randn(3, 63)
    with pytest.raises(ValueError, match="monarch_linear: activation must be empty, silu"):
        monarch_linear(x, first, second, bias, "tanh")
    with pytest.raises(ValueError, match=r"monarch_linear: the residual is \[1, 42\]"):
        monarch_linear(x, first, second, bias, "", torch.randn(1, 42))
