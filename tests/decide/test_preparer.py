"""Tensors of candidates: what those of one site share is computed once, and let go after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.decide.priors import Preparer
from fxopt.decide.propose import Proposal
from fxopt.decide.statistics import Recorded, Statistics
from fxopt.ir.rewrite import Match
from fxopt.ir.site import LinearInfo, Site
from fxopt.passes.linear import projection, rounding
from fxopt.passes.linear.low_rank import LowRank
from fxopt.passes.linear.low_rank_pivoted import LowRankPivoted
from fxopt.passes.linear.quantized import Quantized

NAMES = ("first", "second")


def site(name: str) -> Site:
    info = LinearInfo(f"{name}.weight", None, 128, 192, torch.float32)
    return Site("linear", name, name, info, name)


def statistics() -> Statistics:
    def recorded() -> Recorded:
        rows = torch.randn(300, 128)
        gram = (rows.T @ rows).double()
        return Recorded(torch.randn(192, 128), None, {"x": rows}, gram_sum=gram, gram_rows=300)

    return Statistics({name: recorded() for name in NAMES}, 300, 300)


def proposals(name: str) -> list[Proposal]:
    found: list[Proposal] = []
    for rewrite in (LowRank(), LowRankPivoted(), Quantized()):
        match = rewrite.match(site(name))
        assert isinstance(match, Match)
        where = match.site
        found += [Proposal(where, rewrite, match, c) for c in rewrite.candidates(match, ())]
    return found


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a spectrum and a factor for rounding were computed."""
    seen = {"spectrum": 0, "of": 0}

    def counted(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def call(*args: Any) -> Any:
            seen[name] += 1
            return whole(*args)

        monkeypatch.setattr(owner, name, call)

    counted(projection, "spectrum")
    counted(rounding.Rounding, "of")
    return seen


def test_one_decomposition_serves_all_candidates_of_a_site(counts: dict[str, int]) -> None:
    prepare, made = Preparer(statistics()), [p for name in NAMES for p in proposals(name)]
    assert len(made) > 12
    shared = [prepare(proposal) for proposal in made]
    assert counts == {"spectrum": 2, "of": 2}
    # and they are what each candidate gets alone
    for proposal, tensors in zip(made, shared, strict=True):
        alone = Preparer(prepare.statistics)(proposal)
        for name, tensor in alone.items():
            assert torch.equal(tensors[name], tensor)


def test_what_is_shared_is_let_go_with_the_site() -> None:
    prepare = Preparer(statistics())
    for name in NAMES:
        prepare(proposals(name)[0])
    assert not any(recorded.made for recorded in prepare.statistics.nodes.values())
    assert prepare(proposals("first")[0]) is prepare(proposals("first")[0])


def test_the_latest_are_kept_and_those_of_the_last_choice() -> None:
    first, second = (proposals(name)[0] for name in NAMES)
    size = sum(t.nbytes for t in Preparer(statistics())(first).values())
    prepare = Preparer(statistics(), limit=size)
    one = prepare(first)
    assert prepare(first) is one
    other = prepare(second)
    assert prepare(second) is other
    assert prepare(first) is not one  # there was room for one
    assert prepare.chosen([first, second]) == [first, second]
    chosen = prepare(first), prepare(second)
    prepare(proposals("second")[1])
    assert prepare(first) is chosen[0]
    assert prepare(second) is chosen[1]
    prepare.chosen([second])  # another choice with a site as it was
    assert prepare(second) is chosen[1]
    prepare.chosen([])  # what it gives up is the latest now
    assert prepare(first) is not chosen[0]


def test_what_is_tried_about_a_choice_is_all_that_is_made() -> None:
    base = [proposals(name)[0] for name in NAMES]
    size = sum(t.nbytes for t in Preparer(statistics())(base[0]).values())
    prepare = Preparer(statistics(), limit=size)
    prepare.chosen(base)
    kept = [prepare(p) for p in base]
    for i, name in enumerate(NAMES):
        tried = [*base]
        tried[i] = proposals(name)[1]
        prepare.chosen(tried)
        assert [prepare(p) is found for p, found in zip(tried, kept, strict=True)] == [
            k != i for k in range(2)
        ]
