"""The solver against brute force on programs small enough to enumerate."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.decide import solve as solve_module
from fxopt.decide.greedy import greedy
from fxopt.decide.problem import (
    Group,
    Option,
    Pair,
    Problem,
    Row,
    total,
    undominated,
    value,
    violation,
)
from fxopt.decide.solve import nearest, solve

ROWS = ("error", "bytes", "seconds")
PEAK = ("bytes@mlp", "bytes@rest")
amount = st.integers(0, 20).map(float)


@st.composite
def shrinking(draw: st.DrawFn) -> Callable[[Option], Option]:
    """What gives options an amount of their own at one point of a peak."""
    point, less = draw(st.sampled_from(PEAK)), draw(amount)

    def shrink(option: Option) -> Option:
        more = {point: option.amounts["bytes"] - less} if option.amounts["error"] > 10 else {}
        return Option(option.label, {**option.amounts, **more})

    return shrink


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    groups = tuple(
        Group(
            f"g{g}",
            tuple(
                Option(f"o{o}", {row: draw(amount) for row in ROWS})
                for o in range(draw(st.integers(1, 4)))
            ),
        )
        for g in range(draw(st.integers(1, 4)))
    )
    if draw(st.booleans()):  # a peak, which some options shrink at one point alone
        shrink = draw(shrinking())
        groups = tuple(replace(g, options=tuple(map(shrink, g.options))) for g in groups)
    rows = tuple(
        Row(name, float(draw(st.integers(0, 60))), constant=draw(amount))
        for name in sorted(draw(st.sets(st.sampled_from((*ROWS, *PEAK)), max_size=3)))
    )
    pairs = []
    if len(groups) > 1:
        for _ in range(draw(st.integers(0, 2))):
            a, b = draw(st.permutations(range(len(groups))))[:2]
            pairs.append(
                Pair(
                    (a, draw(st.integers(0, len(groups[a].options) - 1))),
                    (b, draw(st.integers(0, len(groups[b].options) - 1))),
                    {"error": float(draw(st.integers(-5, 5)))},
                )
            )
    choices = list(itertools.product(*(range(len(g.options)) for g in groups)))
    cuts = tuple(draw(st.lists(st.sampled_from(choices), max_size=2, unique=True)))
    together = tuple(draw(st.permutations(range(len(groups))))[: draw(st.sampled_from([0, 2, 3]))])
    exclusive = (together,) if len(together) > 1 else ()
    objective = {draw(st.sampled_from(ROWS)): 1.0}
    return Problem(groups, rows, objective, tuple(pairs), cuts, exclusive=exclusive)


def brute_force(problem: Problem) -> float | None:
    choices = itertools.product(*(range(len(g.options)) for g in problem.groups))
    feasible = [c for c in choices if violation(problem, c) <= 1e-9]
    return min((value(problem, c) for c in feasible), default=None)


@settings(max_examples=500, deadline=None)
@given(problems())
def test_solution_is_optimal(problem: Problem) -> None:
    expected, found = brute_force(problem), solve(problem, gap=1e-9)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert violation(problem, found.choice) <= 1e-6
        assert found.value == pytest.approx(expected, abs=1e-6)


@st.composite
def repeated(draw: st.DrawFn) -> Problem:
    """Some groups of a program twice or three times, with what tells them apart or not."""
    problem = draw(problems())
    kept = list(problem.groups)
    more = draw(st.lists(st.sampled_from(kept), min_size=1, max_size=3))
    groups = tuple(draw(st.permutations([*kept, *more])))
    pairs = [(g, o) for g, group in enumerate(groups) for o in range(1, len(group.options))]
    forbidden = draw(st.sets(st.sampled_from(pairs), max_size=2)) if pairs else set()
    together = draw(st.permutations(range(len(groups))))[: draw(st.sampled_from([0, 2]))]
    exclusive = (tuple(together),) if together else ()
    # of what excludes each other the first option is never forbidden, nor are all others
    return Problem(groups, problem.rows, problem.objective, forbidden=frozenset(forbidden),
                   exclusive=exclusive)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(repeated())
def test_equal_groups_are_counted_and_not_told_apart(problem: Problem) -> None:
    expected, found = brute_force(problem), solve(problem, gap=1e-9)
    assert (found is None) == (expected is None)
    if found is not None:
        assert violation(problem, found.choice) <= 1e-6
        assert found.value == pytest.approx(expected, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_greedy_is_feasible_and_no_better_than_optimal(problem: Problem) -> None:
    found, expected = greedy(problem), brute_force(problem)
    if found is not None:
        assert violation(problem, found.choice) <= 0
        assert expected is not None
        assert found.value >= expected - 1e-9


def test_solution_is_deterministic() -> None:
    option = [Option(f"o{o}", {"error": 1.0, "bytes": 3.0 - o % 2}) for o in range(4)]
    problem = Problem(
        tuple(Group(f"g{g}", tuple(option)) for g in range(6)), (Row("bytes", 15.0),), {"error": 1}
    )
    first = solve(problem)
    assert first is not None
    assert all(solve(problem) == first for _ in range(3))


def test_infeasible_is_none_without_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_module, "greedy", lambda _: pytest.fail("walked"))
    group = Group("g", (Option("o", {"bytes": 2.0}),))
    assert solve(Problem((group,), (Row("bytes", 1.0),), {"error": 1.0})) is None
    tried = Problem((group,), (), {"error": 1.0}, cuts=((0,),))
    assert solve(tried) is None
    assert nearest(tried) == (0,)  # nothing else is left


def test_dominated_options_are_dropped_and_one_of_equals_stays() -> None:
    options = [
        Option("keep", {"error": 0.0, "bytes": 4.0}),
        Option("worse", {"error": 1.0, "bytes": 4.0}),
        Option("small", {"error": 1.0, "bytes": 2.0}),
        Option("twin", {"error": 1.0, "bytes": 2.0}),
    ]
    assert undominated(options, ("error", "bytes")) == [0, 2]


@settings(max_examples=100, deadline=None)
@given(problems())
def test_nearest_has_the_smallest_worst_ratio(problem: Problem) -> None:
    rows = [row for row in problem.rows if row.limit > 0]
    problem = Problem(problem.groups, tuple(rows), problem.objective)

    def worst(choice: tuple[int, ...]) -> float:
        ratios = [(total(problem, choice, r.name) + r.constant) / r.limit for r in rows]
        return max([1.0, *ratios])  # within its limits a row counts for nothing

    choices = itertools.product(*(range(len(g.options)) for g in problem.groups))
    assert worst(nearest(problem)) <= min(worst(c) for c in choices) + 1e-3


def test_nearest_wastes_no_other_row() -> None:
    """One row cannot hold; that is no leave to miss the other by as much for a better objective."""
    fast = Option("fast", {"bytes": 3.0, "error": 0.25, "seconds": 1.0})
    slow = Option("slow", {"bytes": 3.0, "error": 0.01, "seconds": 2.0})
    groups = tuple(Group(f"g{i}", (fast, slow)) for i in range(6))
    rows = (Row("bytes", 6.0), Row("error", 0.6))
    problem = Problem(groups, rows, {"seconds": 1.0})
    choice = nearest(problem)
    assert total(problem, choice, "error") <= 0.6
    assert sum(choice) == 4


def test_nearest_spends_nothing_that_brings_it_no_nearer() -> None:
    """A row that cannot hold is no leave to lose what does not help it, however little it is."""
    keep = Option("keep", {"bytes": 5.0, "error": 0.0})
    small = Option("small", {"bytes": 3.0, "error": 0.1})
    idle = Option("idle", {"bytes": 5.0, "error": 1e-7})
    groups = [Group("g", (keep, small)), *(Group(f"h{i}", (keep, idle)) for i in range(9))]
    assert nearest(Problem(tuple(groups), (Row("bytes", 6.0),), {"error": 1.0})) == (1, *[0] * 9)


def test_nearest_leaves_rows_that_hold_at_their_limits() -> None:
    """One row cannot hold; the other is no reason to err more than it asks for."""
    keep = Option("keep", {"cache": 0.0, "weights": 3.0, "error": 0.0})
    small = Option("small", {"cache": 0.0, "weights": 1.0, "error": 0.1})
    cached = Option("cached", {"cache": 9.0, "weights": 0.0, "error": 0.0})
    packed = Option("packed", {"cache": 5.0, "weights": 0.0, "error": 0.2})
    groups = (Group("cache", (cached, packed)), *(Group(f"g{i}", (keep, small)) for i in range(4)))
    problem = Problem(groups, (Row("cache", 1.0), Row("weights", 10.0)), {"error": 1.0})
    choice = nearest(problem)
    assert choice[0] == 1
    assert sum(choice[1:]) == 1


def test_nothing_to_decide() -> None:
    assert solve(Problem((), (), {"error": 1.0})) is not None
    assert solve(Problem((), (Row("bytes", 1.0, constant=2.0),), {"error": 1.0})) is None
    assert nearest(Problem((), (), {"error": 1.0})) == ()
