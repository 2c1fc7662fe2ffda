"""Seconds of whole choices: a line through the model that keeps every site and all trials."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.decide.outlook import standing
from fxopt.decide.search import Choice, Limits, Search, slope
from fxopt.decide.table import Column, Table
from fxopt.ir.cost import Cost
from fxopt.ir.site import LinearInfo, Site

KEPT = 10.0


def search(beside: float = 2.0) -> Search:
    """Two sites of 4 s each `beside` 2 s; a rewrite saves one or two of them."""

    def column(seconds: float, error: float) -> Column:
        taken: Any = () if seconds == 4.0 else (SimpleNamespace(
            rewrite=SimpleNamespace(name="linear.toy", exact=False),
            site=SimpleNamespace(family="linear", key=""),
            candidate=SimpleNamespace(label=f"{seconds}"),
        ),)  # fmt: skip
        return Column(taken, Cost(seconds), error, error)

    info = LinearInfo("weight", None, 8, 8, torch.float32)
    keys = [(Site("linear", name, name, info, name),) for name in ("0", "1")]
    columns = [[column(4.0, 0.0), column(3.0, 0.1), column(2.0, 0.2)] for _ in keys]
    limits = Limits({"latency": 9.0, "error": 1.0}, {"latency": beside}, {"error": 1.0})
    return Search(Table(keys, columns), limits)


def test_before_any_trial_sums_stand() -> None:
    assert search().predict((0, 0))["latency"] == KEPT
    assert search().predict((1, 2))["latency"] == 7.0


def test_sites_that_were_timed_longer_than_the_whole_save_no_more_than_it() -> None:
    made = search(-6.0)  # the whole takes 2 s, its sites 8
    assert made.predict((0, 0))["latency"] == pytest.approx(2.0)
    assert made.predict((2, 2))["latency"] == pytest.approx(1.0)
    free = Search(made.table, replace(made.limits, rows={"error": 1.0}))
    assert free.predict((2, 2), "latency")["latency"] == pytest.approx(1.0)
    made.tell((0, 1), {"latency": 1.9, "error": 0.0})
    assert made.predict((0, 0))["latency"] == pytest.approx(2.0)
    assert 0 < made.predict((2, 2))["latency"] < 2.0


def test_trials_scale_what_sites_save_and_not_the_model_as_it_is() -> None:
    made = search()
    assert made.next() == (0, 1) or made.next() == (1, 0)
    made.tell((0, 1), {"latency": 9.5, "error": 0.1})  # half of what was predicted
    assert made.predict((0, 0))["latency"] == pytest.approx(KEPT)
    assert made.predict((0, 1))["latency"] == pytest.approx(9.5, abs=0.2)
    assert made.predict((2, 2))["latency"] == pytest.approx(8.0, abs=0.7)
    # a second of sites is less of the whole: what is chosen next saves two
    assert sorted(made.next() or ()) in ([0, 2], [1, 1])


def test_later_trials_count_as_much_as_the_first() -> None:
    made = search()
    told: list[tuple[Choice, float]] = [((0, 1), 9.5), ((2, 2), 8.0), ((1, 2), 8.5)]
    for choice, measured in told:
        made.tell(choice, {"latency": measured, "error": 0.0})
    for choice, measured in told:
        assert made.predict(choice)["latency"] == pytest.approx(measured, abs=0.05)


def test_a_choice_is_explained_by_what_was_predicted_when_it_was_chosen() -> None:
    made = search()
    trial = made.tell((0, 1), {"latency": 9.5, "error": 0.1})
    stand = standing(made, trial)
    assert trial.predicted["latency"] == 9.0
    assert stand.rows((0, 1))["latency"] == pytest.approx(9.0)
    assert stand.left()["latency"] == pytest.approx(0.0)


def test_no_number_scales_nothing() -> None:
    made = search()
    made.tell((0, 1), {"latency": float("inf"), "error": 0.1})
    assert made.predict((2, 2))["latency"] == 6.0


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 3.0), st.lists(st.floats(0.5, 5.0), min_size=1, max_size=6))
def test_the_slope_lies_between_what_was_expected_and_what_was_seen(
    scale: float, moves: list[float]
) -> None:
    found = slope([(-x, -scale * x) for x in moves], 0.1)
    low, high = sorted((1.0, scale))
    assert low - 1e-9 <= found <= high + 1e-9
    assert abs(found - scale) <= abs(1.0 - scale) * 0.5 + 1e-9


def test_changes_within_the_noise_say_nothing() -> None:
    assert slope([(1e-4, -0.02)], 0.1) == pytest.approx(1.0, abs=1e-3)
    assert slope([(-1.0, 5.0)], 0.01) == 0.1
