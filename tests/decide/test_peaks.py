"""Points of a program, and the search that holds a peak's row at each of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.decide.peaks import REST, points, row_at, row_of
from fxopt.decide.propose import Proposal
from fxopt.decide.search import Limits, Search
from fxopt.decide.table import Column, Table
from fxopt.ir.cost import Cost
from fxopt.ir.rewrite import Candidate, Match
from fxopt.ir.site import Site, TemporaryInfo
from fxopt.passes.activation.chunked import Chunked

MLPS = [
    Site("activation", name, f"{name}_down", TemporaryInfo("mlp", (f"{name}_up",), 8, 2), name)
    for name in ("a", "b")
]


def test_a_point_is_the_widest_moment_of_a_site() -> None:
    live = {"embed": 3, "a_up": 10, "add": 7, "b_up": 12}
    assert points(live, MLPS, {"a"}) == {REST: 12.0, "a": 10.0}
    assert points(live, MLPS, {"a", "b"}) == {REST: 7.0, "a": 10.0, "b": 12.0}


def test_names_of_rows() -> None:
    assert row_of(row_at("memory", "layers.0@x")) == "memory"
    assert row_of("latency.decode") == "latency.decode"


def column(site: Site, temporary: int, seconds: float, *, chunk: int | None) -> Column:
    cost = Cost(seconds, 0, 0, temporary)
    if chunk is None:
        return Column((), cost, 0.0)
    candidate = Candidate("activation.chunked", f"rows{chunk}", {"chunk": chunk})
    return Column((Proposal(site, Chunked(), Match(site), candidate),), cost, 0.0, 0.0)


def table(kept: int = 100) -> Table:
    options = [
        [
            column(site, kept, 1.0, chunk=None),
            column(site, 60, 1.5, chunk=4),
            column(site, 20, 2.0, chunk=2),
        ]
        for site in MLPS
    ]
    return Table([(site,) for site in MLPS], options)


@given(
    rest=st.integers(0, 200), first=st.integers(100, 200), second=st.integers(100, 200),
    limit=st.integers(1, 220),
)  # fmt: skip
def test_the_cheapest_choice_under_every_point_is_found(
    rest: int, first: int, second: int, limit: int
) -> None:
    at = {REST: float(rest), "a": float(first), "b": float(second)}
    limits = Limits({"activations": float(limit)}, {}, {"latency": 1.0}, at)
    search = Search(table(), limits)
    seconds, saved = (1.0, 1.5, 2.0), (0, 40, 80)
    fits = [
        (seconds[i] + seconds[j], (i, j))
        for i, j in itertools.product(range(3), repeat=2)
        if max(rest, first - saved[i], second - saved[j]) <= limit
    ]
    found = search.next()
    if not fits:
        assert found is None
        return
    assert found is not None
    assert sum(seconds[i] for i in found) == pytest.approx(min(fits)[0])
    expected = max(rest, first - saved[found[0]], second - saved[found[1]])
    assert search.predict(found)["activations"] == expected


def test_what_a_peak_measured_moves_the_point_that_was_widest() -> None:
    at = {REST: 50.0, "a": 100.0, "b": 100.0}
    search = Search(table(), Limits({"activations": 80.0}, {}, {"latency": 1.0}, at))
    assert search.next() == (1, 1)
    search.tell((1, 1), {"activations": 75.0, "error": 0.0})
    # 60 were expected at "a"; with 15 more there, the next smaller chunk is asked for
    assert search.limits.points == {REST: 50.0, "a": 115.0, "b": 100.0}
    search.tell((2, 2), {"activations": 70.0, "error": 0.0})
    assert search.limits.points == {REST: 70.0, "a": 115.0, "b": 100.0}
