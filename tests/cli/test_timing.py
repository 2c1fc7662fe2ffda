"""Medians with their intervals, and calls added up."""

from __future__ import annotations

import pytest
import torch

from fxopt.cli.timing import Bench, Estimate, Timed, median, timed, together


def test_the_interval_holds_the_true_median_in_19_of_20_cases() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.empty(2000, 41, dtype=torch.float64).exponential_(generator=generator)
    true = torch.tensor(2.0).log().item()
    found = [median(row.tolist()) for row in samples]
    held = sum(e.low <= true <= e.high for e in found) / len(found)
    assert 0.94 <= held <= 0.99
    assert all(e.low <= e.median <= e.high for e in found)
    assert found[0].median == pytest.approx(samples[0].median().item())


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_values_give_their_whole_range(count: int) -> None:
    values = [float(i) for i in range(count)]
    assert median(values[::-1]) == Estimate(values[count // 2], values[0], values[-1])


def test_ratios_are_of_pairs() -> None:
    # the machine slows down in the middle: the ratio does not notice
    found = timed([(1.0, 0.5), (4.0, 2.0), (2.0, 1.0)])
    assert found.ratio == Estimate(0.5, 0.5, 0.5)
    assert found.original == Estimate(2.0, 1.0, 4.0)


def test_calls_add_up_weighted_by_what_the_original_takes() -> None:
    slow = Timed(Estimate(3.0, 2.0, 4.0), Estimate(1.5, 1.0, 2.0), Estimate(0.5, 0.4, 0.6))
    fast = Timed(Estimate(1.0, 1.0, 1.0), Estimate(1.0, 1.0, 1.0), Estimate(1.0, 1.0, 1.0))
    both = together(slow, fast)
    assert both.original == Estimate(4.0, 3.0, 5.0)
    assert both.optimised == Estimate(2.5, 2.0, 3.0)
    assert both.ratio.median == pytest.approx(2.5 / 4)
    assert both.ratio.low == pytest.approx((3 * 0.4 + 1) / 4)
    assert both.ratio.high == pytest.approx((3 * 0.6 + 1) / 4)


def test_a_table_for_people() -> None:
    call = Timed(Estimate(2e-3, 1e-3, 3e-3), Estimate(1e-3, 1e-3, 1e-3), Estimate(0.5, 0.25, 0.75))
    lines = str(Bench({"forward": call}, {"weights": (2048.0, 512.0)})).splitlines()
    assert lines[0].split() == ["median", "(95", "%", "interval)", "original", "optimised", "ratio"]
    assert " ".join(lines[1].split()) == (
        "forward 2 ms (1 ms - 3 ms) 1 ms (1 ms - 1 ms) 0.50x (0.25-0.75)"
    )
    assert lines[2].split() == ["weights", "2", "KiB", "512", "B", "0.25x"]
