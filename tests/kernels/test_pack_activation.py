"""Activations as integer codes: error bounds, what is no number, layouts, tracers, kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.decide.verify import peak_live_bytes
from fxopt.kernels.pack_activation import (
    REFERENCE,
    pack_activation,
    packed_bytes,
    reference,
    unpack_activation,
)
from tests.kernels.ahead_of_time import compiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def restored(x: Tensor, bits: int = 8, group: int = 16) -> Tensor:
    codes, top = pack_activation(x, bits, group)
    assert codes.nbytes + top.nbytes == packed_bytes(x.numel(), x.dtype, bits, group)
    stride = torch.empty_like(x).stride()
    return unpack_activation(codes, top, x.shape, stride, bits, group)


@given(
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from((4, 8)),
    group=st.sampled_from((16, 64)),
    count=st.integers(1, 300),
    size=st.floats(1e-4, 1e4),
    seed=st.integers(0, 2**31),
)
def test_what_comes_back_is_within_half_a_step(
    dtype: torch.dtype, bits: int, group: int, count: int, size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (size * torch.randn(count, generator=generator)).to(dtype)
    out = restored(x, bits, group)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    exact, levels = x.double(), 2 ** (bits - 1) - 1
    for values, found in zip(exact.split(group), out.double().split(group), strict=True):
        top = values.abs().max()
        allowed = 0.5 * top / levels * (1 + 1e-5) + 0.51 * torch.finfo(dtype).eps * found.abs()
        # and the smallest numbers of float16, which have fewer digits
        assert ((values - found).abs() <= allowed + torch.finfo(dtype).smallest_normal).all()
        assert found.abs().max() == top


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_the_nearest_of_an_independent_grid(bits: int) -> None:
    x, levels = torch.randn(7, 16, dtype=torch.float64), 2 ** (bits - 1) - 1
    grid = torch.arange(-levels, levels + 1, dtype=torch.float64) / levels
    points = x.abs().amax(1, keepdim=True) * grid
    nearest = (x[..., None] - points[:, None]).abs().argmin(-1)
    torch.testing.assert_close(restored(x, bits), points.gather(1, nearest), rtol=1e-12, atol=0)


def test_four_bit_bytes_are_planar_within_a_group() -> None:
    x = torch.cat([torch.full((8,), 7.0), torch.arange(8.0) - 7.0])
    codes, top = pack_activation(x, 4, 16)
    assert top.tolist() == [7.0]
    assert codes.tolist() == [[15 + 16 * (c + 1) for c in range(8)]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_extremes_and_what_is_no_number(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(6, 16).to(dtype)
    x[0] = 0
    x[1, ::2] = 0
    x[2, 3] = torch.finfo(dtype).max
    x[3, ::3] = -torch.inf
    x[4, 5] = torch.nan
    x[5, 6] = torch.inf
    out = restored(x, bits)
    assert out[0].tolist() == [0.0] * 16
    assert out[1, ::2].tolist() == [0.0] * 8
    assert out[2, 3] == torch.finfo(dtype).max
    assert out[2].isfinite().all()
    assert torch.equal(out[3] == -torch.inf, x[3] == -torch.inf)
    assert out[3, 1::3].isfinite().all()
    assert out[4].isnan().all()
    assert out[5].isnan().all()
    smallest = torch.full((16,), torch.finfo(dtype).smallest_normal * 2**-2, dtype=dtype)
    small = restored(smallest, bits)
    assert small.isfinite().all()
    assert ((small == 0) | (small == smallest)).all()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 7, 3).permute(2, 0, 1),
        torch.randn(4, 10)[:, 2:9],
        torch.randn(3, 1).expand(3, 20),
        torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
        torch.randn(37)[5:],
        torch.randn(()),
        torch.randn(0, 3),
    ],
    ids=["permuted", "gaps", "expanded", "channels last", "offset", "scalar", "empty"],
)
def test_layouts(x: Tensor) -> None:
    out = restored(x)
    assert (out.shape, out.stride()) == (x.shape, torch.empty_like(x).stride())
    assert out.untyped_storage().nbytes() == x.numel() * x.element_size()
    if x.numel():
        assert (out - x).abs().max() <= 0.5 * x.abs().max() / 127 * (1 + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (8, 128)])
def test_pieces_give_what_the_reference_gives_at_once(
    dtype: torch.dtype, bits: int, group: int
) -> None:
    x = torch.randn(3, 49001).to(dtype)
    codes, top = pack_activation(x, bits, group)
    for mine, whole in zip((codes, top), REFERENCE(x, bits, group), strict=True):
        assert torch.equal(mine, whole)
    arguments = (codes, top, x.shape, x.stride(), bits, group)
    assert torch.equal(unpack_activation(*arguments), reference.unpack_activation(*arguments))
    taken = peak_live_bytes(lambda: pack_activation(x, bits, group), torch.device("cpu"))
    assert taken - packed_bytes(x.numel(), dtype, bits, group) < 40 * 32768


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck(bits: int) -> None:
    x = torch.randn(5, 7, 3).permute(2, 0, 1)
    torch.library.opcheck(torch.ops.fxopt.pack_activation.default, (x, bits, 16))
    codes, top = pack_activation(x, bits, 16)
    arguments = (codes, top, list(x.shape), list(x.stride()), bits, 16)
    torch.library.opcheck(torch.ops.fxopt.unpack_activation.default, arguments)


def test_compiles_with_inductor() -> None:
    def there_and_back(x: Tensor) -> Tensor:
        codes, top = pack_activation(x * 2, 4, 16)
        return unpack_activation(codes, top, x.shape, x.stride(), 4, 16) + 1

    x = torch.randn(5, 33)
    torch.testing.assert_close(torch.compile(there_and_back, fullgraph=True)(x), there_and_back(x))


@pytest.mark.parametrize(
    ("x", "bits", "group", "message"),
    [
        (torch.randn(8), 3, 16, "bits must be 4 or 8"),
        (torch.randn(8), 8, 48, "power of two"),
        (torch.arange(8), 8, 16, "takes float64"),
    ],
)
def test_formats_that_do_not_exist_are_errors(
    x: Tensor, bits: int, group: int, message: str
) -> None:
    for function in (pack_activation, REFERENCE):
        with pytest.raises(ValueError, match=message):
            function(x, bits, group)


def test_layouts_that_do_not_fit_are_errors() -> None:
    codes, top = pack_activation(torch.randn(40), 8, 16)
    with pytest.raises(ValueError, match="leave gaps"):
        unpack_activation(codes, top, (5, 8), (9, 1), 8, 16)
    with pytest.raises(ValueError, match=r"\[4, 16\].*not \[3, 16\]"):
        unpack_activation(codes, top, (50,), (1,), 8, 16)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(8, 16), (8, 128), (4, 32), (4, 256)])
@pytest.mark.parametrize("count", [0, 1, 63, 5000])
def test_kernels_give_the_reference(dtype: torch.dtype, bits: int, group: int, count: int) -> None:
    pytest.importorskip("triton")
    from fxopt.kernels.pack_activation import triton

    x = torch.randn(count).to(dtype)
    if count > 60:
        x[3], x[20], x[40:56] = torch.nan, -torch.inf, 0.0
    if count > 600:
        x[600], x[300:304] = torch.inf, -torch.inf
    expected = REFERENCE(x, bits, group)
    codes, top = (torch.full_like(t, 77, device=DEVICE) for t in expected)
    triton.pack(x.to(DEVICE), codes, top, bits, group)
    torch.testing.assert_close(top.cpu(), expected[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes.cpu(), expected[0])
    out = torch.full((count,), 7.0, dtype=dtype, device=DEVICE)
    triton.unpack(codes, top, out, bits, group)
    whole = reference.unpack_activation(*expected, (count,), (1,), bits, group)
    # the interpreter truncates to bfloat16 where the device rounds
    off = torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu(), whole, rtol=off, atol=0, equal_nan=True)


COMPILE = """
from fxopt.kernels.pack_activation import triton as kernels
from tests.kernels.ahead_of_time import build

