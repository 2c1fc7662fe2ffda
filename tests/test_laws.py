"""Laws of costs and plans: more work never costs less, costs add, an edited plan replays or says
why not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

import fxopt
from fxopt.cost_models.hardware import Device
from fxopt.cost_models.roofline import Roofline
from fxopt.decide.propose import total_cost
from fxopt.ir.cost import Cost
from fxopt.ir.errors import PlanError
from fxopt.ir.rewrite import Candidate, Match
from fxopt.ir.site import AttentionInfo, LinearInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.passes.baseline import baseline_calls
from fxopt.passes.kv_cache.blocks import Blocks
from fxopt.passes.linear.low_rank import LowRank
from fxopt.passes.linear.quantized import Quantized

DEVICE = Device("toy", "cpu", 1e9, {"float32": 1e9}, 1e-6, 2**30, 1, "2026-01-01")
price = Roofline(DEVICE)
linear_sizes = st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(1, 8),
                         st.integers(1, 300))  # fmt: skip
"""in and out features in 128s, batch, tokens."""
amounts = st.builds(
    Cost, st.floats(0, 10), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)
)


def cost_of_linear(sizes: tuple[int, ...], how: str) -> Cost:
    into, out, batch, tokens = sizes
    info = LinearInfo("w", None, 128 * into, 128 * out, torch.float32)
    site = Site("linear", "w", "w", info, "w")
    scenario = Scenario("forward", batch, tokens, 0)
    if how == "keep":
        return total_cost(baseline_calls(site, scenario), price)
    rewrite, parameters = {
        "int8": (Quantized(), {"bits": 8, "group_size": 128}),
        "int4": (Quantized(), {"bits": 4, "group_size": 64}),
        "fp8": (Quantized(), {"format": "fp8"}),
        "rank": (LowRank(), {"rank": 32}),
    }[how]
    candidate = Candidate(rewrite.name, how, parameters)
    return total_cost(rewrite.lower(Match(site), candidate, scenario), price)


def no_less(larger: Cost, smaller: Cost) -> bool:
    rows = ("seconds", "weight_bytes", "state_bytes", "temporary_bytes")
    return all(getattr(larger, row) >= getattr(smaller, row) * (1 - 1e-12) for row in rows)


@pytest.mark.parametrize("how", ["keep", "int8", "int4", "fp8", "rank"])
@settings(max_examples=60, deadline=None)
@given(sizes=linear_sizes, grown=st.integers(0, 3), more=st.integers(1, 100))
def test_a_larger_linear_costs_no_less(
    how: str, sizes: tuple[int, ...], grown: int, more: int
) -> None:
    larger = tuple(size + (more if i == grown else 0) for i, size in enumerate(sizes))
    assert no_less(cost_of_linear(larger, how), cost_of_linear(sizes, how))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 8), past=st.integers(512, 4096), more=st.integers(1, 4096),
    packed=st.booleans(),
)  # fmt: skip
def test_a_longer_cache_costs_no_less(batch: int, past: int, more: int, packed: bool) -> None:
    info = AttentionInfo(
        8, 2, 64, 64, torch.float32, causal=True, window=0, softcap=0.0, has_mask=False,
        has_bias=False, has_sinks=False, cross=False, cached=True,
    )  # fmt: skip
    site = Site("kv_cache", "a/kv=0", "a", info, "a", head=0)
    blocks = Blocks()

    def cost(length: int) -> Cost:
        scenario = Scenario("decode", batch, 1, length)
        if not packed:
            return total_cost(baseline_calls(site, scenario), price)
        match = blocks.match(site)
        assert isinstance(match, Match)
        candidate = blocks.candidates(match, [scenario])[0]
        return total_cost(blocks.lower(match, candidate, scenario), price)

    assert no_less(cost(past + more), cost(past))


@given(amounts, amounts, amounts)
def test_costs_add_in_any_order(a: Cost, b: Cost, c: Cost) -> None:
    assert a + Cost() == a
    assert a + b == b + a
    one, other = (a + b) + c, a + (b + c)
    assert one.seconds == pytest.approx(other.seconds)
    assert (one.weight_bytes, one.state_bytes, one.temporary_bytes) == (
        other.weight_bytes, other.state_bytes, other.temporary_bytes
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96)).eval()


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, 20, 96, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def plan(model: nn.Module, data: list[torch.Tensor], captured_once: None) -> fxopt.Plan:
    budget = fxopt.Budget(weights="60%", relative_error=0.3)
    return fxopt.plan(model, budget, data[0], calibration=data)


words = st.sampled_from(
    ["keep", "linear.quantized", "linear.low_rank", "linear.absent", "kv_cache.blocks"]
)
values = st.one_of(st.integers(-2, 130), st.text(max_size=4), st.none(), st.booleans())


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """What somebody writes into a plan: a choice from its lists, or anything into any field."""
    kinds = st.one_of(
        st.tuples(st.just("choose"), st.integers(0, 1), st.integers(0, 30)),
        st.tuples(st.just("rewrite"), st.integers(0, 1), words),
        st.tuples(
            st.just("parameters"), st.integers(0, 1), st.sampled_from(["bits", "rank", "x"]), values
        ),
        st.tuples(
            st.sampled_from(["version", "key", "family", "label"]), st.integers(0, 1), values
        ),
        st.tuples(st.just("drop"), st.integers(0, 1)),
        st.tuples(st.just("twice"), st.integers(0, 1)),
        st.tuples(
            st.sampled_from(["fingerprint_structure", "fingerprint_weights", "budget"]), values
        ),
    )
    return draw(st.lists(kinds, min_size=1, max_size=2))


def edited(plan: fxopt.Plan, changes: list[tuple[Any, ...]]) -> dict[str, Any]:
    data = json.loads(plan.model_dump_json())
    for what, *rest in changes:
        decisions = data["decisions"]
        if what.startswith(("fingerprint", "budget")):
            data[what] = rest[0]
            continue
        if rest[0] >= len(decisions):
            continue
        one = decisions[rest[0]]
        if what == "choose" and one["alternatives"]:
            other = one["alternatives"][rest[1] % len(one["alternatives"])]
            one |= {k: other[k] for k in ("rewrite", "label", "parameters", "version")}
        elif what == "parameters":
            one["parameters"][rest[1]] = rest[2]
        elif what == "drop":
            del decisions[rest[0]]
        elif what == "twice":
            decisions.append(dict(one))
        elif what != "choose":
            one[what] = rest[1]
    return data


@example(changes=[("choose", 0, 1), ("choose", 1, 2)])
@example(changes=[("rewrite", 0, "keep"), ("drop", 1)])
@example(changes=[("parameters", 1, "bits", 3)])
@example(changes=[("twice", 0)])
@settings(max_examples=40, deadline=None)
@given(changes=edits())
def test_an_edited_plan_replays_or_is_refused_with_a_reason(
    plan: fxopt.Plan, model: nn.Module, data: list[torch.Tensor], changes: list[tuple[Any, ...]]
) -> None:
    try:
        changed = fxopt.Plan.model_validate(edited(plan, changes))
        changed.tensors = plan.tensors
        opt = fxopt.apply(model, changed, example_inputs=data[0], calibration=data)
    except (PlanError, ValidationError):
        return  # anything else that is raised is no refusal
    with torch.no_grad():
        assert opt(data[0]).isfinite().all()
    # what it rewrites is what it says, and no other weight
    names = dict(opt.named_parameters())
    rewritten = {d.key for d in changed.rewritten}
    for key in ("0", "2"):
        kept = names.get(f"{key}.weight") is dict(model.named_parameters())[f"{key}.weight"]
        assert kept == (key not in rewritten)
