"""Integer linear layers against float64: format, op, gradients, tracers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.kernels.quantized_linear import (
    REFERENCE,
    dequantize,
    pack,
    quantize,
    quantized_linear,
    unpack,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = ((8, 63), (8, 126), (4, 42), (4, 126))


@given(
    bits=st.sampled_from((4, 8)),
    out=st.integers(1, 5),
    groups=st.integers(1, 4),
    half=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_unpack_inverts_pack(
    bits: int, out: int, groups: int, half: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (out, groups * 2 * half)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits, 2 * half)
    assert packed.shape == (out, shape[1] * bits // 8)
    assert torch.equal(unpack(packed, bits, 2 * half, dtype), codes.to(dtype))


def test_four_bit_bytes_are_planar_within_a_group() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert pack(codes, 4, 4).tolist() == [[0x31, 0x42, 0x75, 0x86]]


@given(
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from((4, 8)),
    group=st.sampled_from((2, 6, 30)),
    shift=st.floats(-3, 3),
    size=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_round_trip_is_within_half_a_step(
    dtype: torch.dtype, bits: int, group: int, shift: float, size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (size * (torch.randn(7, 30, generator=generator) + shift)).to(dtype)
    packed, scale, zero = quantize(weight, bits, group)
    restored = dequantize(packed, scale, zero, bits, group)
    assert restored.dtype == dtype
    step = scale.double().repeat_interleave(group, -1)
    # (code - zero) * scale is rounded once, to the dtype.
    allowed = 0.5 * step * (1 + 1e-9) + 0.51 * torch.finfo(dtype).eps * restored.double().abs()
    assert ((weight.double() - restored.double()).abs() <= allowed).all()


def test_zero_stays_zero_and_constant_groups_are_exact() -> None:
    weight = torch.tensor([[0.0, 0.0, 5.0, 5.0, -3.0, -3.0, 0.0, 2.0]])
    restored = dequantize(*quantize(weight, 8, 2), 8, 2)
    assert restored[0, :2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(restored, weight, rtol=1e-6, atol=0)
    assert restored[0, 6] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_equals_float64(dtype: torch.dtype, bits: int, group: int) -> None:
    weight, bias = torch.randn(50, 126).to(dtype), torch.randn(50).to(dtype)
    x = torch.randn(5, 3, 126).to(dtype).transpose(0, 1)
    packed, scale, zero = quantize(weight, bits, group)
    out = quantized_linear(x, packed, scale, zero, bias, bits, group)
    assert out.dtype == dtype
    assert out.is_contiguous()
    exact = dequantize(packed, scale.double(), zero.double(), bits, group)
    _assert_close(out, x, exact, bias, weight)


def _assert_close(out: Tensor, x: Tensor, exact: Tensor, bias: Tensor, weight: Tensor) -> None:
    """At most 4 times as far off as the dense layer in the same dtype is from its own float64."""
    own = F.linear(x, weight, bias).double()
    budget = (own - F.linear(x.double(), weight.double(), bias.double())).norm()
    assert (out.double() - F.linear(x.double(), exact, bias.double())).norm() <= 4 * budget + 1e-12


@pytest.mark.parametrize("shape", [(126,), (0, 126), (2, 0, 126), (1, 126)], ids=str)
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = quantize(torch.randn(50, 126), 4, 42)
    out = quantized_linear(x, *weight, None, 4, 42)
    torch.testing.assert_close(out, F.linear(x, dequantize(*weight, 4, 42)))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_gradients_of_input_and_bias() -> None:
    weight = quantize(torch.randn(9, 12, dtype=torch.float64), 4, 6)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, bias: Tensor) -> Tensor:
        return quantized_linear(x, *weight, bias, 4, 6)

    assert torch.autograd.gradcheck(call, (x, bias))


@pytest.mark.parametrize(("bits", "group", "bias"), [(8, 126, False), (4, 42, True)])
def test_opcheck(bits: int, group: int, bias: bool) -> None:
    weight = quantize(torch.randn(50, 126), bits, group)
    x = torch.randn(5, 3, 126).transpose(0, 1).requires_grad_()
    torch.library.opcheck(
        torch.ops.fxopt.quantized_linear.default,
        (x, *weight, torch.randn(50) if bias else None, bits, group),
    )


def test_compiles_with_inductor() -> None:
    weight = quantize(torch.randn(50, 126), 4, 42)

    def block(x: Tensor) -> Tensor:
        return quantized_linear(x.transpose(0, 1) * 2, *weight, None, 4, 42).relu()

    x = torch.randn(5, 3, 126)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits must be 4 or 8"),
        ({"group_size": 50}, "must divide"),
        ({"group_size": 63}, "be even"),
        ({"group_size": 126}, "hold 126 and 378"),
        ({"x": torch.randn(2, 84)}, "x has 84 features"),
    ],
)
@pytest.mark.parametrize("function", [REFERENCE, quantized_linear])
def test_arguments_that_do_not_fit_are_errors(function, change, message) -> None:  # type: ignore[no-untyped-def]
    packed, scale, zero = quantize(torch.randn(50, 126), 4, 42)
    call = {
        "x": torch.randn(2, 126), "packed": packed, "scale": scale, "zero": zero,
        "bias": None, "bits": 4, "group_size": 42,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        function(**call | change)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
UP = ("up_packed", "up_scale", "up_zero")


def weights(
    dtype: torch.dtype, bits: int, group: int
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Two weights [50, 126]: the first as the op takes it, the second by name."""
    first, second = (quantize(torch.randn(50, 126).to(dtype), bits, group) for _ in range(2))
    return first, dict(zip(UP, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("paired", "added"), [(False, True), (True, False), (True, True)])
def test_what_follows_is_to_the_bit_that_of_calls_of_its_own(
    dtype: torch.dtype, activation: str, paired: bool, added: bool
) -> None:
    first, second = weights(dtype, 4, 42)
    x, bias, up_bias = (torch.randn(*s).to(dtype) for s in ((2, 3, 126), (50,), (50,)))
    residual = torch.randn(3, 2, 50).to(dtype).transpose(0, 1) if added else None
    gate = second | {"up_bias": up_bias} if paired else {}
    out = quantized_linear(x, *first, bias, 4, 42, activation, residual, **gate)

    def wide(weight: Iterable[Tensor], bias: Tensor) -> Tensor:
        packed, scale, zero = weight
        restored = dequantize(packed, scale, zero, 4, 42)
        return F.linear(x.double(), restored.double(), bias.double())

    calls = ACTIVATIONS[activation](quantized_linear(x, *first, bias, 4, 42))
    exact = ACTIVATIONS[activation](wide(first, bias))
    if paired:
        calls = calls * quantized_linear(x, *second.values(), up_bias, 4, 42)
        exact = exact * wide(second.values(), up_bias)
    if residual is not None:
        calls, exact = calls + residual, exact + residual.double()
    assert out.is_contiguous()
    assert torch.equal(out, calls)
    assert (out.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("paired", [False, True])
def test_gradients_through_what_follows(activation: str, paired: bool) -> None:
    first, second = weights(torch.float64, 4, 42)
    shapes = ((3, 126), (50,), (3, 50), (50,))[: 4 if paired else 3]
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(x: Tensor, bias: Tensor, residual: Tensor, *up_bias: Tensor) -> Tensor:
        gate = second | {"up_bias": up_bias[0]} if paired else {}
        return quantized_linear(x, *first, bias, 4, 42, activation, residual, **gate)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("activation", ["", "gelu"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_residual_of_another_dtype_promotes(
    activation: str, paired: bool, autocast: bool
) -> None:
    """As a sum of its own, with its gradients: under autocast products are in bfloat16."""
    first, second = weights(torch.float32 if autocast else torch.bfloat16, 4, 42)
    x, residual = torch.randn(3, 126).bfloat16(), torch.randn(3, 50)
    inputs = [tensor.requires_grad_() for tensor in (x, residual)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kwargs = second if paired else {}
        out = quantized_linear(x, *first, None, 4, 42, activation, residual, **kwargs)
        product = quantized_linear(x, *first, None, 4, 42)
        assert product.dtype == torch.bfloat16
        calls = ACTIVATIONS[activation](product)
        if paired:
            calls = calls * quantized_linear(x, *second.values(), None, 4, 42)
        calls = calls + residual
    assert out.dtype == torch.float32
    assert torch.equal(out, calls)
    found, wanted = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, calls))
    assert torch.equal(found[1], wanted[1])
    # Recomputed out of autocast, products are in float32.
    assert (found[0] - wanted[0]).norm() <= 0.02 * wanted[0].norm()
    if not autocast:
        op = torch.ops.fxopt.quantized_linear.default
        torch.library.opcheck(op, (x, *first, None, 4, 42, activation, residual), kwargs)


@pytest.mark.parametrize(
    ("activation", "added", "paired"),
    [("gelu", False, False), ("", True, False), ("silu", False, True), ("relu", True, True)],
)
def test_opcheck_of_what_follows(activation: str, added: bool, paired: bool) -> None:
    first, second = weights(torch.float32, 8, 63)
    x = torch.randn(5, 3, 126).transpose(0, 1).requires_grad_()
    residual = torch.randn(3, 5, 50, requires_grad=True) if added else None
    torch.library.opcheck(
        torch.ops.fxopt.quantized_linear.default,
        (x, *first, torch.randn(50, requires_grad=True), 8, 63, activation, residual),
        second if paired else {},
    )


def test_what_follows_compiles_with_inductor_and_trains() -> None:
    first, second = weights(torch.float64, 4, 42)

    def block(x: Tensor) -> Tensor:
        gate = quantized_linear(x, *first, None, 4, 42, "silu", **second)
        return quantized_linear(x, *first, None, 4, 42, "gelu", gate * 2)

    x = torch.randn(7, 126, dtype=torch.float64).requires_grad_()
    found = [call(x) for call in (torch.compile(block, fullgraph=True), block)]
    torch.testing.assert_close(*found)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in found]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"activation": "tanh"},
            "activation must be empty, silu, gelu, gelu_tanh, relu, got 'tanh'",
        ),
        (
            {"residual": torch.randn(50)},
            r"residual is \[50\], the output \[2, 50\]",
        ),
        (
            {"up_packed": torch.zeros(50, 63, dtype=torch.uint8)},
            "a second weight is up_packed, up_sc",
        ),
        ({"up_bias": torch.randn(50)}, "a second weight is up_packed, up_scale and up_zero"),
        (
            dict(zip(UP, quantize(torch.randn(49, 126), 4, 42), strict=True)),
            r"second weight is packed as \[49, 63\] with scales \[49, 3\], the first as \[50, 63\]",
        ),
    ],
)
@pytest.mark.parametrize("function", [REFERENCE, quantized_linear])
def test_what_cannot_follow_is_an_error(function, change, message) -> None:  # type: ignore[no-untyped-def]
    packed, scale, zero = quantize(torch.randn(50, 126), 4, 42)
    with pytest.raises(ValueError, match=message):
        function(torch.randn(2, 126), packed, scale, zero, None, 4, 42, **change)
