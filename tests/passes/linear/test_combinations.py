"""Structures that are put together: factors in integers, integers with a layer beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.ir.rewrite import Match, Refusal
from fxopt.kernels.quantized_linear import quantize
from fxopt.passes.linear import dense, formats, projection, rounding
from fxopt.passes.linear.formats import Integer
from fxopt.passes.linear.low_rank_pivoted import LowRankPivoted
from fxopt.passes.linear.low_rank_quantized import LowRankQuantized
from fxopt.passes.linear.quantized_low_rank import QuantizedLowRank
from fxopt.passes.linear.rounding import Rounding

Make = Callable[..., Any]


def error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    return projection.relative_error(approximation - weight.double(), weight, gram)


@pytest.mark.parametrize(("out", "width"), [(192, 128), (128, 192), (128, 128)])
def test_pivoted_is_the_matrix_of_that_rank_in_fewer_numbers(
    out: int, width: int, recorded: Make, site: Make, correlated: Make
) -> None:
    weight = torch.randn(out, width)
    statistics = recorded(weight, None, correlated(400, width))
    match = LowRankPivoted().match(site(weight))
    assert isinstance(match, Match)
    for candidate in LowRankPivoted().candidates(match, ()):
        rank = candidate.parameters["rank"]
        pivots, others, order = projection.pivoted(*dense.low_rank(statistics, rank))
        joined = torch.cat([pivots, others @ pivots])[order]
        down, up = projection.low_rank(weight, statistics.gram, rank)
        torch.testing.assert_close(joined, up @ down, rtol=0, atol=1e-8)
        assert others.abs().max() < 5
        numbers = pivots.numel() + others.numel()
        assert numbers == rank * (out + width) - rank**2 < weight.numel()


def test_a_rank_that_two_factors_cannot_hold_is_offered_pivoted(site: Make) -> None:
    match = LowRankPivoted(fractions=(0.9,)).match(site(torch.empty(256, 256)))
    assert isinstance(match, Match)
    (candidate,) = LowRankPivoted(fractions=(0.9,)).candidates(match, ())
    assert candidate.parameters["rank"] == 176  # two factors of it: 1.4 times the weight


def test_output_factor_is_the_least_squares_solution(correlated: Make) -> None:
    weight, rows = torch.randn(40, 64), correlated(500, 64).double()
    gram = rows.T @ rows / len(rows)
    down = torch.randn(12, 64).double()
    up, inner = projection.output_factor(weight, gram, down)
    hidden = rows @ down.T
    expected = torch.linalg.lstsq(hidden, rows @ weight.double().T).solution.T
    torch.testing.assert_close(up, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(inner, hidden.T @ hidden / len(rows), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_second_factor_makes_up_for_the_rounding_of_the_first(
    bits: int, recorded: Make, site: Make, correlated: Make
) -> None:
    weight = torch.randn(192, 128)
    statistics = recorded(weight, None, correlated(400, 128))
    rewrite = LowRankQuantized(bits=(bits,), fractions=(0.75,))
    match = rewrite.match(site(weight))
    assert isinstance(match, Match)
    (candidate,) = rewrite.candidates(match, ())
    rank = candidate.parameters["rank"]
    tensors = rewrite.prepare(match, candidate, statistics)
    x, eye = statistics.inputs["x"], torch.eye(128)
    fitted = rewrite.emulate(match, candidate, tensors, {"x": eye}).T.double()
    factors = projection.low_rank(weight, statistics.gram, rank)
    naive = [
        Integer(bits, group).restored(
            dict(zip(("packed", "scale", "zero"), quantize(f.float(), bits, group), strict=True))
        )
        for f, group in zip(factors, (128, rank), strict=True)
    ]
    ideal = error(weight, factors[1] @ factors[0], statistics.gram)
    loss = error(weight, fitted, statistics.gram)
    assert ideal < loss < error(weight, (naive[1] @ naive[0]).double(), statistics.gram)
    assert loss < (1.01 if bits == 8 else 1.4) * ideal
    y = rewrite.emulate(match, candidate, tensors, {"x": x})
    torch.testing.assert_close(y, (x.double() @ fitted.T).float(), rtol=1e-3, atol=1e-3)


def test_four_bit_factors_have_groups_that_divide_any_rank(site: Make) -> None:
    rewrite = LowRankQuantized(bits=(4,))
    match = rewrite.match(site(torch.empty(576, 250)))
    assert isinstance(match, Match)
    found = rewrite.candidates(match, ())
    assert [c.label for c in found] == ["rank88-int4", "rank128-int4"]
    odd = rewrite.match(site(torch.empty(576, 251)))
    assert isinstance(odd, Match)
    assert rewrite.candidates(odd, ()) == []


def test_the_layer_beside_takes_what_rounding_leaves(
    recorded: Make, site: Make, correlated: Make
) -> None:
    weight = torch.randn(192, 256)
    weight[:, :12] *= 30  # outliers that share a group with small weights
    statistics = recorded(weight, None, correlated(600, 256))
    rewrite = QuantizedLowRank(ranks=(16,))
    match = rewrite.match(site(weight))
    assert isinstance(match, Match)
    (candidate,) = rewrite.candidates(match, ())
    tensors = rewrite.prepare(match, candidate, statistics)
    fitted = rewrite.emulate(match, candidate, tensors, {"x": torch.eye(256)}).T.double()
    stored = Integer(4, 64)
    alone = stored.fit(weight, formats.rounding_of(statistics))
    loss = error(weight, fitted, statistics.gram)
    assert loss < 0.5 * error(weight, stored.restored(alone).double(), statistics.gram)
    rest = weight - stored.restored(alone)
    down, up = projection.low_rank(rest, statistics.gram, 16)
    once = error(weight, stored.restored(alone) + up @ down, statistics.gram)
    assert loss <= once


def test_integers_with_a_layer_beside_say_where_they_do_not_fit(site: Make) -> None:
    refusal = QuantizedLowRank().match(site(torch.empty(192, 126)))
    assert isinstance(refusal, Refusal)
    assert "groups of 64 do not divide the 126 input features" in refusal.reason
    match = QuantizedLowRank(ranks=(64,)).match(site(torch.empty(128, 128)))
    assert isinstance(match, Match)
    reason = QuantizedLowRank(ranks=(64,)).refusal(match, ())
    assert reason is not None
    assert "128 x 128" in reason


def test_rounding_is_deterministic(correlated: Make) -> None:
    weight, rows = torch.randn(40, 64), correlated(200, 64).double()
    gram = rows.T @ rows
    first, second = (rounding.quantize_fp8(weight, Rounding.of(gram)) for _ in range(2))
    assert torch.equal(first[0].float(), second[0].float())
