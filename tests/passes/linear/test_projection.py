"""Projections against their optima and laws in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.kernels.fp8_linear import reference as fp8
from fxopt.kernels.monarch_linear import dense
from fxopt.kernels.quantized_linear import dequantize
from fxopt.kernels.quantized_linear import quantize as nearest
from fxopt.passes.linear import projection, rounding
from fxopt.passes.linear.rounding import Rounding

Draw = Callable[[int, int], Tensor]


def gram_of(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double() / len(rows)


@pytest.mark.parametrize(("out", "width"), [(63, 80), (80, 63), (64, 64)])
def test_low_rank_is_the_whitened_optimum(out: int, width: int, correlated: Draw) -> None:
    weight, gram = torch.randn(out, width), gram_of(correlated(500, width))
    tail = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(gram)).square()
    energies, directions = projection.spectrum(weight, gram)
    assert directions.shape == (out, min(out, width))
    torch.testing.assert_close(energies, tail, rtol=1e-3, atol=1e-5 * float(tail.sum()))
    for rank in (1, 16, 40):
        down, up = projection.low_rank(weight, gram, rank)
        assert (down.shape, up.shape) == ((rank, width), (out, rank))
        torch.testing.assert_close(
            projection.error(up @ down - weight, gram), tail[rank:].sum(), rtol=1e-4, atol=0
        )


def test_low_rank_beats_the_plain_svd_on_the_inputs_seen(correlated: Draw) -> None:
    weight, gram = torch.randn(64, 80), gram_of(correlated(500, 80))
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    plain = projection.error((u[:, :16] * s[:16]) @ v[:16] - weight, gram)
    down, up = projection.low_rank(weight, gram, 16)
    assert projection.error(up @ down - weight, gram) < 0.9 * plain


@pytest.mark.parametrize(("out", "width"), [(64, 80), (80, 64)])
def test_low_rank_survives_a_rank_deficient_gram(out: int, width: int, correlated: Draw) -> None:
    weight, rows = torch.randn(out, width), correlated(20, width)
    rows[:, 3] = 0  # a channel that never fires
    down, up = projection.low_rank(weight, gram_of(rows), 24)
    assert projection.relative_error(up @ down - weight, weight, gram_of(rows)) < 1e-6


def test_no_signal_at_all_is_no_error() -> None:
    weight, gram = torch.randn(64, 64), torch.zeros(64, 64, dtype=torch.float64)
    down, up = projection.low_rank(weight, gram, 8)
    assert torch.isfinite(up @ down).all()
    assert projection.relative_error(up @ down - weight, weight, gram) == 0.0
    assert all(
        torch.isfinite(t.float()).all() for t in rounding.quantize(weight, Rounding.of(gram), 4, 32)
    )
    assert torch.isfinite(dense(*projection.monarch(weight, gram, 2, 8))).all()


@pytest.mark.parametrize(("out", "width", "blocks"), [(60, 84, 2), (84, 60, 4), (64, 64, 4)])
def test_monarch_sweeps_never_raise_the_error(
    out: int, width: int, blocks: int, correlated: Draw
) -> None:
    weight, gram = torch.randn(out, width), gram_of(correlated(500, width))
    found = [dense(*projection.monarch(weight, gram, blocks, 5, sweeps)) for sweeps in range(6)]
    errors = [float(projection.error(approximation - weight, gram)) for approximation in found]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_sweeps_bring_white_blocks_near_the_low_rank_optimum() -> None:
    """White weights, inputs of spectrum 1 / i, half the parameters: (plain, whitened, fitted)."""
    weight = torch.randn(256, 256, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(256, 256, dtype=torch.float64))
    gram = (basis / torch.arange(1, 257)) @ basis.T

    def error(change: Tensor) -> float:
        return projection.relative_error(change, weight, gram) ** 0.5

    identity = torch.eye(256, dtype=torch.float64)
    plain = error(dense(*projection.monarch(weight, identity, 4, 16, sweeps=0)) - weight)
    fitted = [
        error(dense(*projection.monarch(weight, gram, 4, 16, sweeps)) - weight) for sweeps in (0, 3)
    ]
    down, up = projection.low_rank(weight, gram, 64)
    assert plain > 0.55
    assert fitted[0] < 0.7 * plain
    assert fitted[1] < 0.94 * fitted[0]
    assert fitted[1] < 1.05 * error(up @ down - weight)


def test_monarch_without_correlation_between_blocks_is_the_block_optimum() -> None:
    weight = torch.randn(40, 60, dtype=torch.float64)
    gram = torch.block_diag(*[gram_of(torch.randn(200, 20)) for _ in range(3)])
    out = weight[:39]
    tails = 0.0
    for i in range(3):
        for j in range(3):
            block = out[13 * i : 13 * i + 13, 20 * j : 20 * j + 20]
            own = gram[20 * j : 20 * j + 20, 20 * j : 20 * j + 20]
            s = torch.linalg.svdvals(block @ torch.linalg.cholesky(own))
            tails += float(s[4:].square().sum())
    for sweeps in (0, 3):
        change = dense(*projection.monarch(out, gram, 3, 4, sweeps)) - out
        assert float(projection.error(change, gram)) == pytest.approx(tails, rel=1e-4)


def test_monarch_recovers_a_planted_structure(correlated: Draw) -> None:
    right, left = torch.randn(4, 4 * 3, 20), torch.randn(4, 16, 4 * 3)
    weight, gram = dense(right, left), gram_of(correlated(500, 80))
    found = projection.monarch(weight, gram, 4, 3)
    assert projection.relative_error(dense(*found) - weight, weight, gram) < 1e-9
    down, up = projection.low_rank(weight, gram, 12)  # as many parameters
    assert projection.relative_error(up @ down - weight, weight, gram) > 0.01


@given(
    bits=st.sampled_from((4, 8)),
    group=st.sampled_from((12, 36)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 2**31),
)
def test_propagated_rounding_is_never_worse(
    bits: int, group: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(9, 36, generator=generator).to(dtype)
    rows = torch.randn(40, 36, generator=generator) @ torch.randn(36, 36, generator=generator)
    gram = gram_of(rows)

    def loss(packed: Tensor, scale: Tensor, zero: Tensor) -> float:
        restored = dequantize(packed, scale.double(), zero.double(), bits, group)
        return float(projection.error(restored - weight.double(), gram))

    assert loss(*rounding.quantize(weight, Rounding.of(gram), bits, group)) <= loss(
        *nearest(weight, bits, group)
    )


def test_fp8_rounding_with_the_gram_is_never_worse(correlated: Draw) -> None:
    for width in (36, 200):
        weight, gram = torch.randn(9, width), gram_of(correlated(300, width))
        scale = fp8.row_scale(weight)
        rounded, own = rounding.quantize_fp8(weight, Rounding.of(gram))
        assert torch.equal(own, scale[:, 0])
        loss = projection.error(fp8.dequantize(rounded, own) - weight, gram)
        nearest = fp8.dequantize(fp8.quantize(weight, scale), own)
        assert loss < 0.7 * projection.error(nearest - weight, gram)


def test_loud_columns_are_rounded_first() -> None:
    """One input that is loud, and nearly the sum of two that are quiet: its rounding is the one
    to be made up for, wherever it stands."""
    rows = torch.randn(500, 2).double() * 0.01
    weight = torch.randn(64, 3).float()
    for loud in (0, 1, 2):
        order = [i for i in range(3) if i != loud]
        inputs = torch.zeros(500, 3, dtype=torch.float64)
        inputs[:, order] = rows
        inputs[:, loud] = 100 * rows.sum(1) + 0.001 * torch.randn(500).double()
        gram = gram_of(inputs)

        def coarse(column: int, values: Tensor) -> Tensor:
            return (values / 0.2).round() * 0.2

        fitted = rounding.propagated(weight, Rounding.of(gram), coarse)
        assert torch.equal(fitted[:, loud], coarse(loud, weight[:, loud]))


def test_propagated_rounding_halves_the_error_of_correlated_inputs(correlated: Draw) -> None:
    weight, gram = torch.randn(64, 300), gram_of(correlated(1000, 300))

    def loss(packed: Tensor, scale: Tensor, zero: Tensor) -> float:
        return projection.relative_error(
            dequantize(packed, scale, zero, 4, 50) - weight, weight, gram
        )

    fitted = rounding.quantize(weight, Rounding.of(gram), 4, 50)
    assert loss(*fitted) < 0.5 * loss(*nearest(weight, 4, 50))
    again = rounding.quantize(weight, Rounding.of(gram), 4, 50)
    assert all(torch.equal(a, b) for a, b in zip(fitted, again, strict=True))
