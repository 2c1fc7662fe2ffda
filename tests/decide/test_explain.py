"""What is said of a choice: amounts and rows, by the program that it was made in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fxopt.decide.decisions import decisions, pairs
from fxopt.decide.explain import ALONE, BETTER, Explainer
from fxopt.decide.outlook import loosened, standing
from fxopt.decide.propose import Proposal, Proposals
from fxopt.decide.quality import Quality
from fxopt.decide.search import Limits, Search, Trial
from fxopt.decide.swaps import Swaps
from fxopt.decide.table import Column, Table
from fxopt.ir.cost import Cost
from fxopt.ir.plan import Decision
from fxopt.ir.rewrite import Candidate, Match
from fxopt.ir.site import Site

KIB, MS = 1024, 1e-3
# label: milliseconds, KiB, error
Options = Mapping[str, tuple[float, float, float]]


def site(key: str, family: str = "linear") -> Site:
    return Site(family, key, key, None, key)  # pyright: ignore[reportArgumentType]


def proposal(where: Site, label: str, **rewrite: Any) -> Proposal:
    name = f"{where.family}.{label.rstrip('0123456789')}"
    made: Any = SimpleNamespace(**{"name": name, "version": 1, "exact": False, **rewrite})
    return Proposal(where, made, Match(where), Candidate(name, label, {"size": 1}))


def table(**sites: Options) -> tuple[Table, Proposals]:
    """Sites with the option to keep them, and others."""
    keys, columns, by_site = [], [], {}
    for name, options in sites.items():
        where = site(name)
        row: list[Column] = []
        for label, (time, size, error) in options.items():
            proposals = () if label == "keep" else (proposal(where, label),)
            cost = Cost(time * MS, int(size * KIB))
            calls = {"prefill": time * MS}
            row.append(Column(proposals, cost, error, error, calls, frozenset(calls)))
        keys.append((where,))
        columns.append(row)
        by_site["linear", name] = [c.proposals[0] for c in row if c.proposals]
    return Table(keys, columns), Proposals(tuple(k for (k,) in keys), by_site, {})


def searched(
    found: Table, choice: tuple[int, ...], objective: str = "latency", **limits: float
) -> tuple[Search, Trial]:
    rows = {name: limit * KIB if name == "weights" else limit for name, limit in limits.items()}
    search = Search(found, Limits(rows, {}, {objective: 1.0}))
    return search, search.tell(choice, search.predict(choice))


def decided(
    made: tuple[Table, Proposals],
    choice: tuple[int, ...],
    objective: str = "latency",
    **limits: float,
) -> list[Decision]:
    return decisions(made[1], made[0], explainer(made, choice, objective, **limits))


def explainer(
    made: tuple[Table, Proposals],
    choice: tuple[int, ...],
    objective: str = "latency",
    **limits: float,
) -> Explainer:
    search, trial = searched(made[0], choice, objective, **limits)
    return Explainer(
        Swaps(standing(search, trial)), "kl", "nats", Quality("kl", per_position=False)
    )


def reasons(decision: Decision) -> dict[str, str]:
    return {other.label or "keep": other.reason for other in decision.alternatives}


OPTIONS: Options = {
    "keep": (5, 100, 0),
    "small8": (6, 40, 1e-3),
    "slow8": (20, 40, 1e-4),
    "tiny4": (5.5, 20, 9e-3),
    "wide8": (5.5, 60, 1e-3),
}


def test_each_alternative_is_answered_with_an_amount_and_a_row() -> None:
    (first, second) = decided(table(a=OPTIONS, b=OPTIONS), (1, 0), weights=145, error=2e-3)
    said = reasons(first)
    assert first.reason.startswith("saves 60 KiB of weights, which is used up: worth ")
    assert first.reason.endswith(" elsewhere, for 1 ms here")
    assert said["keep"].startswith("needs 60 KiB more of weights, which is used up: worth ")
    assert said["keep"].endswith(" elsewhere, to save 1 ms here; frees 0.001 nats of kl")
    freed = "takes 20 ms against 6 ms; the 0.0009 nats of kl that it frees are worth "
    assert said["slow8"].startswith(freed)
    assert said["tiny4"].startswith("errs 0.008 nats more than kl has room for: worth ")
    assert said["wide8"].startswith("needs 20 KiB more of weights, which is used up")
    assert second.reason.startswith("no candidate pays; the nearest, ")


def test_a_row_that_is_full_binds_and_one_with_room_says_how_much() -> None:
    (only,) = decided(table(a=OPTIONS), (1,), weights=50, error=1.0)
    assert reasons(only)["keep"].startswith(
        "needs 60 KiB more of weights, of which 10 KiB are left"
    )
    (first, _) = decided(table(a=OPTIONS, b=OPTIONS), (1, 1), weights=80, error=2.01e-3)
    assert reasons(first)["tiny4"].startswith("errs 0.008 nats more, and kl is used up")


def test_dominated_and_equal_options() -> None:
    options: Options = {
        "keep": (5, 100, 0),
        "small8": (4, 40, 1e-3),
        "same8": (4, 40, 2e-3),
        "big8": (4, 50, 1e-3),
        "twin8": (4, 40, 1e-3),
    }
    (only,) = decided(table(a=options), (1,), weights=200, error=1.0)
    assert reasons(only) == {
        "keep": "takes 5 ms against 4 ms; frees 0.001 nats of kl, which has room",
        "same8": "errs 0.001 nats more for the same time",
        "big8": "needs 10 KiB more of weights for the same time",
        "twin8": "no better in any row of the budget",
    }


def test_a_trade_that_is_worth_as_much_elsewhere_is_called_a_tie() -> None:
    options: Options = {"keep": (5, 100, 0), "small8": (6, 40, 1e-3)}
    (first, second) = decided(table(a=options, b=options), (1, 0), weights=140, error=1.0)
    assert first.reason.endswith(": worth 1 ms elsewhere, for 1 ms here: a tie")
    assert reasons(first)["keep"].endswith(", to save 1 ms here: a tie; frees 0.001 nats of kl")
    assert reasons(second)["small8"].endswith("that it frees are worth 1 ms: a tie")
    (first, _) = decided(table(a=OPTIONS, b=OPTIONS), (1, 0), weights=145, error=2e-3)
    assert "tie" not in reasons(first)["slow8"]


def test_what_an_option_would_free_is_said_of_every_row() -> None:
    options: Options = {"keep": (5, 100, 0), "small8": (6, 40, 1e-3), "less8": (6, 20, 9e-3)}
    (first, second) = decided(table(a=options, b=options), (1, 1), weights=80, error=2.01e-3)
    for decision in (first, second):
        assert reasons(decision)["less8"].startswith("errs 0.008 nats more, and kl is used up")
        assert reasons(decision)["less8"].endswith("; frees 20 KiB of weights")
        assert reasons(decision)["keep"].endswith("; frees 0.001 nats of kl")


def test_bytes_that_nobody_needs_are_no_reason() -> None:
    options: Options = {"keep": (5, 100, 0), "a8": (4, 40, 1e-3), "b8": (4.001, 30, 1e-3)}
    (only,) = decided(table(a=options), (1,), weights=200, error=1.0)
    assert reasons(only)["b8"] == "saves 10 KiB of weights, which has room"


@pytest.mark.parametrize(("refined", "better"), [(False, BETTER), (True, ALONE)])
def test_what_would_have_been_chosen_by_these_costs_is_called_that(
    refined: bool, better: str
) -> None:
    made = table(a=OPTIONS, b=OPTIONS)
    search, trial = searched(made[0], (1, 1), weights=80, error=1.0)
    trial = replace(trial, refined=refined)
    # measured later: the smallest errs nothing
    column = made[0].columns[0][3]
    made[0].columns[0][3] = Column(column.proposals, column.cost, 0.0, 0.0, column.seconds)
    why = Explainer(Swaps(standing(search, trial)), "kl", "nats", Quality("kl", per_position=False))
    (first, _) = decisions(made[1], made[0], why)
    assert reasons(first)["tiny4"] == f"{better}: saves 500 µs"
    assert not reasons(first)["slow8"].startswith((ALONE, BETTER))


def test_less_than_the_gap_is_not_called_better() -> None:
    options: Options = {"keep": (1000, 100, 0), "a8": (1000, 40, 1e-3), "b8": (999.5, 40, 1.1e-3)}
    slow: Options = {"keep": (1, 10, 0)}
    (first, _) = decided(table(a=options, b=slow), (1, 0), weights=60, error=1.0)
    assert reasons(first)["b8"] == "errs 0.0001 nats more for the same time"


def test_faster_sites_say_so_and_slow_ones_are_useless_where_only_time_counts() -> None:
    options: Options = {"keep": (10, 0, 0), "fast8": (5, 0, 1e-3), "even8": (9.9, 0, 1e-3)}
    (first,) = decided(table(a=options), (1,), error=1.0)
    assert first.reason == "2.00x speed"
    (first,) = decided(table(a=options), (0,), error=5e-4)
    assert "fast8: errs 0.001 nats more" in first.reason
    assert reasons(first)["even8"].startswith("errs 0.001 nats more")
    (first,) = decided(table(a={k: options[k] for k in ("keep", "even8")}), (0,), error=1.0)
    assert "has to be 1.02x as fast" in first.reason


def test_least_error_is_explained_in_errors() -> None:
    (first, second) = decided(table(a=OPTIONS, b=OPTIONS), (1, 0), "error", weights=145)
    assert first.reason.startswith("saves 60 KiB of weights, which is used up: worth ")
    assert first.reason.endswith(" for 0.001 nats here")
    fast = {"keep": (5, 100, 0), "fast8": (2, 40, 1e-3)}
    (untimed,) = decided(table(a=fast), (1,), "error", weights=45)
    assert untimed.reason.startswith("saves 60 KiB of weights")  # of speed only where it is timed
    (timed,) = decided(table(a=fast), (1,), "error", weights=45, latency=3)
    assert timed.reason.startswith("2.50x speed, saves 60 KiB of weights")
    assert reasons(first)["tiny4"].startswith("errs 0.009 nats against 0.001 nats")
    assert reasons(second)["small8"].startswith("errs 0.001 nats against 0 nats")


def relative(
    choice: tuple[int, ...], objective: str = "latency", **limits: float
) -> list[Decision]:
    """Decisions of two sites whose errors are relative, which the program adds up as squares."""
    made = table(a=OPTIONS, b=OPTIONS)
    search, trial = searched(made[0], choice, objective, **limits)
    swaps, quality = Swaps(standing(search, trial)), Quality("relative_error", per_position=False)
    return decisions(made[1], made[0], Explainer(swaps, "relative_error", "", quality))


def test_relative_errors_are_told_as_the_budget_states_them() -> None:
    said = reasons(relative((1, 0), weights=145, error=2e-3)[0])
    more = math.sqrt(9e-3) - math.sqrt(1e-3)
    assert said["tiny4"].startswith(f"errs {more:.3g} more than relative_error has room for")
    assert said["keep"].endswith(f"; frees {math.sqrt(1e-3):.3g} of relative_error")
    less = math.sqrt(1e-3) - math.sqrt(1e-4)
    assert f"the {less:.3g} of relative_error that it frees" in said["slow8"]
    (first, _) = relative((1, 0), "error", weights=145)
    own = f"errs {math.sqrt(9e-3):.3g} against {math.sqrt(1e-3):.3g}"
    assert reasons(first)["tiny4"].startswith(own)
    assert first.reason.endswith(f", for {math.sqrt(1e-3):.3g} here")


def test_a_row_that_sites_cannot_fill_is_not_said_to_be_used_up() -> None:
    options: Options = {"keep": (5, 100, 0), "small8": (6, 40, 1e-3)}
    (half,) = decided(table(a=options), (1,), weights=80, error=1.0)
    assert half.reason.startswith("saves 60 KiB of weights: worth ")
    (full,) = decided(table(a=options), (1,), weights=41, error=1.0)
    assert full.reason.startswith("saves 60 KiB of weights, which is used up: worth ")


def test_a_site_whose_call_is_exact_already_says_so() -> None:
    made, proposals = table(a={"keep": (5, 100, 0)})
    exact = proposal(site("a"), "exact", exact=True, name="attention.exact")
    exact = replace(exact, candidate=Candidate("attention.exact", "exact", {}))
    proposals.by_site["linear", "a"] = [exact]
    (only,) = decided((made, proposals), (0,), weights=200)
    assert only.reason == "already the exact call that attention.exact makes"
    assert only.already == ["attention.exact"]


def test_groups_exclude_the_rewrites_of_their_members() -> None:
    made = table(q=OPTIONS, k=OPTIONS)
    search, trial = searched(made[0], (1, 0), weights=300, error=1.0)
    stand = standing(search, trial)
    bound = replace(stand, problem=replace(stand.problem, exclusive=((0, 1),)))
    why = Explainer(Swaps(bound), "kl", "nats", Quality("kl", per_position=False))
    second = decisions(made[1], made[0], why)[1]
    assert set(reasons(second).values()) == {"cannot stand beside the rewrite of q"}
    assert second.reason == "cannot stand beside the rewrite of q"


def joint() -> tuple[Table, Proposals]:
    """The attention of a head and its cache, decided as one."""
    where = site("m/kv=0", "attention"), site("m/kv=0", "kv_cache")
    window, blocks = proposal(where[0], "window9"), proposal(where[1], "blocks4")

    def column(proposals: tuple[Proposal, ...], time: float, size: int, error: float) -> Column:
        cost = Cost(time * MS, 0, size * KIB)
        return Column(proposals, cost, error, error, {"decode": time * MS}, frozenset({"decode"}))

    columns = [
        column((), 10, 100, 0.0),
        column((window,), 6, 100, 1e-3),
        column((blocks,), 14, 30, 2e-3),
        column((window, blocks), 7, 30, 3.5e-3),
    ]
    by_site = {("attention", "m/kv=0"): [window], ("kv_cache", "m/kv=0"): [blocks]}
    return Table([where], [columns]), Proposals(where, by_site, {})


@pytest.mark.parametrize("choice", [0, 1, 2, 3])
def test_joint_costs_add_up_and_alternatives_leave_the_other_site(choice: int) -> None:
    made = joint()
    attention, cache = decided(made, (choice,), kv_cache=200 * KIB, error=1.0)
    column = made[0].columns[0][choice]
    both = (attention, cache)
    assert sum(d.cost.seconds for d in both) == pytest.approx(column.cost.seconds)
    assert sum(d.error or 0.0 for d in both) == pytest.approx(column.error)
    assert sum((d.calls or {})["decode"] for d in both) == pytest.approx(column.cost.seconds)
    assert cache.cost.state_bytes == column.cost.state_bytes
    # a swap at one site moves the sum by what the column differs
    others = {0: (1, 2), 1: (0, 3), 2: (3, 0), 3: (2, 1)}[choice]
    for decision, other in zip(both, others, strict=True):
        (alternative,) = decision.alternatives
        column_of = made[0].columns[0][other]
        difference = alternative.cost.seconds - decision.cost.seconds
        assert difference == pytest.approx(column_of.cost.seconds - column.cost.seconds)
        assert alternative.rewrite == "keep" or decision.rewrite == "keep"


@pytest.mark.parametrize(
    ("choice", "known"), [(1, (0.1, None)), (2, (None, 0.2)), (3, (None,) * 2)]
)
def test_an_interval_is_that_of_an_error_which_was_measured_so(
    choice: int, known: tuple[float | None, float | None]
) -> None:
    made = joint()
    columns = made[0].columns[0]
    for option, within in ((1, 0.1), (2, 0.2), (3, 0.3)):
        columns[option] = replace(columns[option], within=within)
    both = decided(made, (choice,), kv_cache=200 * KIB, error=1.0)
    assert tuple(decision.error_within for decision in both) == known


@pytest.mark.parametrize("choice", [0, 1, 2, 3])
def test_a_pair_is_told_of_as_one(choice: int) -> None:
    made = joint()
    why = explainer(made, (choice,), kv_cache=200 * KIB, error=1.0)
    (pair,) = pairs(made[1], made[0], why)
    attention, cache = decisions(made[1], made[0], why)
    assert pair.key == "m/kv=0"
    assert pair.choices == [attention.choice, cache.choice]
    assert pair.kept.cost == made[0].columns[0][0].cost
    assert pair.kept.calls == {"decode": 10 * MS}
    assert pair.kept.timed == ["decode"]
    assert bool(pair.reason) == (choice == 3)
    assert bool(pair.kept.reason) == (choice != 0)
    assert pair.error_measured is (True if choice else None)


def test_reasons_of_a_pair_are_of_both_since_neither_is_chosen_alone() -> None:
    made = joint()
    attention, cache = decided(made, (3,), kv_cache=200 * KIB, error=1.0)
    # both as they were: 10 ms and 100 KiB against 7 ms and 30 KiB
    for decision, other in ((attention, cache), (cache, attention)):
        assert decision.reason.startswith("1.43x speed, saves 70 KiB of kv_cache")
        assert decision.reason.endswith(f"; decided with {other.choice}")
    (without_window,) = attention.alternatives
    assert "takes 14 ms against 7 ms" in without_window.reason


def test_the_program_is_as_it_was_when_the_choice_was_made() -> None:
    made = table(a=OPTIONS, b=OPTIONS)
    search = Search(made[0], Limits({"weights": 145 * KIB, "error": 2e-3}, {}, {"latency": 1.0}))
    first = search.tell((1, 0), {"weights": 140 * KIB, "error": 5e-4})
    for _ in range(3):
        search.tell((0, 1), {"weights": 140 * KIB, "error": 9e-3})
    assert search.predict(first.choice)["error"] > 5 * first.predicted["error"]
    stand = standing(search, first)
    assert stand.rows(first.choice) == pytest.approx(first.predicted)
    assert all(left >= -1e-12 for left in stand.left().values())


def test_what_was_not_proved_in_time_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    made = table(a=OPTIONS, b=OPTIONS)
    search, trial = searched(made[0], (1, 0), weights=145, error=1.0)
    stand = standing(search, trial)
    rows = loosened(stand, "weights", 2.0, time_limit=1.0)
    assert rows is not None
    assert rows["latency"] < stand.rows(trial.choice)["latency"]
    assert loosened(stand, "error", 2.0, time_limit=1.0) is not None
    unproved: Any = SimpleNamespace(choice=trial.choice, value=1e9, gap=0.5)
    monkeypatch.setattr("fxopt.decide.outlook.solve", lambda *_, **__: unproved)
    assert loosened(stand, "error", 2.0, time_limit=1.0) is None
    monkeypatch.setattr("fxopt.decide.outlook.solve", lambda *_, **__: None)
    assert loosened(stand, "error", 2.0, time_limit=1.0) is None


def test_a_choice_that_is_handed_out_though_it_misses_a_row_is_its_own_measure() -> None:
    made = table(a=OPTIONS)
    search, trial = searched(made[0], (1,), weights=30, error=1.0)
    stand = standing(search, trial)
    assert stand.left()["weights"] == 0.0
    rows = loosened(stand, "weights", 1.25, time_limit=1.0)
    assert rows is not None
    assert rows["weights"] <= 1.25 * 40 * KIB
