"""Shadow prices against programs whose prices are known, and against solving again."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from fxopt.decide.prices import prices
from fxopt.decide.problem import Group, Option, Problem, Row, total
from fxopt.decide.solve import solve


def problem(limit: float, sites: int = 40, seed: int = 0) -> Problem:
    """Sites that keep 10 bytes, or take 1 and some seconds that differ from site to site."""
    chance = random.Random(seed)
    groups = tuple(
        Group(
            f"g{g}",
            (
                Option("keep", {"bytes": 10.0, "seconds": 0.0, "error": 0.0}),
                Option("small", {"bytes": 1.0, "seconds": chance.random(), "error": 1.0}),
            ),
        )
        for g in range(sites)
    )
    rows = (Row("bytes", limit, constant=5.0), Row("error", 1e3))
    return Problem(groups, rows, {"seconds": 1.0})


def test_the_price_is_that_of_the_site_at_the_margin() -> None:
    found = prices(problem(205.0), "seconds")
    # 200 bytes of 400: the cheaper half is small, and the margin lies at the median of seconds
    seconds = sorted(g.options[1].amounts["seconds"] for g in problem(205.0).groups)
    assert found["bytes"] == pytest.approx(seconds[22] / 9, rel=1e-6)
    assert found["error"] == 0.0


def test_it_foretells_what_solving_again_finds() -> None:
    before, after = problem(205.0, 400), problem(235.0, 400)
    before = replace(before, rows=(replace(before.rows[0], limit=2005.0), before.rows[1]))
    after = replace(after, rows=(replace(after.rows[0], limit=2095.0), after.rows[1]))
    values = [solve(p) for p in (before, after)]
    assert values[0] is not None
    assert values[1] is not None
    foretold = 90.0 * prices(before, "seconds")["bytes"]
    assert values[0].value - values[1].value == pytest.approx(foretold, rel=0.1)


def test_rows_with_room_cost_nothing() -> None:
    assert prices(problem(1e4), "seconds") == {"bytes": 0.0, "error": 0.0}


def test_points_of_a_peak_are_priced_as_one_row() -> None:
    base = problem(205.0)
    rows = (Row("bytes@a", 205.0, 5.0), Row("bytes@rest", 205.0, 0.0))
    found = prices(replace(base, rows=rows), "seconds")
    assert set(found) == {"bytes"}
    assert found["bytes"] == pytest.approx(prices(base, "seconds")["bytes"])


def test_forbidden_options_and_exclusive_groups_are_respected() -> None:
    base = problem(205.0, 4)
    kept = replace(base, forbidden=frozenset((g, 1) for g in range(4)))
    assert prices(replace(kept, rows=(Row("bytes", 20.0),)), "seconds") == {}
    apart = replace(base, exclusive=((0, 1), (2, 3)), rows=(Row("bytes", 31.0),))
    found = prices(apart, "seconds")
    best = [min(g.options[1].amounts["seconds"] for g in base.groups[i : i + 2]) for i in (0, 2)]
    assert found["bytes"] == pytest.approx(min(best) / 9)
    # two pairs of which one site each may be small
    assert prices(replace(apart, rows=(Row("bytes", 21.0),)), "seconds") == {}


def test_nothing_to_decide() -> None:
    assert prices(Problem((), (Row("bytes", 1.0),), {"seconds": 1.0}), "seconds") == {"bytes": 0.0}


def test_prices_are_those_of_the_main_row_alone() -> None:
    base = problem(205.0)
    tied = replace(base, objective={"seconds": 7.0, "bytes": 1e-3})
    assert prices(tied, "seconds") == prices(base, "seconds")
    assert total(base, [0] * 40, "bytes") == 400.0
