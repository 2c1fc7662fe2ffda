"""Decisions that exclude each other, in the program and in what its walk finds."""

from __future__ import annotations

import itertools
import random

import pytest

from fxopt.decide.greedy import greedy
from fxopt.decide.problem import Group, Option, Problem, Row, value, violation
from fxopt.decide.solve import nearest, solve


def problem(seed: int, exclusive: tuple[tuple[int, ...], ...]) -> Problem:
    rng = random.Random(seed)
    groups = tuple(
        Group(
            str(g),
            tuple(
                Option(str(o), {"error": o * rng.random(), "weights": 10 - o * 4 * rng.random()})
                for o in range(3)
            ),
        )
        for g in range(5)
    )
    return Problem(groups, (Row("weights", 38),), {"error": 1.0}, exclusive=exclusive)


def legal(found: Problem) -> list[tuple[int, ...]]:
    return [c for c in itertools.product(range(3), repeat=5) if violation(found, c) <= 0]


@pytest.mark.parametrize("seed", range(8))
def test_the_best_legal_choice_is_found(seed: int) -> None:
    free, bound = problem(seed, ()), problem(seed, ((0, 1, 2), (2, 3)))
    choices = legal(bound)
    assert len(choices) < len(legal(free))
    assert all(sum(c[g] > 0 for g in (0, 1, 2)) <= 1 for c in choices)
    found = solve(bound)
    if not choices:
        assert found is None
        return
    assert found is not None
    assert found.choice in choices
    assert found.value == pytest.approx(min(value(bound, c) for c in choices))
    walked = greedy(bound)
    assert walked is None or walked.choice in choices


def test_nearest_is_legal_where_nothing_holds() -> None:
    bound = problem(0, ((0, 1, 2, 3, 4),))
    bound = Problem(bound.groups, (Row("weights", 5),), bound.objective, exclusive=bound.exclusive)
    assert solve(bound) is None
    choice = nearest(bound)
    assert sum(o > 0 for o in choice) == 1
