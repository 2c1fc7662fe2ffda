"""Codes of a derivative: pieces, gradients, layouts, tracers, kernels."""

from __future__ import annotations

import bisect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.decide.verify import peak_live_bytes
from fxopt.kernels.activation_function import (
    REFERENCE,
    code_bytes,
    derivative_codes,
    reference,
    times_derivative,
)
from tests.kernels.ahead_of_time import compiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pieces(bits: int, generator: torch.Generator | None = None) -> tuple[list[float], list[float]]:
    """Borders, float32 numbers, and levels."""
    borders = torch.randn(2**bits - 1, generator=generator).sort().values
    return borders.tolist(), torch.randn(2**bits, generator=generator).tolist()


def expected(x: Tensor, gradient: Tensor, borders: list[float], levels: list[float]) -> Tensor:
    """One value at a time, in float64."""
    numbers = [bisect.bisect_left(borders, v) for v in x.double().flatten().tolist()]
    derivative = torch.tensor([levels[n] for n in numbers], dtype=torch.float64)
    return gradient.double() * derivative.view_as(x)


@given(
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(1, 4),
    count=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
)
def test_gradients_are_times_the_level_of_their_piece(
    dtype: torch.dtype, bits: int, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, gradient = torch.randn(2, count, generator=generator).to(dtype)
    borders, levels = pieces(bits, generator)
    # borders are met exactly too
    x[::7] = torch.tensor(borders, dtype=dtype)[torch.arange(len(x[::7])) % len(borders)]
    codes = derivative_codes(x, borders, bits)
    assert codes.nbytes == code_bytes(count, bits)
    out = times_derivative(gradient, codes, (1,), levels, bits)
    assert out.dtype == dtype
    exact = expected(x, gradient, borders, levels)
    # one rounding, and that of the levels to float32
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_bits_are_planar_within_a_group() -> None:
    x = torch.zeros(1024)
    x[0], x[128], x[896 + 5] = 1.5, 2.5, 3.5
    codes = derivative_codes(x, [1.0, 2.0, 3.0], 2)
    assert codes.shape == (1, 2, 128)
    low, high = codes[0].tolist()
    assert low == [1] + [0] * 4 + [128] + [0] * 122
    assert high == [2] + [0] * 4 + [128] + [0] * 122


def test_masks_and_what_is_no_number() -> None:
    mask = torch.rand(77) > 0.5
    codes = derivative_codes(mask, [0.5], 1)
    assert torch.equal(times_derivative(torch.ones(77), codes, (1,), [0.0, 2.0], 1), mask * 2.0)
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    out = times_derivative(torch.ones(4), derivative_codes(x, [0.0], 1), (1,), [3.0, 4.0], 1)
    assert out.tolist() == [4.0, 4.0, 3.0, 3.0]


X = torch.randn(5, 7, 3)
LAYOUTS = {
    "permuted": (X.permute(2, 0, 1), torch.randn(3, 5, 7)),
    "alike": (X.permute(2, 0, 1), torch.randn(5, 7, 3).permute(2, 0, 1)),
    "expanded": (X, torch.randn(7, 1).expand(5, 7, 3)),
    "one number": (X, torch.tensor(2.0).expand(5, 7, 3)),
    "channels last": (X[None], torch.randn(1, 5, 7, 3).to(memory_format=torch.channels_last)),
    "scalar": (torch.tensor(0.3), torch.tensor(2.0)),
    "empty": (torch.ones(0, 3), torch.ones(0, 3)),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_layouts_are_those_of_a_product(name: str, dtype: torch.dtype) -> None:
    x, gradient = (t.to(dtype) for t in LAYOUTS[name])
    borders, levels = pieces(3)
    codes = derivative_codes(x, borders, 3)
    out = times_derivative(gradient, codes, x.stride(), levels, 3)
    like = torch.ops.aten.gelu_backward(gradient, x)
    assert (out.shape, out.stride(), out.dtype) == (like.shape, like.stride(), dtype)
    whole = reference.times_derivative(gradient, codes, x.stride(), levels, 3)
    assert torch.equal(out, whole)
    exact = expected(x, gradient, borders, levels)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("bits", [1, 3])
def test_pieces_give_what_the_reference_gives_at_once(bits: int) -> None:
    x, gradient = torch.randn(2, 3, 49001)
    borders, levels = pieces(bits)
    codes = derivative_codes(x, borders, bits)
    assert torch.equal(codes, REFERENCE(x, borders, bits))
    arguments = (gradient, codes, x.stride(), levels, bits)
    assert torch.equal(times_derivative(*arguments), reference.times_derivative(*arguments))
    taken = peak_live_bytes(lambda: derivative_codes(x, borders, bits), torch.device("cpu"))
    assert taken - codes.nbytes < 32 * 32768
    taken = peak_live_bytes(lambda: times_derivative(*arguments), torch.device("cpu"))
    assert taken - gradient.nbytes < 32 * 32768


def test_opcheck() -> None:
    x, gradient = LAYOUTS["permuted"]
    borders, levels = pieces(3)
    ops = torch.ops.fxopt
    torch.library.opcheck(ops.derivative_codes.default, (x, borders, 3))
    codes = derivative_codes(x, borders, 3)
    for given_ in (gradient, torch.randn_like(x)):
        arguments = (given_, codes, list(x.stride()), levels, 3)
        torch.library.opcheck(ops.times_derivative.default, arguments)


def test_compiles_with_inductor() -> None:
    borders, levels = pieces(2)

    def backward(x: Tensor, gradient: Tensor) -> Tensor:
        codes = derivative_codes(x * 2, borders, 2)
        return times_derivative(gradient + 1, codes, x.stride(), levels, 2) + 1

    x, gradient = torch.randn(2, 5, 33)
    found = torch.compile(backward, fullgraph=True)(x, gradient)
    torch.testing.assert_close(found, backward(x, gradient))


def test_what_does_not_belong_together_is_an_error() -> None:
    x = torch.randn(40)
    for function in (derivative_codes, REFERENCE):
        with pytest.raises(ValueError, match="bits must be 1 to 4, got 5"):
            function(x, [0.0], 5)
        with pytest.raises(ValueError, match="2 bits take 1 to 3 borders in ascending order"):
            function(x, [1.0, 0.0], 2)
    codes = derivative_codes(x, [0.0], 1)
    with pytest.raises(ValueError, match=r"codes \[2, 1, 128\], not \[1, 1, 128\]"):
        times_derivative(torch.ones(1025), codes, (1,), [0.0, 1.0], 1)
    with pytest.raises(ValueError, match="leave gaps"):
        times_derivative(torch.ones(5, 8), codes, (9, 1), [0.0, 1.0], 1)
    with pytest.raises(ValueError, match="1 bits take 2 levels, got 3"):
        times_derivative(x, codes, (1,), [0.0, 1.0, 2.0], 1)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 63, 5000])
