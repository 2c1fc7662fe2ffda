"""Rotary position embedding in one kernel: the bits of the calls that it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxopt.ir.ops import mix_channels
from fxopt.ir.ops import rotate as called
from fxopt.ir.ops import rotate_both as both_called
from fxopt.kernels.rotate import REFERENCE, rotate, rotate_both
from fxopt.kernels.rotate.op import _both_cuda  # pyright: ignore[reportPrivateUsage]

pytest.importorskip("triton")

from fxopt.kernels.kv_attention.triton import _windows  # pyright: ignore[reportPrivateUsage]
from fxopt.kernels.rotate.triton import (
    _places,  # pyright: ignore[reportPrivateUsage]
    rotate_both_forward,
    rotate_forward,
)
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter has no bfloat16 of its own.
DTYPES = [torch.float32, torch.float16, torch.float64]
DTYPES += [torch.bfloat16] if DEVICE == "cuda" else []


def draw(dtype: torch.dtype, shape: tuple[int, ...], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """x as attention has it, a view of [batch, length, heads * dim], and cos and sin."""
    batch, heads, length, dim = shape
    x = torch.randn(batch, length, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
    angle = torch.randn(rows, 1, length, dim, device=DEVICE)
    return x, angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rows"),
    [((2, 3, 5, 16), 2), ((1, 17, 1, 6), 1), ((3, 1, 2, 80), 1), ((2, 4, 7, 96), 2)],
)
def test_kernel_equals_the_formula_to_the_bit(
    dtype: torch.dtype, shape: tuple[int, int, int, int], rows: int
) -> None:
    x, cos, sin = draw(dtype, shape, rows)
    out = rotate_forward(x, cos, sin)
    assert out.is_contiguous()
    assert torch.equal(out, REFERENCE(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator(dtype: torch.dtype) -> None:
    x, cos, sin = draw(dtype, (2, 3, 5, 16), 2)
    torch.library.opcheck(rotate, (x, cos, sin))
    assert torch.equal(rotate(x, cos, sin), REFERENCE(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv", "group", "length", "dim"), [(1, 1, 1, 6), (3, 5, 2, 80)])
def test_queries_and_keys_at_once_keep_every_bit(
    dtype: torch.dtype, kv: int, group: int, length: int, dim: int
) -> None:
    q, cos, sin = draw(dtype, (2, kv * group, length, dim), 2)
    k = draw(dtype, (2, kv, length, dim), 1)[0]
    found = rotate_both_forward(q, k, cos, sin, None, None, (), 0)
    for out, x in zip(found, (q, k), strict=True):
        assert out.is_contiguous()
        assert torch.equal(out, REFERENCE(x, cos, sin))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64])
@pytest.mark.parametrize(
    ("kv", "group", "length", "dim", "heads", "turned"),
    [
        (2, 3, 1, 64, (), True), (1, 1, 5, 16, (), True), (4, 2, 3, 32, (0, 3), True),
        (3, 1, 2, 128, (1,), False), (2, 1, 21, 6, (), False),
        (1, 3, 700, 16, (), True),  # tiles of many rows
    ],
)  # fmt: skip
def test_mixed_channels_are_those_of_two_products(
    dtype: torch.dtype, kv: int, group: int, length: int, dim: int, heads: tuple[int, ...],
    turned: bool,
) -> None:  # fmt: skip
    """Against float64 behind rotary embeddings that are rounded: what is left is one rounding, and
    those of a sum in float32."""
    q, *angles = draw(dtype, (2, kv * group, length, dim), 2)
    k = draw(dtype, (2, kv, length, dim), 1)[0]
    query_mix, key_mix = torch.randn(2, len(heads) or kv, dim, dim, device=DEVICE).to(dtype)
    given = (*(angles if turned else (None, None)), query_mix, key_mix, heads, kv)
    found = rotate_both_forward(q, k, *given)
    for out, x, mix in zip(found, (q, k), (query_mix, key_mix), strict=True):
        before = REFERENCE(x, *angles) if turned else x
        want = mix_channels(before.double(), mix.double(), heads, kv)
        terms = mix_channels(before.double().abs(), mix.double().abs(), heads, kv)
        most = torch.finfo(dtype).eps * want.abs() + 8 * torch.finfo(torch.float32).eps * terms
        assert ((out.double() - want).abs() <= most).all()
        assert out.is_contiguous()
        group_size = x.shape[1] // kv
        of = [h for h in range(x.shape[1]) if h // group_size not in (heads or range(kv))]
        assert torch.equal(out[:, of], before[:, of])


def test_tables_outlive_those_of_many_other_calls() -> None:
    """A CUDA graph reads them where they were when it was captured."""
    device = torch.device(DEVICE)
    first = [_places((0, 2), 4, device), _windows(((0, 2),), device)]
    for n in range(300):
        _places((n,), 400, device)
        _windows(((n, 1),), device)
    again = [_places((0, 2), 4, device), _windows(((0, 2),), device)]
    assert all(one is other for one, other in zip(first, again, strict=True))


def test_sides_of_other_lengths_are_turned_whole() -> None:
    """One kernel takes its sizes from the queries."""
    q, k = (draw(torch.float32, (2, 2, n, 16), 1)[0] for n in (5, 9))
    cos, sin = torch.randn(2, 1, 1, 1, 16, device=DEVICE)
    found = _both_cuda(q, k, cos, sin, None, None, (), 0)
    for side, x in zip(found, (q, k), strict=True):
        torch.testing.assert_close(side, REFERENCE(x, cos, sin))


def test_matrices_that_are_parameters_ask_for_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one kernel, which has no derivative."""
    q, k = (draw(torch.float32, (1, 2, 3, 16), 1)[0] for _ in range(2))
    mixes = [nn.Parameter(torch.randn(2, 16, 16, device=DEVICE)) for _ in range(2)]
    monkeypatch.setattr(
        "fxopt.ir.ops._is_one_kernel", lambda *given: not any(t.requires_grad for t in given)
    )
    found = both_called(q, k, None, None, *mixes)
    assert not any(side.requires_grad for side in found)


