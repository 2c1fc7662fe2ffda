"""Quantised groups keep their promises whatever is in them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.kernels.kv_attention.packing import (
    Bits,
    pack,
    pack_side,
    quantize,
    round_down,
    round_up,
    to_float8,
    unpack,
    unpack_codes,
    unpack_side,
    widened,
)
from tests.oracle import E4M3, bfloat16_above, bfloat16_below, fake_quantize

BITS = st.sampled_from([8, 4, 2])
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


def image(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return q.double() * scale.double() + zero.double()


@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_rounding_is_directed_and_nearest(values: list[float]) -> None:
    x = torch.tensor(values)
    assert torch.equal(round_down(x), bfloat16_below(x))
    assert torch.equal(round_up(x), bfloat16_above(x))


def test_rounding_of_every_exponent() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,)).to(torch.int32)
    x = bits.view(torch.float32)
    x = x[torch.isfinite(x) & (x.abs() < 3.3e38)]
    assert torch.equal(round_down(x), bfloat16_below(x))
    assert torch.equal(round_up(x), bfloat16_above(x))


@given(st.lists(FLOATS, min_size=1, max_size=40), BITS)
def test_error_is_at_most_half_a_step(values: list[float], bits: int) -> None:
    x = torch.tensor(values)
    q, scale, zero = quantize(x, None, 0, bits)
    step = scale.double()
    assert int(q.max()) < 2**bits
    assert torch.isfinite(scale).all()
    assert torch.isfinite(zero).all()
    # The quotient is a float32: it may be off by 2 ** -24 of itself, at most 255. A range so small
    # that a level of it is no float32 is lost.
    lost = (2**bits - 1) * 2.0**-150
    assert ((image(q, scale, zero) - x.double()).abs() <= step * (0.5 + 2**-15) + lost).all()


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=40), BITS)
def test_step_is_hardly_wider_than_the_range(values: list[float], bits: int) -> None:
    """Rounding to bfloat16 costs at most 2 ** -7 of the scale and of the minimum."""
    x = torch.tensor(values, dtype=torch.float64)
    _, scale, zero = quantize(x, None, 0, bits)
    low, high, levels = x.min().item(), x.max().item(), 2**bits - 1
    assert zero.item() <= low
    widest = (high - low + abs(low) * 2**-7) * (1 + 2**-7) / levels
    assert scale.item() <= widest * (1 + 1e-12) + 1e-37


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.14159, 1.001, 70000.0, -1e-30, 3e38])
def test_a_group_of_equal_values(value: float, bits: int) -> None:
    x = torch.full((1, 32), value)
    q, scale, zero = quantize(x, None, 1, bits)
    error = (image(q, scale, zero) - x.double()).abs().max().item()
    assert error <= scale.double().item() * 0.501
    if value in (0.0, 1.0, 70144.0):
        assert scale.item() == 0
        assert error == 0


def test_outlier_channels_do_not_touch_the_others() -> None:
    """Keys with channels at 100 ± 1: per channel they cost nothing, per token everything."""
    x = torch.randn(2, 3, 4, 64, 16)
    x[..., 5] = 100 + torch.randn(2, 3, 4, 64).clamp(-1, 1)
    for side, worst in (("key", 0.4), ("value", 6.0)):
        stored = pack_side(x, None, side, 4)
        error = (unpack_side(stored, side, 4, torch.float32) - x).abs()
        calm = error[..., [0, 1, 2, 3, 4, 6]].max().item()
        assert (calm < worst) == (side == "key") or side == "value"
        assert calm < worst
    keys = pack_side(x, None, "key", 4)
    values = pack_side(x, None, "value", 4)
    near = (unpack_side(keys, "key", 4, x.dtype) - x).abs()[..., :5].mean()
    far = (unpack_side(values, "value", 4, x.dtype) - x).abs()[..., :5].mean()
    assert near * 4 < far


def test_values_beyond_half_precision() -> None:
    x = torch.tensor([[-9e4, 7e4, 1e5, 2.0]]).expand(32, 4).T.contiguous() + torch.arange(32.0)
    for bits in (8, 4, 2):
        q, scale, zero = quantize(x, None, 1, bits)
        assert torch.isfinite(image(q, scale, zero)).all()
        assert ((image(q, scale, zero) - x).abs() <= scale.double() * 0.501).all()


@given(BITS, st.integers(1, 5), st.data())
def test_bytes_round_trip(bits: int, rows: int, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 9)) * 8 // bits
    q = torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8)
    packed = pack(q, bits)
    assert packed.shape == (rows, width * bits // 8)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), q)


def test_packing_is_planar() -> None:
    q = torch.arange(8, dtype=torch.uint8)
    assert pack(q, 4).tolist() == [j + 16 * (j + 4) for j in range(4)]
    q = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0], dtype=torch.uint8)
    assert pack(q, 2).tolist() == [0 + 4 * 2 + 16 * 3 + 64 * 1, 1 + 4 * 3 + 16 * 2 + 64 * 0]


@given(st.lists(FLOATS, min_size=1, max_size=40), st.booleans())
def test_e4m3_is_off_by_a_sixteenth_of_the_distance_from_zero(
    values: list[float], centred: bool
) -> None:
    """Beside half of the least e4m3 number, and what an underflowing scale loses."""
    x = torch.tensor(values)
    code, scale, zero = to_float8(x, None, 0, centred)
    assert code.dtype == torch.float8_e4m3fn
    assert torch.isfinite(code.float()).all()
    assert centred or not zero.any()
    away = (x.double() - zero.double()).abs()
    bound = away * (2.0**-4 + 2**-20) + scale.double() * 2.0**-10 + 448 * 2.0**-150
    assert ((image(code, scale, zero) - x.double()).abs() <= bound).all()


def test_every_e4m3_number_is_widened_exactly() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    x = bits[bits % 128 != 127].view(torch.float8_e4m3fn)
    for kind in (torch.float32, torch.float64):
        assert torch.equal(widened(x, kind), torch.cat([E4M3, -E4M3]).to(kind))


def test_where_keys_lie_costs_e4m3_nothing() -> None:
    """A channel at 100 ± 1 is off by a sixteenth of what it varies, not of what it is."""
    x = torch.randn(2, 1, 4, 64, 8)
    moved = x + torch.tensor([100.0, 0, 0, -40.0, 0, 0, 0, 0])
    near, far = (
        (unpack_side(pack_side(t, None, "key", "f8"), "key", "f8", t.dtype) - t).norm()
        for t in (x, moved)
    )
    assert far < 1.2 * near
    # Of values about 0, as a cast to e4m3 would store keys too:
    direct = (to_float8(moved, None, 3, False)[0].float() - moved).norm()
    assert direct > 10 * near


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("bits", [8, "f8", 4, 2])
def test_padding_enters_no_range(side: str, bits: Bits) -> None:
    x = torch.randn(2, 1, 3, 32, 8)
    valid = torch.ones(2, 1, 3, 32, 1, dtype=torch.bool)
    valid[0, :, 0] = False
    valid[0, :, 1, :8] = False
    wild = torch.where(valid, x, 1e6)
    calm, loud = (pack_side(t, valid, side, bits) for t in (x, wild))
    for name in calm:
        assert torch.equal(calm[name].float(), loud[name].float())
    assert not calm[f"{side}_scale"][0, :, 0].any()
    assert not calm[side][0, :, 0].float().any()
    alone = pack_side(x[:1, :, 1:2, 8:], None, side, bits)
    rows = slice(None) if side == "key" else slice(8, None)
    assert torch.equal(alone[f"{side}_scale"], calm[f"{side}_scale"][:1, :, 1:2, rows])
    codes = unpack_codes(calm[side], side, bits)[:1, :, 1:2, 8:]
    assert torch.equal(unpack_codes(alone[side], side, bits).float(), codes.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, "f8", 4, 2])
def test_image_is_the_oracles(bits: Bits, dtype: torch.dtype) -> None:
    x = (torch.randn(1, 2, 3, 32, 16) * 3).to(dtype)
    valid = torch.rand(1, 1, 3, 32, 1) > 0.2
    for side, dim in (("key", 3), ("value", 4)):
        stored = pack_side(x, valid, side, bits)
        ours, theirs = unpack_side(stored, side, bits, dtype), fake_quantize(x, valid, bits, dim)
        kept = valid.expand_as(x)
        assert torch.equal(ours[kept], theirs[kept])
