"""Calls as wholes: the slower of device and host, and the line through realised plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.cost_models.calls import Fit, Parts, Realised, fitted
from fxopt.cost_models.hardware import Device

DEVICE = Device("toy", "cpu", 1e9, {"float32": 1e9}, 1e-6, 2**30, 1, "2026-01-01")


def test_a_call_is_as_slow_as_the_slower_of_both() -> None:
    assert (Parts(3.0, 1.0) + Parts(1.0, 1.0)).bound == 4.0
    assert (Parts(1.0, 3.0) + Parts(1.0, 1.0) * 0.5).bound == 3.5


def test_nothing_realised_leaves_the_sum_as_it_is() -> None:
    assert fitted([]) == Fit(0.0, 1.0)


def test_two_plans_tell_offset_and_scale() -> None:
    fit = fitted([(0.010, 0.0125), (0.030, 0.0365)])  # 0.5 ms + 1.2 x
    assert fit(0.020) == pytest.approx(0.0245, rel=0.01)
    assert fit.scale == pytest.approx(1.2, abs=0.06)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1e-3), st.floats(0.7, 1.4), st.lists(st.floats(1e-3, 1.0), min_size=4))
def test_points_on_a_line_are_met(offset: float, scale: float, parts: list[float]) -> None:
    points = [(x, offset + scale * x) for x in parts]
    fit = fitted(points)
    assert fit.offset >= 0
    for x, y in points:
        assert fit(x) == pytest.approx(y, rel=0.15)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-4, 1.0), st.floats(1e-4, 1.0)), max_size=6))
def test_more_seconds_of_parts_are_more_of_the_whole(points: list[tuple[float, float]]) -> None:
    fit = fitted(points)
    assert fit(0.0) >= 0
    assert fit(1.0) > fit(0.5) > fit(0.1)


def test_a_model_is_not_calibrated_by_itself(tmp_path: Path) -> None:
    known = Realised(DEVICE, tmp_path)
    for i in range(1, 5):
        known.note("one", "decode", 0.01 * i, 0.02 * i)
    assert known.fit("decode", "one") == Fit()
    assert known.fit("prefill", "two") == Fit()
    assert Realised(DEVICE, tmp_path).fit("decode", "two")(0.02) == pytest.approx(0.04, rel=0.05)
    assert Realised(replace(DEVICE, name="other"), tmp_path).fit("decode", "two") == Fit()


def test_of_each_model_the_newest_plans_are_kept(tmp_path: Path) -> None:
    known = Realised(DEVICE, tmp_path)
    for i in range(40):
        known.note("one", "decode", 0.01, 0.02 if i < 20 else 0.01)
    assert known.fit("decode")(0.01) == pytest.approx(0.01)
