"""The search: how long it may think, and what it learns from."""

from __future__ import annotations

import time

import pytest

from fxopt.decide import search as module
from fxopt.decide.problem import Problem, Solution
from fxopt.decide.search import Limits, Search, robust
from fxopt.decide.table import Column, Table, kind
from fxopt.ir.cost import Cost
from fxopt.ir.site import Site


def test_hard_programs_share_the_solver_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def slow(problem: Problem, *, time_limit: float, gap: float) -> Solution:
        limits.append(time_limit)
        time.sleep(0.05)
        return Solution((), 0.0, 0.0, "milp")

    monkeypatch.setattr(module, "solve", slow)
    search = Search(Table([], []), Limits({}, {}, {"latency": 1.0}), solver_seconds=4.0)
    for _ in range(3):
        search.next()
    assert limits[0] == 1.0
    assert limits == sorted(limits, reverse=True)
    assert len(set(limits)) == 3
    search.solver_seconds = -1.0
    search.next()
    assert limits[-1] == 0.5


def test_a_swap_that_measures_no_number_says_nothing_of_its_kind() -> None:
    def column(prior: float, measured: float | None) -> Column:
        return Column((), Cost(1.0), prior, measured)

    table = Table([], [[column(1.0, float("nan")), column(2.0, 6.0), column(1.0, None)]])
    table.learn()
    assert table.factor == {kind(column(1.0, None)): 3.0}


def test_errors_are_scaled_by_ratios_that_are_alike_and_what_they_differ_by() -> None:
    assert robust([2.0]) == 2.0
    assert robust([1.0, 1.1]) == pytest.approx(1.05 + 2 * 0.1 / 2**0.5)
    assert robust([9.0, 1.0, 1.0]) == 1.0  # of a plan of quite another error


def test_what_errs_too_little_or_is_no_number_says_nothing_of_others() -> None:
    columns = [Column((), Cost(2.0), 0.0, 0.0), Column((), Cost(1.0), 0.5, 0.5)]
    where = Site("linear", "a", "a", None, "a")  # pyright: ignore[reportArgumentType]
    search = Search(Table([(where,)], [columns]), Limits({"error": 1.0}, {}, {"latency": 1.0}))
    search.tell((0,), {"error": 1e-3})
    search.tell((1,), {"error": float("nan")})
    assert not search.correction
    search.correct((1,), {"error": 0.5}, {"error": 0.6})
    assert search.correction["error"] == pytest.approx(1.2)
