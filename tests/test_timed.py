"""What is timed: only where seconds decide, what tells most first, no longer than it may take."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import compiler as compiler_module
from fxopt.compiler import Compiler
from fxopt.cost_models.measured import Measured
from fxopt.cost_models.timing import Timing
from fxopt.decide.options import lowered, promising
from fxopt.ir.cost import OpCall
from fxopt.passes.baseline import baseline_calls
from fxopt.request import resolve

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[str]:
    """The keys of the op calls that were run, each taking twice what the roofline says."""
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    keys: list[str] = []

    def run(self: Measured, make: Any, call: OpCall, prior: float) -> tuple[Timing, float]:
        keys.append(call.key)
        return Timing(2 * prior), -1.0

    monkeypatch.setattr(Measured, "_time", run)
    return keys


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


DATA = [torch.randn(4, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def planned(budget: fxopt.Budget) -> fxopt.Plan:
    return fxopt.plan(mlp(), budget, DATA[0], calibration=DATA)


def test_a_cache_of_least_error_is_planned_without_timing(timed: list[str]) -> None:
    ids = torch.randint(64, (3, 48))
    plan = fxopt.plan(
        llama(), fxopt.Budget(kv_cache="90%"),
        {"input_ids": ids}, workload=fxopt.Generate(batch=1, prompt=256, new_tokens=16),
    )  # fmt: skip
    assert {d.family for d in plan.rewritten} >= {"kv_cache"}
    assert timed == []
    assert not any(decision.timed for decision in plan.decisions)
    assert not any("speed" in decision.reason for decision in plan.decisions)


@pytest.mark.parametrize(
    "rows", [{"weights": "60%"}, {"weights": "60%", "relative_error": 0.5, "minimize": "error"}]
)
def test_least_error_times_nothing(timed: list[str], rows: Any) -> None:
    planned(fxopt.Budget(**rows))
    assert timed == []


@pytest.mark.parametrize(
    "rows",
    [
        {"weights": "60%", "relative_error": 0.5},
        {"weights": "60%", "relative_error": 0.5, "minimize": "memory"},
        {"latency": "2x"},
    ],
)
def test_where_seconds_decide_each_call_is_timed_once(timed: list[str], rows: Any) -> None:
    planned(fxopt.Budget(**rows))
    assert timed
    assert len(timed) == len(set(timed))
    count = len(timed)
    planned(fxopt.Budget(**rows))  # kept on disk
    assert len(timed) == count


def test_what_there_was_no_time_for_is_told_by_others_and_timed_next(
    timed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiler_module, "TIMING_SECONDS", {"cpu": 0.0})
    with caplog.at_level(logging.INFO, "fxopt"):
        plan = planned(fxopt.Budget(latency="2x"))
    assert timed == []
    assert not any(decision.timed for decision in plan.decisions)
    assert "op calls were not timed" in caplog.text
    assert any("latency: there was no time to time" in note for note in plan.notes)
    monkeypatch.setattr(compiler_module, "TIMING_SECONDS", {"cpu": 60.0})
    plan = planned(fxopt.Budget(latency="2x"))
    assert timed
    assert not any("no time to time" in note for note in plan.notes)


def test_what_stands_there_is_timed_first_and_then_one_of_each_family() -> None:
    request = resolve(
        mlp(), fxopt.Budget(latency="2x"), DATA[0], workload=None, calibration=DATA, keep=(),
        rewrites=None, at=None, seed=0, time_limit=None,
    )  # fmt: skip
    made = Compiler(request)
    options = lowered(made.proposals, (*made.scenarios, made.final), baseline_calls)
    calls = promising(options, made.costs.prior)
    keys = [call.key for call in calls]
    assert len(keys) == len(set(keys))
    kept = {
        c.key for s in made.sites if s.family == "linear" for c in baseline_calls(s, made.final)
    }
    count = sum(key in kept for key in keys)
    assert count == 2
    assert set(keys[:count]) <= kept
    families = [call.family for call in calls]
    others = set(families[count:])
    assert set(families[count : count + len(others)]) == others
    assert len(calls) > count + len(others)
