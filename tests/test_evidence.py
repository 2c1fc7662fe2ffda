"""What a plan carries for its readers is what happened: trials, outlook, graph, generated code."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import evidence
from fxopt.emit.module import OptimizedModule
from fxopt.ir.errors import RowResult
from fxopt.ir.evidence import Looser
from fxopt.ir.plan import Plan
from fxopt.ir.workload import scenarios
from fxopt.show import binding

BUDGET = fxopt.Budget(relative_error=0.2, weights="45%", minimize="memory")


@pytest.fixture(scope="module")
def optimised() -> OptimizedModule:
    torch.manual_seed(3)
    layers = {"up": nn.Linear(128, 256), "relu": nn.ReLU(), "down": nn.Linear(256, 128)}
    model = nn.Sequential(OrderedDict(layers)).eval()
    data = [torch.randn(1, 37, 128) for _ in range(6)]
    return fxopt.optimize(model, BUDGET, data[0], calibration=data)


@pytest.fixture(scope="module")
def plan(optimised: OptimizedModule) -> Plan:
    return optimised.plan


def test_the_plan_is_one_of_its_trials(plan: Plan) -> None:
    (taken,) = (trial for trial in plan.trials if trial.taken)
    assert taken.holds
    rows = {row.name: row for row in taken.rows}
    totals = {row.name: row for row in plan.totals}
    assert rows["weights"].measured == totals["weights"].measured
    assert rows["weights"].limit == totals["weights"].limit
    assert rows["relative_error"].measured != totals["relative_error"].measured  # another part
    assert rows["memory"].predicted is not None


def test_looser_rows_never_cost_more(plan: Plan) -> None:
    assert {looser.row for looser in plan.looser} == {"weights", "relative_error"}
    limits = {row.name: row.limit for row in plan.totals}
    for looser in plan.looser:
        assert looser.limit > (limits[looser.row] or 0)
        rows = {row.name: row for row in looser.rows}
        before, then = rows["memory"].before, rows["memory"].predicted
        assert before is not None
        assert then is not None
        assert then <= before * (1 + 1e-6)
    most = max(looser.limit for looser in plan.looser if looser.row == "relative_error")
    assert most == pytest.approx(0.4)


def test_the_outlook_begins_with_what_the_totals_say(plan: Plan) -> None:
    totals = {row.name: row.measured for row in plan.totals}
    for looser in plan.looser:
        now = {row.name: row.before for row in looser.rows}
        assert now["weights"] == totals["weights"]
        assert now["relative_error"] == totals["relative_error"]
        for row in looser.rows:
            assert row.predicted is not None
            limit = looser.limit if row.name == looser.row else row.limit
            assert limit is None or row.predicted <= limit * (1 + 1e-9)


def test_rows_of_which_more_buys_nothing_have_no_price() -> None:
    def outlook(row: str, memory: float) -> Looser:
        rows = [RowResult("memory", None, memory, None, "bytes", 100.0)]
        return Looser(row=row, limit=1.0, unit="bytes", rows=rows)

    measurer: Any = SimpleNamespace(
        quality_row="kl", solver_name=lambda name: "error" if name == "kl" else name
    )
    stand: Any = SimpleNamespace(main="memory")
    more = [outlook("weights", 50.0), outlook("kl", 99.9), outlook("kl", 99.8)]
    unsolved = Looser(row="kv_cache", limit=1.0, unit="bytes", rows=[], solved=False)
    found = evidence._worthless(measurer, stand, [*more, unsolved])  # pyright: ignore
    assert found == {"error": 0.0}


def test_reasons_and_the_header_speak_of_the_same_rows(plan: Plan) -> None:
    prices = {price.row: price.price for price in plan.prices}
    idle = [row for row, gain in binding.gains(plan).items() if gain < binding.WORTH]
    assert all(prices[row] == 0 for row in idle)
    assert set(binding.binding(plan)) <= {row for row, price in prices.items() if price > 0}


def test_every_limit_has_a_price_whatever_was_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "OUTLOOK_SECONDS", 0.0)
    torch.manual_seed(5)
    model, data = nn.Linear(96, 64).eval(), [torch.randn(4, 96) for _ in range(3)]
    budget = fxopt.Budget(relative_error=0.9, weights="60%")
    plan = fxopt.plan(model, budget, data[0], calibration=data)
    assert {price.row for price in plan.prices} == {"weights", "relative_error"}
    assert all(price.objective == "latency" and price.price >= 0 for price in plan.prices)
    assert len(plan.looser) == 4
    assert not any(looser.solved or looser.rows for looser in plan.looser)
    assert "linear.low_rank_shared" in plan.untried


def test_the_time_of_a_site_is_that_of_its_calls(plan: Plan) -> None:
    (call,) = scenarios(plan.workload)
    for decision in plan.decisions:
        for one in (decision, *decision.alternatives):
            if one.calls is not None:
                assert one.cost.seconds == pytest.approx(call.repeats * one.calls[call.name])
                assert one.timed == []  # the tests price by the roofline
    assert any(decision.calls for decision in plan.decisions)


def test_rewritten_sites_say_what_they_serve(plan: Plan) -> None:
    for decision in plan.rewritten:
        assert decision.reason.startswith("saves ")
        assert " of memory" in decision.reason
        assert decision.error_measured in (True, False)
        for other in decision.alternatives:
            assert any(character.isdigit() for character in other.reason), other.reason


def test_blocks_are_the_graph_before_and_after(plan: Plan) -> None:
    lines = [line for block in plan.blocks for line in block.lines]
    for decision in (plan.find(name, "linear") for name in ("up", "down")):
        at = [line for line in lines if line.endswith(f" at {decision.key}")]
        assert [line[0] for line in at] == (["-", "+"] if decision.rewritten else [" "])


def test_alternatives_that_err_more_than_the_budget_do_not_fit(plan: Plan) -> None:
    others = [other for decision in plan.decisions for other in decision.alternatives]
    assert {other.feasible for other in others} == {True, False}
    for other in others:
        assert other.feasible == ((other.error or 0.0) <= 0.2**2)
        assert other.feasible or "alone, and the whole budget is 0.2" in other.reason


def test_sources_are_the_generated_classes(optimised: OptimizedModule, plan: Plan) -> None:
    assert plan.sources
    for source in plan.sources:
        assert source.text in optimised.source
        assert source.text.startswith("class ")
        assert set(source.modules) <= set(optimised.classes)


def test_all_of_it_survives_a_file_and_a_replay(plan: Plan, tmp_path: Path) -> None:
    read = Plan.load(plan.save(tmp_path / "plan.json"))
    assert read == plan
    assert read.looser == plan.looser
    assert read.blocks == plan.blocks
    assert "class " in read.to_html(tmp_path / "plan.html").read_text(encoding="utf-8")
