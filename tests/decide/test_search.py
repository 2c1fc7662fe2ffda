"""The search: how long it may think, and what it learns from."""

from __future__ import annotations

import time

import pytest

from fxopt.decide import search as module
from fxopt.decide.search import Limits, Search
from fxopt.decide.solve import Problem, Solution
from fxopt.decide.table import Column, Table, kind
from fxopt.ir.cost import Cost


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
