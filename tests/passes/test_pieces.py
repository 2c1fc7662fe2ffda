"""Piecewise constant derivatives: the best there are, against all that there could be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.ir.cost import OpCall
from fxopt.ir.site import Derivative
from fxopt.passes.activation.approximate_backward import SMOOTH, derivative_pieces
from fxopt.passes.activation.packed_mask import exact_pieces
from fxopt.passes.activation.pieces import fit


def squares(values: np.ndarray, weights: np.ndarray, cuts: tuple[int, ...]) -> float:
    """The weighted squares that the means of these parts leave."""
    left = 0.0
    for a, b in itertools.pairwise((0, *cuts, len(values))):
        mean = np.average(values[a:b], weights=weights[a:b])
        left += float((weights[a:b] * (values[a:b] - mean) ** 2).sum())
    return left


@given(count=st.integers(1, 4), size=st.integers(4, 9), seed=st.integers(0, 2**31))
def test_no_other_borders_are_better(count: int, size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    points = np.sort(random.normal(size=size))
    values, weights = random.normal(size=size), random.uniform(0.1, 2.0, size)
    found = fit(lambda _: values, points, weights, count)
    cuts = tuple(int(np.searchsorted(points, b)) for b in found.borders)
    every = itertools.combinations(range(1, size), count - 1)
    least = min(squares(values, weights, each) for each in every)
    assert squares(values, weights, cuts) == pytest.approx(least, rel=1e-9, abs=1e-12)
    total = float((weights * values**2).sum())
    assert found.error == pytest.approx((least / total) ** 0.5, rel=1e-6, abs=1e-6)
    for level, (a, b) in zip(found.levels, itertools.pairwise((0, *cuts, size)), strict=True):
        assert level == pytest.approx(np.average(values[a:b], weights=weights[a:b]))


def test_a_step_is_found_without_error() -> None:
    points = np.linspace(-2, 2, 9)
    found = fit(lambda x: (x > 0.2) * 3.0 - 1, points, np.ones(9), 2)
    assert found.borders == (0.25,)
    assert found.levels == pytest.approx((-1.0, 2.0))
    assert found.error == pytest.approx(0, abs=1e-7)
    assert found.bits == 1


GELU = ("gelu_backward", 1, (), (("approximate", "none"),))


def test_more_bits_are_closer_to_the_derivative_of_gelu() -> None:
    errors = [derivative_pieces(*GELU, bits).error for bits in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    # what the pieces leave, for values of three spreads
    for bits, normal, most in ((2, 0.133, 0.2), (3, 0.076, 0.11), (4, 0.037, 0.06)):
        pieces = derivative_pieces(*GELU, bits)
        assert pieces.bits == bits
        for spread in (0.3, 1.0, 3.0):
            x = spread * torch.randn(20000, dtype=torch.float64)
            exact = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
            number = torch.bucketize(x, torch.tensor(pieces.borders, dtype=torch.float64))
            off = exact - torch.tensor(pieces.levels, dtype=torch.float64)[number]
            error = float(off.norm() / exact.norm())
            assert error < most
            assert spread != 1.0 or error == pytest.approx(normal, rel=0.05)


@pytest.mark.parametrize("op", SMOOTH)
def test_every_function_that_is_offered_has_pieces(op: str) -> None:
    arguments = {"softplus_backward": (1.0, 20.0), "elu_backward": (1.0, 1, 1, False)}.get(op, ())
    place = 5 if op == "elu_backward" else 1
    pieces = derivative_pieces(op, place, arguments, (), 4)
    assert len(pieces.levels) == 16
    assert list(pieces.borders) == sorted(pieces.borders)
    assert 0 < pieces.error < 0.1


def read_by(op: str, *arguments: float, dtype: torch.dtype = torch.float32) -> Derivative:
    call = OpCall(op, op, 0.0, 0, 0)
    return Derivative(op, 1, arguments, (), (4,), (1,), (1,), dtype, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("threshold_backward", (0,)),
        ("leaky_relu_backward", (0.01, False)),
        ("hardtanh_backward", (0.0, 6.0)),
        ("hardtanh_backward", (-1.0, 1.0)),
    ],
)
def test_few_valued_derivatives_are_exact(
    op: str, arguments: tuple[float, ...], dtype: torch.dtype
) -> None:
    pieces = exact_pieces(read_by(op, *arguments, dtype=dtype))
    assert pieces is not None
    around = torch.tensor([0.0, 1.0, -1.0, 6.0], dtype=dtype)
    towards = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    x = torch.cat([around, *(torch.nextafter(around, t) for t in towards), 4 * torch.randn(99)])
    x = x.to(dtype)
    gradient = torch.randn_like(x)
    exact = getattr(torch.ops.aten, op)(gradient, x, *arguments)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    number = torch.bucketize(x.to(wide), torch.tensor(pieces.borders, dtype=wide))
    level = torch.tensor(pieces.levels, dtype=wide)[number]
    assert torch.equal((gradient.to(wide) * level).to(dtype), exact)


def test_what_is_not_exact_has_no_mask() -> None:
    assert exact_pieces(read_by("threshold_backward", 0.1)) is None
    assert exact_pieces(read_by("leaky_relu_backward", -0.5, False)) is None
    assert exact_pieces(read_by("hardtanh_backward", 0.1, 6.0)) is None
    assert exact_pieces(read_by("dropout_noise", 1.0)) is None
    assert exact_pieces(read_by("silu_backward")) is None
