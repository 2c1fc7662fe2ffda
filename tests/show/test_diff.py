from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fxopt.ir.budget import Budget
from fxopt.ir.plan import KEEP, Decision, Plan
from fxopt.show import diff


def edited(plan: Plan) -> Plan:
    """The plan, with sites changed, added, removed and locked, and another budget."""
    other = plan.model_copy(deep=True)
    other.lock("re:model.layers.[0-2].mlp.gate_proj", rewrite="linear.low_rank")
    other.decisions.remove(other.find("lm_head"))
    other.decisions.append(Decision(key="score", family="linear", reason="new"))
    other.budget = Budget(kl=0.05, kv_cache="40%", latency="0.9x")
    other.totals[0] = replace(other.totals[0], measured=0.9)
    return other


def test_golden(plan: Plan, golden: Callable[[str, str], None]) -> None:
    golden("diff.txt", diff.render(plan.diff(edited(plan)), colours=False))


def test_equal_plans_differ_in_nothing(plan: Plan) -> None:
    found = plan.diff(plan.model_copy(deep=True))
    assert not found
    assert str(found) == "Diff: 0 changed, 0 added, 0 removed (the plans decide the same)"


def test_measurements_alone_are_shown_but_are_no_difference(plan: Plan) -> None:
    other = plan.model_copy(deep=True)
    other.totals[0] = replace(other.totals[0], measured=0.9)
    found = plan.diff(other)
    assert not found
    assert "970 ms -> 900 ms" in str(found)
    assert "kv_cache" not in str(found)


def test_direction(plan: Plan) -> None:
    other = edited(plan)
    forth, back = plan.diff(other), other.diff(plan)
    assert [d.key for d in forth.added] == [d.key for d in back.removed] == ["score"]
    assert [d.key for d in forth.removed] == [d.key for d in back.added] == ["lm_head"]
    assert forth.changed == [(a, b) for b, a in back.changed]
    assert len(forth.changed) == 3


def test_everything_that_is_replayed_counts(plan: Plan) -> None:
    for change in (
        {"version": 2},
        {"label": "other"},
        {"parameters": {"bits": 8}},
        {"kernel": {"block": 64}},
        {"locked": True},
    ):
        other = plan.model_copy(deep=True)
        other.decisions[8] = other.decisions[8].model_copy(update=change)
        found = plan.diff(other)
        assert [b for _, b in found.changed] == [other.decisions[8]]
        before, after = str(found).split("->")[:2]
        assert before != after
    other.decisions[8] = plan.decisions[8].model_copy(update={"reason": "said otherwise"})
    assert not plan.diff(other)


def test_families_with_the_same_key_are_apart(plan: Plan) -> None:
    other = plan.model_copy(deep=True)
    site = plan.decisions[0]
    other.decisions.append(Decision(key=site.key, family="attention", rewrite=KEEP))
    assert [d.family for d in plan.diff(other).added] == ["attention"]