@pytest.mark.parametrize("heads", [(), (1,)])
@pytest.mark.parametrize("turned", [True, False])
def test_operator_of_both(heads: tuple[int, ...], turned: bool) -> None:
    q, *angles = draw(torch.float32, (2, 4, 5, 16), 2)
    k = draw(torch.float32, (2, 2, 5, 16), 1)[0]
    mixes = torch.randn(2, len(heads) or 2, 16, 16, device=DEVICE)
    given = (q, k, *(angles if turned else (None, None)), *mixes, heads, 2)
    torch.library.opcheck(rotate_both, given)
    torch.library.opcheck(rotate_both, (q, k, *angles, None, None, (), 0))
    for one, other in zip(rotate_both(*given), both_called(*given), strict=True):
        torch.testing.assert_close(one, other)
    for one, x in zip(rotate_both(q, k, None, None, None, None, (), 0), (q, k), strict=True):
        assert torch.equal(one, x)
        assert one.data_ptr() != x.data_ptr()


def test_a_rotation_turns_pairs_of_channels() -> None:
    """Against complex numbers: channel i and i + D / 2 are turned by the same angle."""
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    angle = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    both = torch.cat([angle, angle], -1)
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(called(x, both.cos(), both.sin()), expected)


def test_gradients_flow_where_they_are_needed() -> None:
    x, cos, sin = (t.double().requires_grad_() for t in draw(torch.float64, (1, 2, 3, 4), 1))
    assert torch.autograd.gradcheck(called, (x, cos, sin))


COMPILE = """
import triton.language as tl
from fxopt.kernels.rotate.triton import _rotate_kernel as kernel
from tests.kernels.ahead_of_time import build

def asm(**constants):
    every = dict(WIDE=tl.float32, UPCAST=False, BLOCK_R=16, places=None, **constants)
    pointers = dict.fromkeys(("q", "k", "cos", "sin", "query_mix", "key_mix", "out_q", "out_k"), p)
    return build(kernel, pointers, pointers, **every).asm

p = "*bf16"
none = dict(query_mix=None, key_mix=None)
assert asm(GQ=5, GK=1, HALF=40, BLOCK_D=64, BLOCK_E=64, **none)["cubin"]
assert asm(
    GQ=1, GK=1, HALF=40, BLOCK_D=64, BLOCK_E=64, k=None, out_k=None, **none
)["cubin"]
for half in (32, 128):
    text = asm(GQ=4, GK=1, HALF=half, BLOCK_D=half, BLOCK_E=64)["ptx"]
    assert "mma.sync" in text or "wgmma" in text
"""


def test_compile_ahead_of_time_for_hopper() -> None:
    compiled(COMPILE)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_device_keeps_every_bit(dtype: torch.dtype, length: int) -> None:
    x, cos, sin = draw(dtype, (3, 32, length, 128), 3)
    k = draw(dtype, (3, 8, length, 128), 3)[0]
    assert torch.equal(called(x, cos, sin), REFERENCE(x, cos, sin))
    for out, side in zip(both_called(x, k, cos, sin), (x, k), strict=True):
        assert torch.equal(out, REFERENCE(side, cos, sin))