def show(kernel, pointers, **constants):
    built = build(kernel, pointers, pointers, **constants)
    print(kernel.__name__, len(built.asm["cubin"]), "v4.b32" in built.asm["ptx"])

for dtype in ("*bf16", "*fp32"):
    for bits, group in ((8, 128), (4, 128)):
        pointers = dict(x=dtype, out=dtype, codes="*u8", top=dtype)
        constants = dict(BITS=bits, GROUP=group, ROWS=kernels.TILE // group)
        for kernel in (kernels._pack_kernel, kernels._unpack_kernel):
            show(kernel, {n: p for n, p in pointers.items() if n in kernel.arg_names}, **constants)
"""


def test_compile_ahead_of_time_for_hopper() -> None:
    pytest.importorskip("triton")
    built = compiled(COMPILE)
    assert len(built) == 8
    assert all(int(size) > 0 and wide == "True" for _, size, wide in built)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(8, 128), (4, 128)])
def test_ops_on_the_device(dtype: torch.dtype, bits: int, group: int) -> None:
    x = torch.randn(3, 1000, 333).to(dtype).permute(2, 0, 1)
    codes, top = pack_activation(x.cuda(), bits, group)
    expected = REFERENCE(x, bits, group)
    assert torch.equal(top.cpu(), expected[1])
    assert torch.equal(codes.cpu(), expected[0])
    out = unpack_activation(codes, top, x.shape, x.stride(), bits, group)
    whole = reference.unpack_activation(*expected, x.shape, x.stride(), bits, group)
    torch.testing.assert_close(out.cpu(), whole, rtol=0, atol=0)
