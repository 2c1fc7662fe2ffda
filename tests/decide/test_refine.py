"""Choosing again by errors measured about a choice, where those of sites alone do not add up."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxopt.decide import refine as module
from fxopt.decide.outlook import standing
from fxopt.decide.refine import interacts, neighbours, refine
from fxopt.decide.search import Choice, Limits, Search, identity
from fxopt.decide.table import Column, Table
from fxopt.ir.cost import Cost
from fxopt.ir.site import LinearInfo, Site

BYTES = (100, 70, 40, 20)
"""Of the options of every site: as it is, and three that err more and more."""


@dataclass
class Truth:
    """Errors of choices of some sites: `alone` by site and option, and what two sites add for each
    step that both are down (`together`). Counts what is asked."""

    alone: list[tuple[float, ...]]
    together: dict[tuple[int, int], float] = field(default_factory=dict)
    asked: list[Choice] = field(default_factory=list)

    def __call__(self, choice: Choice) -> float:
        self.asked.append(choice)
        own = sum(errors[o] for errors, o in zip(self.alone, choice, strict=True))
        return own + sum(e * choice[i] * choice[j] for (i, j), e in self.together.items())

    def rows(self, choice: Choice) -> dict[str, float]:
        return {"weights": sum(map(float, (BYTES[o] for o in choice))), "error": self(choice)}


def search_of(truth: Truth, rows: dict[str, float], objective: dict[str, float]) -> Search:
    """What each site errs alone is known."""
    info = LinearInfo("weight", None, 8, 8, torch.float32)
    keys = [(Site("linear", f"{g}", f"{g}", info, f"{g}"),) for g in range(len(truth.alone))]
    columns: list[list[Column]] = []
    for errors in truth.alone:
        columns.append([
            Column((), Cost(1.0, BYTES[o], 0), error, measured=error, swapped=o > 0)
            for o, error in enumerate(errors)
        ])  # fmt: skip
    return Search(Table(keys, columns), Limits(rows, {}, objective))


def interacting() -> Truth:
    """The first three sites err less alone, and make each other worse."""
    alone = [(0.0, 0.02, 0.05, 0.10)] * 3 + [(0.0, 0.025, 0.06, 0.12)] * 3
    return Truth(alone, dict.fromkeys(itertools.combinations(range(3), 2), 0.02))


def first_of(search: Search, truth: Truth) -> Any:
    choice = search.next()
    assert choice is not None
    return search.tell(choice, truth.rows(choice))


def best_of_all(truth: Truth, most: float) -> float:
    choices = itertools.product(range(4), repeat=len(truth.alone))
    return min(truth(c) for c in choices if sum(BYTES[o] for o in c) <= most)


def test_the_better_choice_is_found_where_sites_interact() -> None:
    truth = interacting()
    search = search_of(truth, {"weights": 300.0}, {"error": 1.0})
    before = first_of(search, truth)
    least = best_of_all(truth, 300.0)
    assert before.measured["error"] > 1.2 * least
    truth.asked.clear()
    done = refine(search, truth, truth.rows, deadline=math.inf)
    after = search.best
    assert done is not None
    assert after is not None
    assert after.excess <= 0
    assert after.measured["error"] < 1.05 * least
    assert (done.before, done.after) == (before.measured["error"], after.measured["error"])
    assert done.alone == pytest.approx(sum(truth.alone[g][o] for g, o in enumerate(before.choice)))
    # up to two changes of each site, the choice itself, and what was then measured as a whole
    assert done.measured == done.near <= 12
    assert len(truth.asked) <= done.measured + 1 + 3


def test_what_was_predicted_is_by_the_changes_that_were_measured() -> None:
    truth = interacting()
    search = search_of(truth, {"weights": 300.0}, {"error": 1.0})
    before = first_of(search, truth)
    refine(search, truth, truth.rows, deadline=math.inf)
    first = search.trials[1]
    added = 0.0
    for g, o in enumerate(first.choice):
        changed = (*before.choice[:g], o, *before.choice[g + 1 :])
        added += truth(changed) - truth(before.choice)
    assert first.refined
    assert first.predicted["error"] == pytest.approx(before.measured["error"] + added)
    assert not before.refined
    assert standing(search, first).refined


@pytest.mark.parametrize("seed", range(12))
def test_the_best_is_never_worse_and_always_the_same(seed: int) -> None:
    rng = random.Random(seed)
    alone = [(0.0, *sorted(rng.random() / 10 for _ in range(3))) for _ in range(6)]
    together = {pair: rng.uniform(-0.01, 0.05) for pair in itertools.combinations(range(6), 2)}
    found = list[Any]()
    for _ in range(2):
        truth = Truth(alone, together)
        search = search_of(truth, {"weights": 320.0}, {"error": 1.0})
        before = first_of(search, truth)
        refine(search, truth, truth.rows, deadline=math.inf)
        assert search.best is not None
        assert search.best.excess <= 0
        assert search.best.measured["error"] <= before.measured["error"]
        found.append([trial.choice for trial in search.trials])
    assert found[0] == found[1]


def test_a_smaller_choice_is_found_within_a_limit_of_the_error() -> None:
    truth = interacting()
    search = search_of(truth, {"error": 0.25}, {"weights": 1.0})
    first_of(search, truth)
    assert search.trials[0].excess > 0
    second = first_of(search, truth)  # by errors as corrected
    assert second.excess <= 0
    done = refine(search, truth, truth.rows, deadline=math.inf)
    best = search.best
    assert done is not None
    assert best is not None
    assert best.excess <= 0
    assert best.measured["weights"] < second.measured["weights"]
    assert done.after == best.measured["error"] > done.before  # there was room


def test_a_choice_that_errs_too_much_is_brought_within_the_limit() -> None:
    truth = interacting()
    least = best_of_all(truth, 300.0)
    search = search_of(truth, {"weights": 300.0, "error": 1.05 * least}, {"error": 1.0})
    choice = search.nearest()
    assert choice is not None
    assert search.tell(choice, truth.rows(choice)).excess > 0
    refine(search, truth, truth.rows, deadline=math.inf)
    assert search.best is not None
    assert search.best.excess <= 0


def test_nothing_is_measured_where_errors_add_up_or_decide_nothing() -> None:
    added = Truth(interacting().alone)
    search = search_of(added, {"weights": 300.0}, {"error": 1.0})
    assert not interacts(search, first_of(search, added))
    roomy = interacting()
    free = search_of(roomy, {"weights": 300.0, "error": 9.0}, {"weights": 1.0})
    assert not interacts(free, first_of(free, roomy))
    eased = Truth(roomy.alone, dict.fromkeys(roomy.together, -0.005))  # less than their sum
    less = search_of(eased, {"weights": 300.0}, {"error": 1.0})
    assert not interacts(less, first_of(less, eased))
    over = search_of(roomy, {"weights": 100.0}, {"error": 1.0})
    over.tell((3,) * 6, roomy.rows((3,) * 6))
    assert over.trials[0].excess > 0
    assert not interacts(over, over.trials[0])
    for each, truth in ((search, added), (free, roomy), (less, eased), (over, roomy)):
        truth.asked.clear()
        assert refine(each, truth, truth.rows, deadline=math.inf) is None
        assert not truth.asked


@pytest.mark.parametrize("error", [0.0, 1e-7, -1.0, math.nan, math.inf])
def test_errors_that_tell_nothing_are_passed_over(error: float) -> None:
    truth = interacting()
    search = search_of(truth, {"weights": 300.0}, {"error": 1.0})
    choice = search.next()
    assert choice is not None
    trial = search.tell(choice, {**truth.rows(choice), "error": error})
    assert not interacts(search, trial)
    kept = search.tell(identity(search.table), {"weights": 300.0, "error": 0.1})
    assert not interacts(search, kept)


def test_a_change_that_is_no_number_is_not_made() -> None:
    truth = interacting()
    search = search_of(truth, {"weights": 300.0}, {"error": 1.0})
    before = first_of(search, truth)

    def broken(choice: Choice) -> float:
        return math.nan if choice[0] != before.choice[0] else truth(choice)

    refine(search, broken, truth.rows, deadline=math.inf)
    assert len(search.trials) > 1
    assert all(trial.choice[0] == before.choice[0] for trial in search.trials)


def test_neighbours_are_one_option_up_and_down_of_those_that_none_beats() -> None:
    truth = Truth([(0.0, 0.02, 0.03, 0.04), (0.0, 0.05, 0.04, 0.1), (0.0, 0.1, 0.2, 0.3)])
    search = search_of(truth, {"weights": 180.0}, {"error": 1.0})
    # of the second site the mild option errs more than the next, which is smaller
    assert neighbours(search, (3, 2, 0)) == [(0, 2), (1, 0), (1, 3), (2, 1)]


def test_what_excludes_each_other_is_not_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = interacting()
    search = search_of(truth, {"weights": 300.0}, {"error": 1.0})
    monkeypatch.setattr(Table, "exclusive", ((0, 5), (1, 4)))
    near = neighbours(search, (2, 0, 2, 0, 0, 0))
    assert {g for g, _ in near} == {0, 1, 2, 3, 4}
    assert 5 not in {g for g, _ in near}  # rewriting it would rewrite the first again


def test_time_ends_it_with_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = interacting()
    search = search_of(truth, {"weights": 300.0}, {"error": 1.0})
    first_of(search, truth)
    assert refine(search, truth, truth.rows, deadline=-math.inf) is None
    truth.asked.clear()
    clock = SimpleNamespace(monotonic=lambda: float(len(truth.asked)))
    monkeypatch.setattr(module, "time", clock)
    done = refine(search, truth, truth.rows, deadline=10.0)
    assert done is not None
    assert done.measured == 10 < done.near
    assert len(truth.asked) == 1 + 10 + 1  # the whole choice that they tell of is measured
    assert len(search.trials) == 2


def test_nothing_is_measured_as_a_whole_that_is_predicted_to_be_no_better() -> None:
    truth = Truth([(0.0, 0.02, 0.05, 0.10)] * 6)
    search = search_of(truth, {"weights": 300.0}, {"error": 1.0})
    choice = search.next()
    assert choice is not None
    search.tell(choice, {**truth.rows(choice), "error": 2 * truth(choice)})
    truth.asked.clear()
    done = refine(search, truth, truth.rows, deadline=math.inf)  # about it errors do add up
    assert done is not None
    assert done.after is None
    assert len(truth.asked) == 1 + done.measured


def test_progress_counts_the_changes() -> None:
    truth, seen = interacting(), list[int]()
    search = search_of(truth, {"weights": 300.0}, {"error": 1.0})
    first_of(search, truth)

    def watch(near: Any) -> Any:
        seen.append(len(near))
        return iter(near)

    done = refine(search, truth, truth.rows, deadline=math.inf, watch=watch)
    assert done is not None
    assert seen == [done.near]
