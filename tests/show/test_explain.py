"""`plan.explain`: why this and not that, as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fxopt.ir.errors import PlanError
from fxopt.ir.plan import KEEP, Decision, Plan
from fxopt.show import explain
from tests.show.synthetic import llama


def test_golden(golden: Callable[[str, str], None]) -> None:
    plan = llama(2, 2)
    decision = next(d for d in plan.rewritten if d.family == "linear")
    golden("explain.txt", explain.render(plan, decision.key, colours=False))


def test_every_alternative_is_told_with_its_reason_best_first() -> None:
    plan = llama(1, 1)
    decision = next(d for d in plan.rewritten if d.family == "linear")
    text = " ".join(plan.explain(decision.key).split())
    ordered = sorted([decision, *decision.alternatives], key=lambda one: one.cost.seconds)
    at = [text.index(f"{one.label} (" if one.label else "keep it (") for one in ordered]
    assert at == sorted(at)
    for other in decision.alternatives:
        assert other.reason in text
    assert text.count(": chosen") == 1
    assert text.count("never fits: ") == sum(not other.feasible for other in decision.alternatives)
    assert "1 x prefill" in text
    assert "256 x decode" in text
    assert "(roofline)" in text
    assert "weights binds" in text


def test_a_name_is_a_site_or_an_op_or_a_module(plan: Plan) -> None:
    def keys(site: str, family: str | None = None) -> list[str]:
        return [entry.key for entry in explain.matching(plan, site, family)]

    heads = [f"model.layers.1.self_attn/kv={head}" for head in range(2)]
    assert keys(heads[0]) == heads[:1]
    assert keys("model.layers.1.self_attn") == heads
    assert len(keys("model.layers.1")) == 5
    assert keys("model.layers.1", "kv_cache") == heads
    assert keys("lm_head") == ["lm_head"]
    with pytest.raises(PlanError, match=r"no site matches 'lm_hed'. Did you mean 'lm_head'"):
        plan.explain("lm_hed")
    with pytest.raises(PlanError, match="no site"):
        plan.explain("lm_head", "attention")
    assert keys("re:.*attn.*") == [k for k in keys("model") if "attn" in k]


def test_a_module_that_is_a_site_covers_what_is_below_it_as_well(plan: Plan) -> None:
    below = [entry.key for entry in explain.matching(plan, "model.layers.0.mlp")]
    chunked = Decision(family="activation", key="model.layers.0.mlp", rewrite=KEEP)
    plan = plan.model_copy(update={"decisions": [*plan.decisions, chunked]})
    found = [entry.key for entry in explain.matching(plan, "model.layers.0.mlp")]
    assert below
    assert found == ["model.layers.0.mlp", *below]


def test_heads_that_read_alike_are_one(plan: Plan) -> None:
    text = plan.explain("model.layers.1.self_attn")
    assert "~ model.layers.1.self_attn/kv={0..1}  kv_cache: kv_cache.blocks K4 V4" in text
    assert text.count("What else was possible") == 1


def test_refused_sites_say_why(plan: Plan) -> None:
    assert "500 input features have no square factor" in plan.explain(
        "model.layers.0.mlp.down_proj"
    )


def test_a_choice_by_hand_leaves_no_stale_comparison() -> None:
    plan = llama(1, 1)
    decision = next(d for d in plan.rewritten if d.family == "linear")
    other = next(o for o in decision.alternatives if o.label and o.feasible)
    decision.choose(other.rewrite, other.label)
    text = plan.explain(decision.key)
    assert "chosen by hand" in text
    assert "more of weights" not in text
    assert "replaced by hand" in text
    assert "not compared since the choice was changed by hand" in " ".join(text.split())


def test_an_alternative_without_a_reason_was_not_changed_by_hand() -> None:
    plan = llama(1, 1)
    decision = next(d for d in plan.rewritten if d.family == "linear")
    for other in decision.alternatives:
        other.reason = ""
    assert "by hand" not in plan.explain(decision.key)


def test_calls_without_a_time_are_not_listed() -> None:
    plan = llama(2, 1)
    decision = plan.decisions[0]
    decision.cost, decision.alternatives = replace(decision.cost, seconds=0.0), []
    assert decision.calls
    text = explain.render(plan, decision.key, decision.family, colours=False, columns=100)
    assert not any(line.strip().startswith(":") for line in text.splitlines())