def test_kernels_give_the_reference(dtype: torch.dtype, bits: int, count: int) -> None:
    pytest.importorskip("triton")
    from fxopt.kernels.activation_function import triton

    x, gradient = torch.randn(2, count).to(dtype)
    if count > 60:
        x[3], x[20], x[50] = torch.nan, -torch.inf, torch.inf
    borders, levels = pieces(bits)
    whole = REFERENCE(x, borders, bits)
    codes = torch.full_like(whole, 77, device=DEVICE)
    triton.codes(x.to(DEVICE), codes, borders, bits)
    assert torch.equal(codes.cpu(), whole)
    out = torch.full((count,), 7.0, dtype=dtype, device=DEVICE)
    triton.times(gradient.to(DEVICE), codes, out, levels, bits)
    product = reference.times_derivative(gradient, whole, (1,), levels, bits)
    # the interpreter truncates to bfloat16 where the device rounds
    torch.testing.assert_close(out.cpu(), product, rtol=torch.finfo(dtype).eps, atol=0)


def test_the_kernel_takes_masks() -> None:
    pytest.importorskip("triton")
    from fxopt.kernels.activation_function import triton

    mask = torch.rand(2000) > 0.3
    codes = torch.full(reference.code_shape(2000, 1), 77, dtype=torch.uint8, device=DEVICE)
    triton.codes(mask.to(DEVICE), codes, [0.5], 1)
    assert torch.equal(codes.cpu(), REFERENCE(mask, [0.5], 1))


COMPILE = """
from fxopt.kernels.activation_function import triton as kernels
from tests.kernels.ahead_of_time import build

def show(kernel, pointers, **constants):
    built = build(kernel, pointers, pointers, **constants)
    print(kernel.__name__, len(built.asm["cubin"]))

for dtype in ("*bf16", "*fp32"):
    for bits in (1, 4):
        constants = dict(BITS=bits, GROUP=kernels.GROUP, ROWS=kernels.ROWS)
        borders = tuple(float(i) for i in range(2**bits - 1))
        show(kernels._codes_kernel, dict(x=dtype, codes="*u8"), BORDERS=borders, **constants)
        pointers = dict(gradient=dtype, codes="*u8", out=dtype)
        show(kernels._times_kernel, pointers, LEVELS=(*borders, 0.5), **constants)
"""


def test_compile_ahead_of_time_for_hopper() -> None:
    pytest.importorskip("triton")
    built = compiled(COMPILE)
    assert len(built) == 8
    assert all(int(size) > 0 for _, size in built)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_ops_on_the_device(dtype: torch.dtype, bits: int) -> None:
    x, gradient = (torch.randn(3, 1000, 333).to(dtype).permute(2, 0, 1) for _ in range(2))
    borders, levels = pieces(bits)
    codes = derivative_codes(x.cuda(), borders, bits)
    assert torch.equal(codes.cpu(), REFERENCE(x, borders, bits))
    for given_ in (gradient, gradient.contiguous()):
        out = times_derivative(given_.cuda(), codes, x.stride(), levels, bits)
        whole = reference.times_derivative(given_, codes.cpu(), x.stride(), levels, bits)
        assert out.stride() == whole.stride()
        torch.testing.assert_close(out.cpu(), whole, rtol=0, atol=0)
