"""The search: how long it may think."""

from __future__ import annotations

import time

import pytest

from fxopt.decide import search as module
from fxopt.decide.search import Limits, Search
from fxopt.decide.solve import Problem, Solution
from fxopt.decide.table import Table


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
