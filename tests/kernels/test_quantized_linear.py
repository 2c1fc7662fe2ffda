"""Integer linear layers against float64: format, op, gradients, tracers."""

from __future__ import annotations

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
